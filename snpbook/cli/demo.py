"""`snpbook demo`: the whole walk on one simulated machine, from power-on to the owner's verdict.

A progress display for people, one JSON object with `--json` for scripts. Exit codes are those of
`snpbook.cli.errors`: an image that cannot be launched is malformed, a refused report ends with 3 or 4.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from snpbook.attacks.dram import flip_before_measurement
from snpbook.cli.errors import Malformed, NotGenuine, RefusedByPolicy, read_input
from snpbook.cli.sizes import Size
from snpbook.guest.layout import Layout
from snpbook.host.vmm.configuration import DirectBoot, VmmError, check_configuration
from snpbook.spec.image import Image, ImageError
from snpbook.spec.kvm import MAX_VCPUS
from snpbook.spec.pem import pem_from_der
from snpbook.spec.products import snp_product_names
from snpbook.spec.report import ATTESTATION_REPORT
from snpbook.spec.sizes import format_size
from snpbook.system import GIB, Guest, Outcome, System, Verdict, sample_image

NONCE = b"snpbook demo"
MEMORY_LIMIT = 64 * GIB
"""A guest accepts every page of its memory; beyond this the walk would take many minutes."""
REMEDY = (
    "Give an OVMF build with SNP metadata, such as OVMF.fd or its AmdSev variant; without --firmware a sample is used."
)


@click.command
@click.option(
    "--product", type=click.Choice(snp_product_names()), default="milan", show_default=True, help="The machine."
)
@click.option("--firmware", metavar="FILE", help="Firmware image of the guest (default: the sample image).")
@click.option("--vcpus", type=click.IntRange(1, MAX_VCPUS), default=1, show_default=True, help="vCPUs of the guest.")
@click.option("--memory", type=Size(), default="64M", show_default=True, metavar="SIZE", help="Memory of the guest.")
@click.option("--kernel", metavar="FILE", help="Kernel of a measured direct boot.")
@click.option("--initrd", metavar="FILE", help="Its initial RAM disk.")
@click.option("--append", metavar="TEXT", help="Its command line.")
@click.option("--seed", default="demo", show_default=True, help="All that is random follows from this.")
@click.option("--tamper", is_flag=True, help="Flip one bit of the image in DRAM before it is measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(
    product: str,
    firmware: str | None,
    vcpus: int,
    memory: int,
    kernel: str | None,
    initrd: str | None,
    append: str | None,
    seed: str,
    tamper: bool,
    as_json: bool,
) -> None:
    """Boot a machine, launch a guest on it, have it attested, and verify the report."""
    if kernel is None and (initrd is not None or append is not None):
        raise click.UsageError("--initrd and --append need --kernel.")
    if memory > MEMORY_LIMIT:
        raise click.UsageError(f"--memory: the demo's guests have at most {format_size(MEMORY_LIMIT)}.")
    if not seed.isprintable():
        raise click.UsageError("--seed is printable text.")
    image = _image(firmware)
    boot = None
    if kernel is not None:
        boot = DirectBoot(read_input(kernel), b"" if initrd is None else read_input(initrd), append or "")
    try:
        check_configuration(image, memory, vcpus, boot)
    except VmmError as error:
        raise click.UsageError(f"{error}.") from error
    except ImageError as error:
        raise Malformed(f"{firmware or 'the sample image'}: {error}", REMEDY) from error
    system = System(product, seed, installed=max(4 * GIB, -(-memory // GIB) * 2 * GIB + 2 * GIB))
    if tamper:
        flip_before_measurement(system)
    console = Console(stderr=as_json, markup=False, highlight=False)
    with Progress(console=console, disable=as_json) as progress:
        guest, report = _walk(system, image, memory, vcpus, boot, progress)
    owner = system.owner(guest)
    verdict = owner.verify(report, NONCE)
    result = {
        "product": product,
        "seed": seed,
        "firmware": firmware or "sample",
        "memory": memory,
        "vcpus": vcpus,
        "measurement": ATTESTATION_REPORT.unpack(report).measurement.hex(),
        "expected_measurement": owner.expected_measurement.hex(),
        "verdict": verdict.outcome,
        "report": b64encode(report).decode(),
        "certificates": [pem_from_der(der) for der in owner.certificates],
        "counts": asdict(system.counts),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _summary(console, result, verdict)
    _judge(firmware or "the sample image", verdict)


def _image(firmware: str | None) -> Image:
    """The image, which must be able to boot: a secrets page for the guest's keys, room for its page tables."""
    if firmware is None:
        return sample_image()
    data = read_input(firmware)
    try:
        image = Image.parse(data)
        Layout.of(image)
    except ImageError as error:
        raise Malformed(f"{firmware}: {error}", REMEDY) from error
    return image


def _walk(
    system: System, image: Image, memory: int, vcpus: int, boot: DirectBoot | None, progress: Progress
) -> tuple[Guest, bytes]:
    """Host, launch, guest, report: each a line of the progress display."""

    def step(text: str) -> TaskID:
        return progress.add_task(text, total=1)

    task = step("host: firmware, RMP, KVM")
    system.host.boot()
    progress.update(task, completed=1)
    guest = system.create_vm(memory=memory, vcpus=vcpus, image=image, boot=boot)

    task = step("launch: pages measured and encrypted")
    guest.launch(progress=lambda _, done, total: progress.update(task, completed=done, total=total))

    task = step("guest: memory accepted")
    guest.boot()
    progress.update(task, completed=1)

    task = step("guest: report requested")
    report = guest.request_report(NONCE)
    progress.update(task, completed=1)
    return guest, report


def _summary(console: Console, result: dict[str, Any], verdict: Verdict) -> None:
    """What happened, for people; lines are whole, so that digests can be compared and copied."""
    lines = {
        "machine": f"{result['product']} (toy keys), seed {result['seed']}",
        "guest": f"{format_size(result['memory'])}, {result['vcpus']} vCPU, firmware {result['firmware']}",
        "measured": result["measurement"],
        "expected": result["expected_measurement"],
        "counts": ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in result["counts"].items()),
        "verdict": str(verdict),
    }
    for name, text in lines.items():
        console.print(f"{name:9} {text}", soft_wrap=True)


def _judge(firmware: str, verdict: Verdict) -> None:
    if verdict.outcome is Outcome.NOT_GENUINE:
        raise NotGenuine(f"{firmware}: the report is {verdict}", "The evidence was changed after it was signed.")
    if verdict.outcome is Outcome.REFUSED:
        raise RefusedByPolicy(
            f"{firmware}: the report is genuine, but {verdict}", "Another image than this was launched."
        )
