"""The options of a QEMU command line, one reader each, and what they come to together.

A reader takes the option's text into `Given`; `Given.options` then checks what only all of them can tell. Sources: QEMU
10 qemu-options.hx, hw/core/machine-smp.c, hw/i386/x86.c; texts of errors are unconfirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from snpbook.host.vmm import keyval
from snpbook.host.vmm.configuration import GuestKind, VmmError
from snpbook.host.vmm.properties import PROPERTIES, SEV_GUEST, SNP_GUEST, SevObject, read_property
from snpbook.spec.policy import DEFAULT_LEGACY_POLICY, DEFAULT_POLICY, LEGACY_POLICY_ES
from snpbook.spec.vmsa import VCPU_TYPES

DEFAULT_MEMORY = 128 << 20
BACKENDS = ("memory-backend-memfd", "memory-backend-memfd-private", "memory-backend-ram", "memory-backend-file")
NOT_MODELLED = frozenset({
    "-device", "-netdev", "-nic", "-net", "-chardev", "-monitor", "-serial", "-parallel", "-vga", "-display", "-name",
    "-rtc", "-qmp", "-D", "-d", "-trace", "-fsdev", "-virtfs", "-debugcon", "-global", "-boot", "-cdrom", "-hda",
    "-hdb", "-blockdev", "-uuid", "-smbios", "-fw_cfg", "-numa", "-pidfile", "-spice", "-vnc", "-audiodev", "-k", "-L",
    "-watchdog-action", "-sandbox", "-msg", "-overcommit", "-runas", "-mem-path", "-tpmdev", "-acpitable",
})  # fmt: skip
"""Options with an argument that build no part of this model's guests."""
FLAGS = frozenset({
    "-enable-kvm", "-S", "-nographic", "-no-reboot", "-nodefaults", "-no-user-config", "-no-shutdown", "-daemonize",
    "-snapshot", "-usb", "-mem-prealloc",
})  # fmt: skip
"""Options without one; only `-S` matters here."""
_MACHINE = frozenset({
    "type", "accel", "confidential-guest-support", "memory-encryption", "memory-backend", "kernel_irqchip",
    "kernel-irqchip", "smm", "vmport", "dump-guest-core", "mem-merge", "hpet", "usb", "acpi", "i8042", "sata", "smbus",
})  # fmt: skip
_SMP = ("sockets", "dies", "clusters", "modules", "cores", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """What a command line builds: sizes in bytes, files by name. `not_modelled` lists what was passed over."""

    memory: int
    firmware: str
    cpu: str
    vcpus: int = 1
    sev: SevObject | None = None
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    paused: bool = False
    not_modelled: tuple[str, ...] = ()


@dataclass(slots=True)
class Given:
    """The options read so far."""

    machine: dict[str, str] = field(default_factory=dict)
    objects: dict[str, SevObject] = field(default_factory=dict)
    backends: dict[str, int] = field(default_factory=dict)
    memory: int | None = None
    vcpus: int = 1
    cpu: str = ""
    firmware: str = ""
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    paused: bool = False
    not_modelled: list[str] = field(default_factory=list)

    def options(self) -> GuestOptions:
        """All of it, where it fits together; `VmmError` in QEMU's words where it does not."""
        sev = self._confidential()
        backend = self.machine.get("memory-backend")
        if backend is not None and backend not in self.backends:
            raise VmmError(f"Memory backend '{backend}' not found")
        size = DEFAULT_MEMORY if backend is None else self.backends[backend]
        if backend is not None and self.memory not in (None, size):
            raise VmmError(
                "Size specified by -m option must match size of explicitly specified 'memory-backend' property"
            )
        for name, value in (("-append", self.append), ("-initrd", self.initrd)):
            if value and not self.kernel:
                raise VmmError(f"{name} only allowed with -kernel option")
        if not self.firmware:
            raise VmmError("no -bios: QEMU's SeaBIOS is not modelled, name an OVMF image")
        if not self.cpu:
            raise VmmError(f"no -cpu: QEMU's qemu64 is not modelled, name host or one of {', '.join(VCPU_TYPES)}")
        return GuestOptions(
            memory=size if self.memory is None else self.memory, firmware=self.firmware, cpu=self.cpu,
            vcpus=self.vcpus, sev=sev, kernel=self.kernel, initrd=self.initrd, append=self.append,
            paused=self.paused, not_modelled=tuple(self.not_modelled),
        )  # fmt: skip

    def _confidential(self) -> SevObject | None:
        """The object that the machine names, if it names one."""
        name = self.machine.get("confidential-guest-support", self.machine.get("memory-encryption"))
        if name is None:
            self.not_modelled += [f"-object {one.type},id={key}: the machine does not use it" for key, one in
                                  self.objects.items()]  # fmt: skip
            return None
        if name not in self.objects:
            raise VmmError(f"Device '{name}' not found")
        sev = self.objects[name]
        if sev.kind is GuestKind.SEV:
            return sev
        irqchip = self.machine.get("kernel_irqchip", self.machine.get("kernel-irqchip"))
        if irqchip == "off":
            raise VmmError("sev_common_kvm_init: SEV-ES guests require in-kernel irqchipsupport")
        if self.machine.get("smm") == "on" and sev.kind is GuestKind.SNP:
            raise VmmError("SEV-SNP does not support SMM.")
        if self.machine.get("smm") == "on":
            raise VmmError("System Management Mode not supported by this hypervisor.")
        return sev


def take(given: Given, name: str, argument: str) -> None:
    """Read one option. `VmmError` in QEMU's words, without the option's name."""
    if name in READERS:
        READERS[name](given, argument)
    elif name == "-S":
        given.paused = True
    elif name != "-enable-kvm":
        given.not_modelled.append(f"{name} {argument}".rstrip())


def _machine(given: Given, text: str) -> None:
    found = keyval.split(text, "type")
    kind = found.get("type", "q35")
    if kind != "q35" and not kind.startswith("pc-q35-"):
        raise VmmError(f"unsupported machine type: {kind!r} is not modelled, q35 is")
    for key in found:
        if key not in _MACHINE:
            raise VmmError(f"Property '{kind}-machine.{key}' not found")
    if not found.get("accel", "kvm").startswith("kvm"):
        raise VmmError(f"invalid accelerator {found['accel']}: only kvm is modelled")
    given.machine |= found


def _object(given: Given, text: str) -> None:
    found = keyval.split(text, "qom-type")
    kind, name = found.pop("qom-type", ""), found.pop("id", "")
    if not kind or not name:
        raise VmmError(f"Parameter '{'id' if kind else 'qom-type'}' is missing")
    if name in given.objects or name in given.backends:
        raise VmmError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    if kind in BACKENDS:
        if "size" not in found:
            raise VmmError("Parameter 'size' is missing")
        given.backends[name] = keyval.size("size", found["size"])
    elif kind in (SEV_GUEST, SNP_GUEST):
        given.objects[name] = _sev_object(kind, found)
    elif kind.startswith(("rng-", "iothread", "secret", "tls-", "filter-", "input-", "throttle-")):
        given.not_modelled.append(f"-object {kind},id={name}")
    else:
        raise VmmError(f"Parameter 'qom-type' does not accept value '{kind}'")


def _sev_object(kind: str, found: Mapping[str, str]) -> SevObject:
    values: dict[str, object] = {}
    for key, text in found.items():
        if key not in PROPERTIES or kind not in PROPERTIES[key].objects:
            raise VmmError(f"Parameter '{key}' is unexpected")
        values[PROPERTIES[key].field] = read_property(PROPERTIES[key], text)
    if "reduced_phys_bits" not in values:
        raise VmmError("Parameter 'reduced-phys-bits' is missing")
    policy = values.setdefault("policy", DEFAULT_POLICY if kind == SNP_GUEST else DEFAULT_LEGACY_POLICY)
    assert isinstance(policy, int)
    legacy = GuestKind.SEV_ES if policy & LEGACY_POLICY_ES else GuestKind.SEV
    values.setdefault("cbitpos", 0)
    return SevObject(kind=GuestKind.SNP if kind == SNP_GUEST else legacy, **values)  # type: ignore[arg-type]


def _memory(given: Given, text: str) -> None:
    found = keyval.split(text, "size")
    for key in found:
        if key not in ("size", "slots", "maxmem"):
            raise VmmError(f"Invalid parameter '{key}'")
    if "size" in found:
        given.memory = keyval.size("size", found["size"], "M")


def _smp(given: Given, text: str) -> None:
    found = keyval.split(text, "cpus")
    counts = {}
    for key, value in found.items():
        if key not in ("cpus", "maxcpus", *_SMP):
            raise VmmError(f"Parameter '{key}' is unexpected")
        if not value.isdecimal():
            raise VmmError(f"Parameter '{key}' expects integer")
        counts[key] = int(value)
    if 0 in counts.values():
        raise VmmError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    product = prod(counts.get(key, 1) for key in _SMP)
    given.vcpus = counts.get("cpus", counts.get("maxcpus", product))
    most = counts.get("maxcpus", given.vcpus)
    if given.vcpus > most:
        raise VmmError(f"Invalid CPU topology: maxcpus must be equal to or greater than smp: {most} < {given.vcpus}")
    if product > most or most % product:
        raise VmmError(f"Invalid CPU topology: product of the hierarchy must match maxcpus: {product} != {most}")


def _cpu(given: Given, text: str) -> None:
    model, *features = text.split(",")
    if model != "host" and model not in VCPU_TYPES:
        raise VmmError(f"unable to find CPU model '{model}'")
    given.cpu = model
    given.not_modelled += [f"-cpu {model}: {feature}" for feature in features]


def _drive(given: Given, text: str) -> None:
    found = keyval.split(text)
    if found.get("if") != "pflash" or found.get("unit", "0") != "0":
        given.not_modelled.append(f"-drive {text}")
        return
    if "file" not in found:
        raise VmmError("no file: the model's flash has one")
    given.firmware = found["file"]


def _word(name: str) -> Callable[[Given, str], None]:
    return lambda given, text: setattr(given, name, text)


def _bios(given: Given, text: str) -> None:
    given.firmware = given.firmware or text  # with flash, -bios is not looked at


READERS: Mapping[str, Callable[[Given, str], None]] = {
    "-machine": _machine,
    "-M": _machine,
    "-object": _object,
    "-cpu": _cpu,
    "-smp": _smp,
    "-m": _memory,
    "-bios": _bios,
    "-drive": _drive,
    "-kernel": _word("kernel"),
    "-initrd": _word("initrd"),
    "-append": _word("append"),
    "-accel": lambda given, text: _machine(given, f"accel={text.split(',')[0]}"),
}
