"""`snpbook measure`: the launch measurement of a guest, from its files alone.

Flags, output and meaning are those of sev-snp-measure 0.0.13, so either tool can stand in for the other; where that
tool ends in a traceback, this one says what is wrong and keeps the exit codes of `snpbook.cli.errors`. Its own are
IGVM files (`snp:igvm`) and `--explain`.
"""

from __future__ import annotations

from binascii import b2a_base64
from types import SimpleNamespace
from typing import Any

import click

from snpbook.attest import measure as attest
from snpbook.attest.measure_chain import ZERO_DIGEST, Run, launch_digest, legacy_digest
from snpbook.cli.errors import Malformed, read_input
from snpbook.cli.words import Hex, Word
from snpbook.spec.image import Image, ImageError
from snpbook.spec.launch import DIGEST_SIZE, kernel_hash_table
from snpbook.spec.pages import LaunchPage
from snpbook.spec.vmsa import SNP_ACTIVE, VCPU_TYPES, CpuidSignature, Vmm

MODES = {
    "sev": "SEV",
    "seves": "SEV_ES",
    "snp": "SEV_SNP",
    "snp:ovmf-hash": "",
    "snp:svsm": "SEV_SNP_SVSM",
    "snp:igvm": "SEV_SNP_IGVM",
}
"""Each mode, and its name in the verbose output."""
LEGACY = ("sev", "seves")
MAX_VCPUS = 1 << 16
"""More than any VMM starts."""


@click.command(no_args_is_help=False)
@click.option("-v", "--verbose", is_flag=True, help="Say what is printed.")
@click.option("--mode", type=click.Choice(list(MODES)), required=True, help="Kind of guest.")
@click.option("--vcpus", type=click.IntRange(1, MAX_VCPUS), metavar="N", help="Number of vCPUs.")
@click.option("--vcpu-type", type=click.Choice(list(VCPU_TYPES)), help="QEMU's name of the vCPU type.")
@click.option("--vcpu-sig", type=Word(64), metavar="VALUE", help="vCPU signature: CPUID Fn1 EAX.")
@click.option(
    "--vcpu-family", type=click.IntRange(min=0), metavar="N", help="vCPU family, with --vcpu-model and --vcpu-stepping."
)
@click.option("--vcpu-model", type=click.IntRange(min=0), metavar="N", help="vCPU model.")
@click.option("--vcpu-stepping", type=click.IntRange(min=0), metavar="N", help="vCPU stepping.")
@click.option("--vmm-type", type=click.Choice([vmm.value for vmm in Vmm]), default=Vmm.QEMU.value, show_default=True)
@click.option("--ovmf", metavar="FILE", help="Firmware image.")
@click.option("--kernel", metavar="FILE", help="Kernel of a measured direct boot.")
@click.option("--initrd", metavar="FILE", help="Its initial RAM disk.")
@click.option("--append", metavar="TEXT", help="Its command line.")
@click.option(
    "--guest-features", type=Word(64), metavar="VALUE", default=SNP_ACTIVE, help="SEV_FEATURES (default 0x1)."
)
@click.option("--output-format", type=click.Choice(["hex", "base64"]), default="hex", show_default=True)
@click.option(
    "--snp-ovmf-hash",
    type=Hex(DIGEST_SIZE, optional=True),
    metavar="HEX",
    help="Output of mode snp:ovmf-hash: start from it.",
)
@click.option("--dump-vmsa", is_flag=True, help="Write the measured VMSAs to vmsa<N>.bin.")
@click.option("--svsm", metavar="FILE", help="SVSM image (mode snp:svsm).")
@click.option("--vars-size", type=click.IntRange(min=0), metavar="N", help="Bytes of the variable store (snp:svsm).")
@click.option("--vars-file", metavar="FILE", help="The variable store itself, for its size (snp:svsm).")
@click.option("--igvm", metavar="FILE", help="IGVM file: pages, vCPUs and order of a launch in one (mode snp:igvm).")
@click.option("--explain", metavar="OPTIONS", help="Measure again with OPTIONS changed; say which pages differ.")
@click.pass_context
def measure(context: click.Context, /, **options: Any) -> None:
    """Compute the launch measurement of an SEV, SEV-ES or SEV-SNP guest.

    Flags and output are those of sev-snp-measure. With --explain the output is both measurements and their
    differences, as in: --explain '--vcpus 4 --append "console=ttyS0"'
    """
    request = Request(**options)
    request.check()
    if request.explain is None:
        digest, runs = request.measure()
        if request.mode == "snp:ovmf-hash":
            click.echo(digest.hex())
            return
        if request.dump_vmsa:
            _dump([run.data for run in runs if run.type is LaunchPage.VMSA])
        text = digest.hex() if request.output_format == "hex" else b2a_base64(digest, newline=False).decode()
        click.echo(f"Calculated {MODES[request.mode]} guest measurement: {text}" if request.verbose else text)
    else:
        _explain(context, request)


