"""`snpbook measure`: the launch measurement of a guest, from its files alone.

Flags, output and meaning are those of sev-snp-measure 0.0.13, so either tool can stand in for the other; where that
tool ends in a traceback, this one says what is wrong and keeps the exit codes of `snpbook.cli.errors`.
"""

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from snpbook.attest import measure as attest
from snpbook.cli.errors import Malformed, read_input
from snpbook.spec.image import Image, ImageError
from snpbook.spec.launch import DIGEST_SIZE, kernel_hash_table
from snpbook.spec.vmsa import SNP_ACTIVE, VCPU_TYPES, CpuidSignature, Vmm

MODES = {"sev": "SEV", "seves": "SEV_ES", "snp": "SEV_SNP", "snp:ovmf-hash": "", "snp:svsm": "SEV_SNP_SVSM"}
"""Each mode, and its name in the verbose output."""


class Word(click.ParamType[int]):
    """A click type: an unsigned 64-bit integer, decimal or with the prefix 0x, 0o or 0b."""

    name = "integer"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error where it is none or does not fit."""
        try:
            number = int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is no integer: write it as 33 or 0x21", param, ctx)
        if number not in range(1 << 64):
            self.fail(f"{value} does not fit 64 bits", param, ctx)
        return number


class Digest(click.ParamType[bytes]):
    """A click type: a launch digest as hexadecimal digits; empty text stands for none."""

    name = "digest"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The digest's bytes; a usage error where it is none."""
        try:
            digest = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            self.fail("is not hexadecimal", param, ctx)
        if len(digest) not in (0, DIGEST_SIZE):
            self.fail(f"has {len(digest)} bytes, a launch digest has {DIGEST_SIZE}", param, ctx)
        return digest


@click.command(no_args_is_help=False)
@click.option("-v", "--verbose", is_flag=True, help="Say what is printed.")
@click.option("--mode", type=click.Choice(list(MODES)), required=True, help="Kind of guest.")
@click.option("--vcpus", type=click.IntRange(min=1), metavar="N", help="Number of vCPUs.")
@click.option("--vcpu-type", type=click.Choice(list(VCPU_TYPES)), help="QEMU's name of the vCPU type.")
@click.option("--vcpu-sig", type=Word(), metavar="VALUE", help="vCPU signature: CPUID Fn1 EAX.")
@click.option(
    "--vcpu-family", type=click.IntRange(min=0), metavar="N", help="vCPU family, with --vcpu-model and --vcpu-stepping."
)
@click.option("--vcpu-model", type=click.IntRange(min=0), metavar="N", help="vCPU model.")
@click.option("--vcpu-stepping", type=click.IntRange(min=0), metavar="N", help="vCPU stepping.")
@click.option("--vmm-type", type=click.Choice([vmm.value for vmm in Vmm]), default=Vmm.QEMU.value, show_default=True)
@click.option("--ovmf", metavar="FILE", required=True, help="Firmware image.")
@click.option("--kernel", metavar="FILE", help="Kernel of a measured direct boot.")
@click.option("--initrd", metavar="FILE", help="Its initial RAM disk.")
@click.option("--append", metavar="TEXT", help="Its command line.")
@click.option("--guest-features", type=Word(), metavar="VALUE", default=SNP_ACTIVE, help="SEV_FEATURES (default 0x1).")
@click.option("--output-format", type=click.Choice(["hex", "base64"]), default="hex", show_default=True)
@click.option("--snp-ovmf-hash", type=Digest(), metavar="HEX", help="Output of mode snp:ovmf-hash: start from it.")
@click.option("--dump-vmsa", is_flag=True, help="Write the measured VMSAs to vmsa<N>.bin.")
@click.option("--svsm", metavar="FILE", help="SVSM image (mode snp:svsm).")
@click.option("--vars-size", type=click.IntRange(min=0), metavar="N", help="Bytes of the variable store (snp:svsm).")
@click.option("--vars-file", metavar="FILE", help="The variable store itself, for its size (snp:svsm).")
def measure(**options: Any) -> None:
    """Compute the launch measurement of an SEV, SEV-ES or SEV-SNP guest.

    Flags and output are those of sev-snp-measure.
    """
    request = Request(**options)
    try:
        if request.mode == "snp:ovmf-hash":
            click.echo(attest.firmware_digest(_image(request.ovmf)).hex())
            return
        request.check()
        digest, vmsas = request.measure()
    except ImageError as error:
        files = " with ".join(filter(None, [request.ovmf, request.svsm]))
        remedy = "Give the whole firmware image, in a build for this kind of guest."
        raise Malformed(f"{files}: {error}", remedy) from error
    if request.dump_vmsa:
        for i, page in enumerate(vmsas):
            Path(f"vmsa{i}.bin").write_bytes(page)
    text = digest.hex() if request.output_format == "hex" else b64encode(digest).decode()
    click.echo(f"Calculated {MODES[request.mode]} guest measurement: {text}" if request.verbose else text)


@dataclass(frozen=True, slots=True)
class Request:
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
    ovmf: str
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

    def check(self) -> None:
        """Refuse options that contradict each other or lack a partner."""
        _need(self.kernel is not None or not (self.initrd or self.append), "--initrd and --append need --kernel.")
        _need(self.mode == "snp" or not self.snp_ovmf_hash, "--snp-ovmf-hash needs mode snp.")
        if self.mode == "sev":
            _need(not self.dump_vmsa, "--dump-vmsa needs a mode with VMSAs: seves, snp or snp:svsm.")
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

    def measure(self) -> tuple[bytes, list[bytes]]:
        """The launch digest, and the VMSAs in it."""
        image, vmm, vcpus = _image(self.ovmf), Vmm(self.vmm_type), self.vcpus or 0
        if self.mode == "snp:svsm":
            svsm = _image(self.svsm or "")
            vars_size = len(read_input(self.vars_file)) if self.vars_file else self.vars_size or 0
            vmsas = attest.svsm_vmsa_pages(image, svsm, vars_size, vcpus, self.signature)
            return attest.svsm_digest(image, svsm, vars_size, vmsas), vmsas
        hashes = self.kernel_hashes
        if self.mode == "snp":
            vmsas = attest.vmsa_pages(image, vcpus, self.signature, self.guest_features, vmm)
            start = self.snp_ovmf_hash or None
            return attest.snp_digest(image, vmsas, vmm=vmm, kernel_hashes=hashes, firmware=start), vmsas
        vmsas = attest.vmsa_pages(image, vcpus, self.signature, 0, vmm) if self.mode == "seves" else []
        return attest.legacy_digest(image, vmsas=vmsas, kernel_hashes=hashes), vmsas

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


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise click.UsageError(otherwise)


def _image(path: str) -> Image:
    return Image.parse(read_input(path))
