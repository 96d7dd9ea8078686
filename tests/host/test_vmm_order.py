"""The VMM's calls in QEMU's order, typed by hand for each kind of guest and each era, and a trace of a real launch."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.host.vmm.guest import DirectBoot
from snpbook.spec.image import Image
from snpbook.system import System
from snpbook.trace import Event, Ioctl, SystemCall
from tests.attest.vectors import VECTORS, needs_vectors
from tests.machines import MIB

VCPU = ["CREATE_VCPU", "GET_VCPU_MMAP_SIZE", "GET_SUPPORTED_CPUID", "SET_CPUID2"]
REGISTERS = ["SET_SREGS", "SET_REGS"]
PINNED = ["REG_REGION", "SET_USER_MEMORY_REGION"]
PRIVATE = ["CREATE_GUEST_MEMFD", "SET_USER_MEMORY_REGION2"]
RESTRICTED = ["memfd_restricted", "ftruncate", "SET_USER_MEMORY_REGION"]
SECTIONS = 7
"""Of the sample image; with the image itself that makes eight ranges."""
SEV_END = ["LAUNCH_MEASURE", "LAUNCH_MEASURE", "LAUNCH_FINISH"]
ES_END = ["LAUNCH_UPDATE_VMSA", *SEV_END]
BEGIN = ["open /dev/kvm", "CREATE_VM"]
SEV_BEGIN = [*BEGIN, "open /dev/sev", "PLATFORM_STATUS"]
BOTH_CAPS = ["ENABLE_CAP 240", "ENABLE_CAP 201"]

ORDERS = {
    ("mainline", "plain"): [*BEGIN, *2 * ["SET_USER_MEMORY_REGION"], *2 * VCPU, *2 * REGISTERS],
    ("mainline", "sev"): [
        *SEV_BEGIN, "INIT2", "LAUNCH_START", *2 * PINNED, *2 * VCPU, "LAUNCH_UPDATE_DATA", *2 * REGISTERS, *SEV_END,
    ],
    ("mainline", "sev-es"): [
        *SEV_BEGIN, "INIT2", "LAUNCH_START", *2 * PINNED, *2 * VCPU, "LAUNCH_UPDATE_DATA", *2 * REGISTERS, *ES_END,
    ],
    ("mainline", "snp"): [
        *SEV_BEGIN, "INIT2", "ENABLE_CAP 201", "SNP_LAUNCH_START", *2 * PRIVATE, *2 * VCPU, *2 * REGISTERS,
        "GET_CPUID2", *(SECTIONS + 1) * ["SET_MEMORY_ATTRIBUTES", "SNP_LAUNCH_UPDATE"], "SNP_LAUNCH_FINISH",
    ],
    ("rfc-v7", "sev"): [
        *SEV_BEGIN, "INIT", *BOTH_CAPS, "LAUNCH_START", *2 * RESTRICTED, *2 * VCPU,
        *2 * ["SET_MEMORY_ATTRIBUTES"], "LAUNCH_UPDATE_DATA",
        *2 * REGISTERS, *SEV_END,
    ],
    ("rfc-v7", "sev-es"): [
        *SEV_BEGIN, "ES_INIT", *BOTH_CAPS, "LAUNCH_START", *2 * RESTRICTED, *2 * VCPU,
        *2 * ["SET_MEMORY_ATTRIBUTES"], "LAUNCH_UPDATE_DATA",
        *2 * REGISTERS, *ES_END,
    ],
    ("rfc-v7", "snp"): [
        *SEV_BEGIN, "SNP_INIT", *BOTH_CAPS, "SNP_LAUNCH_START", *2 * RESTRICTED, *2 * VCPU, *2 * REGISTERS,
        "GET_CPUID2", *(SECTIONS + 1) * ["SNP_LAUNCH_UPDATE"], "SNP_LAUNCH_FINISH",
    ],
}  # fmt: skip


def host(era: str = "mainline", installed: int = 128 * MIB) -> System:
    system = System("milan", "vmm", installed=installed)
    system.host.boot(era)
    return system


def word(event: Event) -> str | None:
    """An event as the lists above name it; mmap, which any program does, is left out."""
    match event:
        case Ioctl(name="KVM_MEMORY_ENCRYPT_OP"):
            return str(event.arguments["id"])
        case Ioctl(name="SEV_ISSUE_CMD"):
            return str(event.arguments["cmd"])
        case Ioctl(name="KVM_ENABLE_CAP"):
            return f"ENABLE_CAP {int(event.arguments['cap'])}"
        case Ioctl():
            return event.name.removeprefix("KVM_").removeprefix("MEMORY_ENCRYPT_")
        case SystemCall(name="open"):
            return f"open {event.arguments['path']}"
        case SystemCall() if event.name != "mmap":
            return event.name
    return None


def calls(events: list[Event]) -> list[str]:
    return [name for event in events if (name := word(event)) is not None]


@pytest.mark.parametrize(("era", "kind"), ORDERS)
def test_the_order_of_calls(era: str, kind: str) -> None:
    system = host(era)
    log = system.record()
    system.create_vm(kind=kind, memory="12 MiB", vcpus=2).launch()
    assert calls(log.events) == ORDERS[era, kind]


def test_the_old_calls_on_a_new_kernel() -> None:
    for kind, call in (("sev", "INIT"), ("sev-es", "ES_INIT")):
        system = host()
        log = system.record()
        guest = system.create_vm(kind=kind, memory="12 MiB", legacy_vm_type=True)
        assert [name for name in calls(log.events) if "INIT" in name] == [call]
        assert guest.vmm.vm.type == 0


def test_series_v7_without_private_memory_pins() -> None:
    system = host("rfc-v7")
    log = system.record()
    system.create_vm(kind="sev", memory="12 MiB", upm_mode=False).launch()
    found = calls(log.events)
    assert found[4:8] == ["INIT", "LAUNCH_START", *PINNED]
    assert "memfd_restricted" not in found


def test_kernel_hashes_follow_the_image() -> None:
    system = host()
    log = system.record()
    system.create_vm(kind="sev", memory="12 MiB", boot=DirectBoot(b"kernel")).launch()
    assert calls(log.events).count("LAUNCH_UPDATE_DATA") == 2


@needs_vectors
def test_the_ranges_of_an_observed_launch() -> None:
    """SNP_LAUNCH_UPDATE as a user's QEMU traced it, with an AmdSev build of 4 MiB; addresses and sizes are his."""
    observed = [
        (1, 0xFFC00000, 0x400000), (3, 0x800000, 0x9000), (3, 0x80A000, 0x3000), (5, 0x80D000, 0x1000),
        (6, 0x80E000, 0x1000), (3, 0x80F000, 0x1000), (1, 0x810000, 0x1000), (3, 0x811000, 0xF000),
    ]  # fmt: skip
    suffix = (VECTORS / "launch" / "ovmf_AmdSev_suffix.bin").read_bytes()
    system = host()
    guest = system.create_vm(image=Image.parse(suffix.rjust(0x400000, b"\0")), memory="16 MiB", boot=DirectBoot(b"k"))
    seen: list[tuple[int, int, int]] = []
    honest = guest.vmm.sev

    def spy(op: Any, **fields: Any) -> Any:
        if op.name == "SNP_LAUNCH_UPDATE":
            seen.append((int(fields["type"]), fields["gfn_start"] << 12, fields["len"]))
        return honest(op, **fields)

    guest.vmm.sev = spy  # type: ignore[method-assign]
    guest.launch()
    assert seen == observed
