"""A QEMU command line: read into what a guest is made of, made into the guest, and printed again.

Options that build the guest are read; devices, which the model has none of, are kept by name; anything else is an error
in QEMU's words. Flash is mapped as a ROM of `-bios` is (MODEL). Sources: QEMU 10 system/vl.c, qemu-options.hx,
hw/i386/pc_sysfw.c, hw/i386/x86-common.c; texts of errors are unconfirmed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from snpbook.host.kernel import Kernel
from snpbook.host.vmm import options
from snpbook.host.vmm.configuration import DirectBoot, GuestKind, VmmError
from snpbook.host.vmm.guest import Vmm
from snpbook.host.vmm.keyval import join
from snpbook.host.vmm.options import Given, GuestOptions
from snpbook.host.vmm.properties import PROPERTIES, print_property
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF, SIGNATURE_LEAF
from snpbook.spec.eras import PrivateFile
from snpbook.spec.image import Image
from snpbook.spec.qemu import PROGRAM
from snpbook.spec.vmsa import VCPU_TYPES

HOST_CPU = "host"


@dataclass(frozen=True, slots=True)
class Part:
    """One option of a command line as it was written."""

    name: str
    argument: str

    def __str__(self) -> str:
        return f"{self.name} {self.argument}".rstrip()


def parts(text: str) -> list[Part]:
    """The options of a command line, one by one. `VmmError` where one is unknown or lacks its argument, or a quote."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise VmmError(f"{PROGRAM}: the command line as a shell reads it: {error}") from error
    if words and not words[0].startswith("-"):
        del words[0]  # the program
    found = []
    while words:
        word = words.pop(0)
        name = word.replace("--", "-", 1) if word.startswith("--") else word
        if not word.startswith("-"):
            found.append(Part("-hda", word))
        elif name in options.FLAGS:
            found.append(Part(name, ""))
        elif name not in options.READERS and name not in options.NOT_MODELLED:
            raise VmmError(f"{PROGRAM}: {word}: invalid option")
        elif not words:
            raise VmmError(f"{PROGRAM}: {word}: requires an argument")
        else:
            found.append(Part(name, words.pop(0)))
    return found


def read(text: str) -> GuestOptions:
    """What a command line asks for. `VmmError` names the option and what is wrong with it."""
    given = Given()
    for part in parts(text):
        try:
            options.take(given, part.name, part.argument)
        except VmmError as error:
            raise VmmError(f"{PROGRAM}: {part}: {error}") from error
    try:
        return given.options()
    except VmmError as error:
        raise VmmError(f"{PROGRAM}: {error}") from error


def create(kernel: Kernel, wanted: GuestOptions, files: Mapping[str, bytes]) -> Vmm:
    """The guest, built as QEMU builds it; with `-S` it waits. Files are found by their names."""

    def content(name: str, missing: str) -> bytes:
        if name not in files:
            raise VmmError(f"{PROGRAM}: {missing}")
        return files[name]

    boot = None
    if wanted.kernel:
        image = content(wanted.kernel, f"could not open kernel file '{wanted.kernel}': No such file or directory")
        missing = f"error reading initrd {wanted.initrd}: No such file or directory"
        boot = DirectBoot(image, content(wanted.initrd, missing) if wanted.initrd else b"", wanted.append)
    product = kernel.cpu.product
    host = wanted.cpu == HOST_CPU
    vmm = Vmm(
        kernel,
        Image.parse(content(wanted.firmware, f"could not load PC BIOS '{wanted.firmware}'")),
        memory=wanted.memory,
        vcpus=wanted.vcpus,
        vcpu_signature=product.cpuid(SIGNATURE_LEAF).eax if host else int(VCPU_TYPES[wanted.cpu]),
        boot=boot,
        kind=wanted.sev.kind if wanted.sev else GuestKind.PLAIN,
        sev=wanted.sev,
        files=files,
    )
    if wanted.paused:
        vmm.machine_done()
    return vmm


def options_of(
    vmm: Vmm, firmware: str = "OVMF.fd", kernel: str = "vmlinuz", initrd: str = "initrd.img"
) -> GuestOptions:
    """The options that build a guest like this one; files get the names given."""
    given = vmm.object
    if given:
        given = replace(given, cbitpos=_c_bit(vmm.kernel), discard=None if vmm.discard else False)
    types = (name for name, signature in VCPU_TYPES.items() if int(signature) == vmm.signature)
    return GuestOptions(
        memory=vmm.memory,
        vcpus=len(vmm.handles),
        cpu=next(types, HOST_CPU),
        firmware=firmware,
        sev=given,
        kernel=kernel if vmm.boot else "",
        initrd=initrd if vmm.boot and vmm.boot.initrd else "",
        append=vmm.boot.cmdline if vmm.boot else "",
        paused=vmm.ready and not vmm.launched,
    )


def printed(wanted: GuestOptions, kernel: Kernel) -> str:
    """The command line of a guest on a host: what `read` reads, and QEMU of the host's time takes."""
    sev = wanted.sev
    machine = {"type": "q35", "accel": "kvm"}
    lines = [("-cpu", wanted.cpu), ("-smp", str(wanted.vcpus)), ("-m", f"{wanted.memory >> 20}M")]
    if sev:
        machine["confidential-guest-support"] = "sev0"
        v7 = kernel.era.private_file is PrivateFile.RESTRICTEDMEM
        if sev.kind is GuestKind.SNP:
            machine["memory-backend"] = "ram1"
            backend = {"qom-type": "memory-backend-memfd-private" if v7 else "memory-backend-memfd", "id": "ram1"}
            backend |= {"size": f"{wanted.memory >> 20}M", "share": "true"}
            lines.append(("-object", join(backend, "qom-type")))
        values = {"cbitpos": str(_c_bit(kernel)), "reduced-phys-bits": str(sev.reduced_phys_bits)}
        values |= {name: print_property(PROPERTIES[name], getattr(sev, PROPERTIES[name].field)) for name in sev.given}
        lines.append(("-object", join({"qom-type": sev.type, "id": "sev0", **values}, "qom-type")))
    lines.insert(0, ("-machine", join(machine, "type")))
    lines.append(("-bios", wanted.firmware))
    lines += [
        (option, value)
        for option, value in (("-kernel", wanted.kernel), ("-initrd", wanted.initrd), ("-append", wanted.append))
        if value
    ]
    texts = [f"{option} {shlex.quote(value)}" for option, value in lines] + ["-S"] * wanted.paused
    return " \\\n  ".join([PROGRAM, *texts])


def _c_bit(kernel: Kernel) -> int:
    """The host's, which `cbitpos` must name."""
    return int(kernel.cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF).decode(ENCRYPTED_MEMORY).c_bit)
