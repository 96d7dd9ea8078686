"""A guest that stops before its program is at an end: it says why, goes on when it is let, and is never stuck."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from snpbook.guest.attestation import derive_key, request_report
from snpbook.guest.layout import Layout
from snpbook.guest.messages import RequestFailed
from snpbook.guest.termination import Terminated, terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.vmm.configuration import VmmError
from snpbook.spec.termination import Reason, ended
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import GuestStopped
from tests.guest.booted import fresh
from tests.machines import booted


async def well(cpu: GuestCpu) -> str:
    await cpu.pause()
    return "well"


async def giving_up(cpu: GuestCpu) -> None:
    await terminate(cpu, Reason.PSC, "for a test")


async def waiting(cpu: GuestCpu) -> str:
    await cpu.hlt()
    return await well(cpu)


async def failing(cpu: GuestCpu) -> None:
    await cpu.read(1 << 40, 1)


def test_one_that_waits_goes_on() -> None:
    guest = fresh()
    with pytest.raises(GuestStopped) as stopped:
        guest.run(waiting)
    assert (stopped.value.exit, stopped.value.why) == (Exit.HLT, "")
    with pytest.raises(VmmError, match="in the middle of a program"):
        guest.run(well)
    assert guest.go_on() == "well"
    assert guest.go_on() == "well", "it has halted"
    assert guest.run(well) == "well"


@pytest.mark.parametrize("kind", ["sev-es", "snp"])
def test_one_that_asks_to_be_ended_says_why_and_halts(kind: str) -> None:
    guest = fresh(kind=kind)
    with pytest.raises(GuestStopped, match=r"SYSTEM_EVENT, reason 1:1 \(PSC\)"):
        guest.run(giving_up)
    with pytest.raises(Terminated, match="for a test"):
        guest.go_on()
    assert guest.run(well) == "well"


def test_one_that_falls_over_can_run_another_program() -> None:
    guest = fresh()
    with pytest.raises(GuestStopped, match="SHUTDOWN"):
        guest.run(failing)
    assert guest.run(well) == "well"


@pytest.mark.parametrize(
    ("value", "says"),
    [(0x100, "0:0 (GENERAL)"), (0x2_0100, "0:2 (SNP_FEATURES)"), (0x3_1100, "1:3 (NOT_VMPL0)"),
     (0xFF_1100, "1:255 (unknown)"), (0x2_7100, "7:2 (unknown)"), (0x9000, "by its GHCB")],
)  # fmt: skip
def test_reasons(value: int, says: str) -> None:
    assert ended(value).removeprefix("reason ") == says


# What has no launch, and what has no firmware.


@pytest.mark.parametrize("kind", ["sev", "sev-es", "snp"])
def test_kvm_run_before_the_launch(kind: str) -> None:
    guest = booted(era="mainline").create_vm(memory="12 MiB", kind=kind)
    with pytest.raises(OSError, match="whose launch is finished"):
        guest.vmm.run()


@pytest.mark.parametrize("kind", ["plain", "sev", "sev-es"])
def test_only_snp_guests_get_reports_and_keys(kind: str) -> None:
    guest = fresh(kind=kind)
    with pytest.raises(VmmError, match="only SNP guests get reports"):
        guest.request_report(b"")
    place = Layout.of(guest.vmm.image)
    programs: tuple[Any, ...] = (lambda cpu: request_report(cpu, place, bytes(64)), lambda cpu: derive_key(cpu, place))
    for program in programs:
        with pytest.raises(RequestFailed, match="SEV-SNP active") as refused:
            guest.run(program)
        assert refused.value.errno == errno.ENODEV