class Request(SimpleNamespace):
    """One command line; an empty text counts as an option left out."""

    verbose: bool
    mode: str
    vcpus: int | None
    vcpu_type: str | None
    vcpu_sig: int | None
    vcpu_family: int | None
    vcpu_model: int | None
    vcpu_stepping: int | None
    vmm_type: str
    ovmf: str | None
    kernel: str | None
    initrd: str | None
    append: str | None
    guest_features: int
    output_format: str
    snp_ovmf_hash: bytes | None
    dump_vmsa: bool
    svsm: str | None
    vars_size: int | None
    vars_file: str | None
    igvm: str | None
    explain: str | None

    def check(self) -> None:
        """Refuse options that contradict each other or lack a partner."""
        if self.mode == "snp:igvm":
            _need(bool(self.igvm), "Mode snp:igvm needs --igvm.")
            return
        _need(bool(self.ovmf), f"Mode {self.mode} needs --ovmf.")
        if self.mode == "snp:ovmf-hash":
            return
        _need(self.kernel is not None or not (self.initrd or self.append), "--initrd and --append need --kernel.")
        _need(self.mode == "snp" or not self.snp_ovmf_hash, "--snp-ovmf-hash needs mode snp.")
        if self.mode == "sev":
            _need(not self.dump_vmsa, "--dump-vmsa needs a mode with VMSAs: seves, snp, snp:svsm or snp:igvm.")
            return
        _need(self.vcpus is not None, f"Mode {self.mode} needs --vcpus.")
        named = bool(self.vcpu_family or self.vcpu_sig or self.vcpu_type)
        _need(named or self.vmm_type != "QEMU", f"Mode {self.mode} needs --vcpu-type, --vcpu-sig or --vcpu-family.")
        if self.vcpu_family:
            rest = self.vcpu_model is not None and self.vcpu_stepping is not None
            _need(rest, "--vcpu-family needs --vcpu-model and --vcpu-stepping.")
        if self.mode == "snp:svsm":
            _need(self.vmm_type == "QEMU", "Mode snp:svsm is known for QEMU only.")
            _need(bool(self.svsm), "Mode snp:svsm needs --svsm.")
            _need(bool(self.vars_size) != bool(self.vars_file), "Mode snp:svsm needs --vars-size or --vars-file.")

    def measure(self) -> tuple[bytes, list[Run]]:
        """The measurement, and what it measures; `Malformed` where a file cannot be launched so."""
        try:
            return self._measure()
        except ImageError as error:
            files = " with ".join(filter(None, [self.igvm] if self.mode == "snp:igvm" else [self.ovmf, self.svsm]))
            remedy = "Give the whole image, in a build for this kind of guest."
            raise Malformed(f"{files}: {error}", remedy) from error

    def _measure(self) -> tuple[bytes, list[Run]]:
        if self.mode == "snp:igvm":
            from snpbook.attest.measure_igvm import igvm_runs

            runs = igvm_runs(read_input(self.igvm or ""))
            return launch_digest(runs), runs
        image, vmm, vcpus, start = Image.parse(read_input(self.ovmf or "")), Vmm(self.vmm_type), self.vcpus or 0, None
        match self.mode:
            case "snp:ovmf-hash":
                return attest.firmware_digest(image), []
            case "sev" | "seves":
                vmsas = attest.vmsa_pages(image, vcpus, self.signature, 0, vmm) if self.mode == "seves" else []
                runs = attest.legacy_runs(image, vmsas=vmsas, kernel_hashes=self.kernel_hashes)
                return legacy_digest(runs), runs
            case "snp:svsm":
                svsm = Image.parse(read_input(self.svsm or ""))
                vars_size = len(read_input(self.vars_file)) if self.vars_file else self.vars_size or 0
                vmsas = attest.svsm_vmsa_pages(image, svsm, vars_size, vcpus, self.signature)
                runs = attest.svsm_runs(image, svsm, vars_size, vmsas)
            case _:
                start = self.snp_ovmf_hash or None
                vmsas = attest.vmsa_pages(image, vcpus, self.signature, self.guest_features, vmm)
                runs = attest.snp_runs(image, vmsas, vmm=vmm, kernel_hashes=self.kernel_hashes, firmware=start)
        return launch_digest(runs, start or ZERO_DIGEST), runs

    @property
    def signature(self) -> int:
        """CPUID Fn1 EAX of the vCPU type; where several options name it, the family counts first, the type last."""
        if self.vcpu_family:
            return int(CpuidSignature(self.vcpu_family, self.vcpu_model or 0, self.vcpu_stepping or 0))
        return self.vcpu_sig or (int(VCPU_TYPES[self.vcpu_type]) if self.vcpu_type else 0)

    @property
    def kernel_hashes(self) -> bytes | None:
        """The table of hashes for a measured direct boot, None without a kernel."""
        if not self.kernel:
            return None
        kernel, initrd = read_input(self.kernel), read_input(self.initrd) if self.initrd else b""
        try:
            return kernel_hash_table(kernel, initrd, self.append or "")
        except UnicodeEncodeError:
            raise click.UsageError("--append is no UTF-8 text.") from None


