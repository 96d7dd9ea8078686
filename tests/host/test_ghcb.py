"""Events through the GHCB page: what makes one malformed, what comes back with every answer, and the small events.

Accesses to ports and MMIO, page state changes, guest requests and AP creation have files of their own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.hardware.host_instructions import NewState
from tests.host.askers import (
    AP_HOLD,
    BITMAP,
    CODE,
    INFO1,
    INFO2,
    PAGE,
    RAX,
    RBX,
    RCX,
    RDX,
    SCRATCH,
    SYSTEM_EVENT,
    Asker,
    EsAsker,
    Stopped,
    fails,
    ghcb,
    infos,
    marked,
    sev_es,
    snp,
    u64,
)

FEATURES, RSP, INVALID_GUEST = 0x8000FFFD, 0x1D8, 0x10
GUESTS = pytest.mark.parametrize("guest", [snp, sev_es])
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
Get = Callable[[str], Asker | EsAsker]

# Registration.


def test_an_unregistered_ghcb_ends_kvm_run() -> None:
    asker = snp()
    for registered in (-1, (asker.ghcb >> 12) + 1):
        asker.restored()
        asker.vcpu.ghcb_registered = registered
        with fails(errno.EINVAL):
            asker.event(FEATURES)


def test_a_sev_es_guest_registers_nothing() -> None:
    asker = sev_es()
    asker.vcpu.ghcb_registered = -1
    assert infos(asker.event(FEATURES)) == (0, 3)


def test_a_ghcb_outside_of_memory() -> None:
    """Later kernels let the guest go on; the v7 series ends KVM_RUN."""
    asker, away = snp(), 1 << 40
    assert asker.msr(away) == away
    old = snp("rfc-v7")
    with fails(errno.EFAULT):
        old.msr(away)


def test_a_ghcb_that_is_an_assigned_page() -> None:
    """The v7 series looks at the RMP before it maps a GHCB."""
    asker = snp("rfc-v7")
    slot = asker.vm.slots.of(asker.ghcb >> 12)
    gfns = range(asker.ghcb >> 12, (asker.ghcb >> 12) + 1)
    frame = int(slot.shared_frames(asker.vm.process.space, gfns)[0])
    page, cpu = range(frame, frame + 1), asker.kernel.cpu
    cpu.rmpupdate(page, range(1), NewState(assigned=True, asid=77))
    try:
        with fails(errno.EBUSY):
            asker.msr(asker.ghcb)
    finally:
        cpu.rmpupdate(page, range(1), NewState(assigned=False))


# Malformed GHCBs: SW_EXITINFO1 2, the error in SW_EXITINFO2.

GOOD = {CODE: FEATURES, INFO1: 0, INFO2: 0}


def event(code: int, info1: int = 0, info2: int = 0, **more: int) -> dict[int, int]:
    return {CODE: code, INFO1: info1, INFO2: info2, **{int(key[1:]): value for key, value in more.items()}}


def io(size: int = 1, *, is_in: bool = False, string: bool = False) -> int:
    return 0x80 << 16 | 1 << {1: 4, 2: 5, 4: 6}[size] | string << 2 | is_in


MALFORMED: dict[str, tuple[dict[str, Any], int]] = {
    "usage": ({"fields": GOOD, "usage": 1}, 2),
    "no code": ({"fields": GOOD, "valid": [INFO1, INFO2]}, 4),
    "no info 1": ({"fields": GOOD, "valid": [CODE, INFO2]}, 4),
    "no info 2": ({"fields": GOOD, "valid": [CODE, INFO1]}, 4),
    "usage first": ({"fields": GOOD, "usage": 1, "valid": []}, 2),
    "unknown event": ({"fields": event(0x12345)}, 6),
    "an intercept that is no event": ({"fields": event(0x78)}, 6),
    "missing before unknown": ({"fields": event(0x12345), "valid": [CODE]}, 4),
    "DR7 without RAX": ({"fields": event(0x37)}, 4),
    "RDPMC without RCX": ({"fields": event(0x6F)}, 4),
    "CPUID without RAX": ({"fields": {**event(0x72), RCX: 0}}, 4),
    "CPUID without RCX": ({"fields": {**event(0x72), RAX: 0}}, 4),
    "CPUID D without XCR0": ({"fields": {**event(0x72), RAX: 0xD, RCX: 0}}, 4),
    "OUT without RAX": ({"fields": event(0x7B, io())}, 4),
    "string without scratch": ({"fields": event(0x7B, io(is_in=True, string=True))}, 4),
    "a port access of no size": ({"fields": event(0x7B, 0x80 << 16 | 1)}, 5),
    "a port access of two sizes": ({"fields": event(0x7B, io(1, is_in=True) | 1 << 5)}, 5),
    "RDMSR without RCX": ({"fields": event(0x7C)}, 4),
    "WRMSR without RAX": ({"fields": {**event(0x7C, 1), RCX: 0, RDX: 0}}, 4),
    "WRMSR without RDX": ({"fields": {**event(0x7C, 1), RCX: 0, RAX: 0}}, 4),
    "VMMCALL without RAX": ({"fields": {**event(0x81), 0xC8: 0}}, 4),
    "VMMCALL without CPL": ({"fields": {**event(0x81), RAX: 0}}, 4),
    "MONITOR without RDX": ({"fields": {**event(0x8A), RAX: 0, RCX: 0}}, 4),
    "MWAIT without RCX": ({"fields": {**event(0x8B), RAX: 0}}, 4),
    "MMIO read without scratch": ({"fields": event(0x80000001, 0, 4)}, 4),
    "MMIO write without scratch": ({"fields": event(0x80000002, 0, 4)}, 4),
    "page state change without scratch": ({"fields": event(0x80000010)}, 4),
    "AP creation without RAX": ({"fields": event(0x80000013, 1)}, 4),
    "request that is no page": ({"fields": event(0x80000011, 0x1001, 0x3000)}, 4),
    "response that is no page": ({"fields": event(0x80000012, 0x2000, 0x3008)}, 4),
    "request into itself": ({"fields": event(0x80000011, 0x2000, 0x2000)}, 4),
    "jump table request": ({"fields": event(0x80000005, 2)}, 5),
    "run VMPL": ({"fields": event(0x80000018)}, 6),
    "doorbell": ({"fields": event(0x80000014)}, 6),
    "APIC IDs": ({"fields": {**event(0x80000017), RAX: 1}}, 6),
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed(name: str) -> None:
    arguments, error = MALFORMED[name]
    assert infos(snp().page(ghcb(**arguments))) == (2, error)


@pytest.mark.parametrize("code", [0x80000010, 0x80000011, 0x80000012, 0x80000013])
def test_what_is_for_snp_guests_is_refused_others(code: int) -> None:
    fields = {**event(code, 0x2000, 0x3000), SCRATCH: sev_es().ghcb + 0x800, RAX: 0, RBX: 0}
    assert infos(sev_es().page(ghcb(fields))) == (2, 4)


@pytest.mark.parametrize("code", [0x80000011, 0x80000012])
def test_a_guest_request_of_another_guest_in_the_v7_series(code: int) -> None:
    fields = {**event(code, 0x2000, 0x3000), RAX: 0, RBX: 0}
    assert infos(sev_es("rfc-v7").page(ghcb(fields))) == (0, INVALID_GUEST)


# What comes back.


@GUESTS
@ERAS
def test_features_and_the_bitmap_of_an_answer(guest: Get, era: str) -> None:
    answer = guest(era).page(ghcb({**GOOD, RSP: 7}))
    assert infos(answer) == (0, 3)
    assert marked(answer) == sorted([INFO1, INFO2, RAX, RBX, RCX, RDX])


def test_registers_are_those_that_the_guest_marks() -> None:
    """What the bitmap does not mark counts as zero, and comes back as zero."""
    asker = snp()
    asker.event(FEATURES, rax=0x55, rbx=0x66, rcx=0x77)
    fields = {**GOOD, RAX: 0x11, RBX: 0x22, RCX: 0x33, RDX: 0x44}
    answer = asker.page(ghcb(fields, valid=[CODE, INFO1, INFO2, RAX, RDX]))
    assert [u64(answer, offset) for offset in (RAX, RBX, RCX, RDX)] == [0x11, 0, 0, 0x44]


def test_a_malformed_request_gets_its_registers_back_too() -> None:
    answer = snp().page(ghcb({**event(0x12345), RAX: 5}))
    assert u64(answer, RAX) == 5
    assert marked(answer) == sorted([INFO1, INFO2, RAX, RBX, RCX, RDX])


def test_the_bitmap_is_clear_while_the_vmm_has_the_exit() -> None:
    asker = snp()
    seen: list[list[int]] = []

    def serve(reason: int) -> None:
        page = asker.vmm.read(asker.ghcb, PAGE)
        seen.append(marked(page))
        assert page[BITMAP : BITMAP + 16] != bytes(16)

    asker.event(0x7B, 0x80 << 16 | 1 << 4, serve=serve, rax=1)
    assert seen == [[INFO1, INFO2]]


# Small events.


@GUESTS
def test_nmi_complete(guest: Get) -> None:
    assert infos(guest("mainline").event(0x80000003)) == (0, 0)


@GUESTS
def test_ap_jump_table(guest: Get) -> None:
    asker = guest("mainline")
    assert infos(asker.event(0x80000005, 0, 0x9F000)) == (0, 0)
    assert infos(asker.event(0x80000005, 1)) == (0, 0x9F000)


@GUESTS
@pytest.mark.parametrize(("state", "result"), [(4, 1), (0, 0)])
def test_ap_reset_hold(guest: Get, state: int, result: int) -> None:
    asker = guest("mainline")

    def serve(reason: int) -> None:
        assert reason == AP_HOLD
        with fails(errno.EAGAIN):
            asker.enter()
        asker.vmm.process.ioctl(asker.vmm.handles[0].fd, 0x4004AE99, bytearray(state.to_bytes(4, "little")))

    assert infos(asker.event(0x80000004, serve=serve)) == (0, result)


@GUESTS
@ERAS
def test_termination(guest: Get, era: str) -> None:
    asker = guest(era)
    with pytest.raises(Stopped) as caught:
        asker.event(0x8000FFFE, 0x21, 0x5)
    assert caught.value.reason == SYSTEM_EVENT
    assert asker.exit("<IIQ") == (6, 1, asker.ghcb)
    assert asker.kernel.log.lines[-1] == "SEV-ES guest requested termination: reason 0x21 info 0x5"


@GUESTS
def test_an_unsupported_event_ends_kvm_run(guest: Get) -> None:
    with fails(errno.EINVAL):
        guest("mainline").event(0x8000FFFF, 0x404)
