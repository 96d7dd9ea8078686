"""A QEMU command line taken apart: each part of each option, what it means, and which call of the launch it becomes."""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.host.vmm import keyval
from snpbook.host.vmm.command_line import Part, parts
from snpbook.host.vmm.options import BACKENDS, NOT_MODELLED
from snpbook.host.vmm.properties import PROPERTIES
from snpbook.views.static import Static
from snpbook.views.tables import table

_IMPLIED = {"-machine": "type", "-object": "qom-type", "-m": "size", "-smp": "cpus"}
_PLAIN = frozenset({"-cpu", "-bios", "-kernel", "-initrd", "-append", "-S", "-enable-kvm"})
_MEANING: Mapping[tuple[str, str], tuple[str, str]] = {
    ("-machine", "type"): ("the board: devices, and where memory lies", "KVM_CREATE_VM"),
    ("-machine", "accel"): ("the guest runs on the processor itself", "open /dev/kvm"),
    ("-machine", "confidential-guest-support"): ("the object that makes the guest confidential", "the type of VM"),
    ("-machine", "memory-backend"): ("the object that is the guest's memory", "the memory slots"),
    ("-machine", "vmport"): ("a port of another hypervisor's", ""),
    ("-object", "qom-type"): ("what kind of object", ""),
    ("-object", "id"): ("its name, by which other options find it", ""),
    ("memory", "size"): ("how much memory: as much as -m says", "mmap, KVM_CREATE_GUEST_MEMFD"),
    ("memory", "share"): ("the shared side may be shared with other processes", ""),
    ("memory", "prealloc"): ("whether all of the shared side is allocated at once", ""),
    ("-m", "size"): ("memory of the guest", "KVM_SET_USER_MEMORY_REGION2"),
    ("-smp", "cpus"): ("processors: each has a VMSA, and each is measured", "KVM_CREATE_VCPU"),
    ("-cpu", ""): ("the model: its signature is in every VMSA", "KVM_SET_CPUID2"),
    ("-bios", ""): ("the firmware image, measured page by page", "SNP_LAUNCH_UPDATE"),
    ("-drive", "file"): ("the firmware image, measured page by page", "SNP_LAUNCH_UPDATE"),
    ("-kernel", ""): ("the kernel, in the hands of the host", "its hash, if kernel-hashes=on"),
    ("-initrd", ""): ("its first file system", "its hash, if kernel-hashes=on"),
    ("-append", ""): ("its command line", "its hash, if kernel-hashes=on"),
    ("-S", ""): ("wait before the first instruction", ""),
    ("-enable-kvm", ""): ("the guest runs on the processor itself", "open /dev/kvm"),
}
_CALLS = {
    "sev-device": "open /dev/sev", "cbitpos": "compared with the host's CPUID", "reduced-phys-bits": "checked, CPUID",
    "kernel-hashes": "a NORMAL page in place of a ZERO page", "policy": "LAUNCH_START", "handle": "LAUNCH_START",
    "dh-cert-file": "LAUNCH_START", "session-file": "LAUNCH_START", "legacy-vm-type": "KVM_CREATE_VM, INIT",
    "guest-visible-workarounds": "SNP_LAUNCH_START", "id-block": "SNP_LAUNCH_FINISH", "id-auth": "SNP_LAUNCH_FINISH",
    "author-key-enabled": "SNP_LAUNCH_FINISH", "host-data": "SNP_LAUNCH_FINISH", "vcek-disabled": "SNP_LAUNCH_FINISH",
    "debug-swap": "INIT2", "discard": "madvise, fallocate at conversions", "upm-mode": "memfd_restricted",
    "init-flags": "SNP_INIT",
}  # fmt: skip


def taken_apart(text: str) -> Static:
    """One row for each part of each option. `VmmError` for a line that is none."""
    rows = [row for part in parts(text) for row in _rows(part)]
    head = ["option", "part", "value", "meaning", "becomes"]
    return table("The command line, part by part", head, rows, mono=["part", "value"])


def _rows(part: Part) -> list[tuple[str, str, str, str, str]]:
    if part.name in NOT_MODELLED:
        return [(part.name, "", part.argument, "a device: not part of the model", "")]
    if part.name in _PLAIN:
        return [(part.name, "", part.argument, *_MEANING[part.name, ""])]
    values = keyval.split(part.argument, _IMPLIED.get(part.name, ""))
    kind = values.get("qom-type", "")
    return [(part.name, key, value, *_meaning(part.name, kind, key)) for key, value in values.items()]


def _meaning(option: str, kind: str, key: str) -> tuple[str, str]:
    if option == "-object" and key in PROPERTIES:
        return PROPERTIES[key].meaning, _CALLS[key]
    where = "memory" if kind in BACKENDS and ("memory", key) in _MEANING else option
    return _MEANING.get((where, key), ("", ""))