def _explain(context: click.Context, request: Request) -> None:
    """Measure as asked and with some options changed; print both measurements and what differs."""
    from shlex import split

    from snpbook.attest.measure_explain import differences

    try:
        words = split(request.explain or "")
    except ValueError as error:
        raise click.UsageError(f"--explain: {error}.") from None
    given = {name: value for name, value in context.params.items() if name != "explain"}
    changed = Request(**measure.make_context("measure", words, context.parent, default_map=given).params)
    changed.check()
    for each in (request, changed):
        _need(not each.snp_ovmf_hash, "--explain needs the firmware's own pages: leave --snp-ovmf-hash out.")
        _need(each.mode != "snp:ovmf-hash", "--explain compares whole launches: choose another mode.")
    _need(changed.explain is None, "--explain cannot explain itself.")
    legacy = request.mode in LEGACY, changed.mode in LEGACY
    _need(len(set(legacy)) == 1, "A launch of SEV or SEV-ES has no pages in common with one of SEV-SNP.")
    launches = [request.measure(), changed.measure()]
    for digest, _ in launches:
        click.echo(digest.hex())
    for difference in differences(*(runs for _, runs in launches)):
        click.echo(str(difference))


def _dump(pages: list[bytes]) -> None:
    """Write the VMSAs to this directory, all of them or none."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    names = [f"vmsa{number}.bin" for number in range(len(pages))]
    for name in names:
        if Path(name).is_dir():
            raise Malformed(f"{name}: is a directory", "Move it away, or run in another directory.")
    with TemporaryDirectory(dir=".", prefix=".vmsa-") as folder:  # the same file system: moving cannot fail half-way
        for name, page in zip(names, pages, strict=True):
            Path(folder, name).write_bytes(page)
        for name in names:
            Path(folder, name).replace(name)


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise click.UsageError(otherwise)
