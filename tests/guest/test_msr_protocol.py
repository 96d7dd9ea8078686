"""The MSR protocol from the guest's side: the values that go out, what comes of answers, and which end the guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from snpbook.guest import msr_protocol
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.termination import Terminated
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import PageOperation
from tests.guest.bare import PLACE, Answer, Bare

Call = Callable[[GuestCpu], Any]
SEV_INFO = 2 << 48 | 1 << 32 | 51 << 24 | 0x001
NONE = 0xFFFFFFFFFFFFF
CALLS: dict[str, tuple[Call, int, int, Any]] = {
    "version": (msr_protocol.negotiate, 0x002, SEV_INFO, 2),
    "an older version": (msr_protocol.negotiate, 0x002, 1 << 48 | 1 << 32 | 51 << 24 | 1, 1),
    "a newer hypervisor": (msr_protocol.negotiate, 0x002, 9 << 48 | 1 << 32 | 51 << 24 | 1, 2),
    "features": (msr_protocol.features, 0x080, 0x63 << 12 | 0x081, 0x63),
    "preferred GPA": (msr_protocol.preferred_gpa, 0x010, 0x1234 << 12 | 0x011, 0x1234000),
    "no preferred GPA": (msr_protocol.preferred_gpa, 0x010, NONE << 12 | 0x011, None),
    "registration": (lambda cpu: msr_protocol.register(cpu, 0x7000), 0x7012, 0x7013, None),
    "private": (lambda cpu: msr_protocol.change_page(cpu, 0x123, PageOperation.PRIVATE),
                1 << 52 | 0x123 << 12 | 0x014, 0x015, None),
    "shared": (lambda cpu: msr_protocol.change_page(cpu, 0x123, PageOperation.SHARED),
               2 << 52 | 0x123 << 12 | 0x014, 0x015, None),
    "reset hold, started": (msr_protocol.ap_reset_hold, 0x006, 1 << 12 | 0x007, True),
    "reset hold, not started": (msr_protocol.ap_reset_hold, 0x006, 0x007, False),
    "run VMPL": (lambda cpu: msr_protocol.run_vmpl(cpu, 2), 2 << 32 | 0x016, 0x017, True),
    "run VMPL refused": (lambda cpu: msr_protocol.run_vmpl(cpu, 2), 2 << 32 | 0x016, 1 << 32 | 0x017, False),
    "run VMPL unknown": (lambda cpu: msr_protocol.run_vmpl(cpu, 2), 2 << 32 | 0x016, 2 << 32 | 0x016, False),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_request_and_answer(name: str) -> None:
    call, request, answer, result = CALLS[name]
    guest = Bare()
    assert guest.run(call, msr=lambda _: answer) == result
    assert guest.values == [request]


LIES: dict[str, tuple[Call, int, tuple[int, int]]] = {
    "version, another code": (msr_protocol.negotiate, SEV_INFO + 4, (0, 1)),
    "versions, none in common": (msr_protocol.negotiate, 5 << 48 | 3 << 32 | 1, (0, 1)),
    "version 0": (msr_protocol.negotiate, 1, (0, 1)),
    "no feature of SNP": (msr_protocol.features, 2 << 12 | 0x081, (0, 2)),
    "features, unanswered": (msr_protocol.features, 0x080, (0, 2)),
    "preferred GPA, unanswered": (msr_protocol.preferred_gpa, 0x010, (0, 0)),
    "another page registered": (lambda cpu: msr_protocol.register(cpu, 0x7000), 0x8013, (1, 0)),
    "registration refused": (lambda cpu: msr_protocol.register(cpu, 0x7000), NONE << 12 | 0x013, (1, 0)),
    "page not changed": (CALLS["private"][0], 1 << 63 | 0x015, (1, 1)),
    "page, bits that are none": (CALLS["private"][0], 1 << 12 | 0x015, (1, 1)),
    "page, unanswered": (CALLS["shared"][0], 2 << 52 | 0x123 << 12 | 0x014, (1, 1)),
    "reset hold, unanswered": (msr_protocol.ap_reset_hold, 0x006, (0, 0)),
}


@pytest.mark.parametrize("name", list(LIES))
def test_lies(name: str) -> None:
    call, answer, reason = LIES[name]
    guest = Bare()
    with pytest.raises(Terminated):
        guest.run(call, msr=lambda _: answer)
    assert guest.ended_with == reason


# Small events of the page.

EVENTS: dict[str, tuple[Callable[[Ghcb], Any], dict[str, int], Answer, Any]] = {
    "features": (Ghcb.features, {"code": 0x8000FFFD}, Answer({"info2": 3}), 3),
    "NMI complete": (Ghcb.nmi_complete, {"code": 0x80000003}, Answer(), None),
    "reset hold": (Ghcb.ap_reset_hold, {"code": 0x80000004}, Answer({"info2": 1}), True),
    "set jump table": (lambda ghcb: ghcb.set_jump_table(0x9000), {"code": 0x80000005, "info2": 0x9000}, Answer(), None),
    "get jump table": (Ghcb.jump_table, {"code": 0x80000005, "info1": 1}, Answer({"info2": 0x9000}), 0x9000),
    "run VMPL": (lambda ghcb: ghcb.run_vmpl(2), {"code": 0x80000018, "info1": 2}, Answer(), None),
}


@pytest.mark.parametrize("name", list(EVENTS))
def test_small_events(name: str) -> None:
    call, request, answer, result = EVENTS[name]
    guest = Bare()
    assert guest.run(lambda cpu: call(Ghcb(cpu, PLACE.ghcb)), answer) == result
    assert [each.fields for each in guest.requests] == [{"info1": 0, "info2": 0, **request}]
