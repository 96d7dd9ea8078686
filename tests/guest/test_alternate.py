"""Alternate injection: VMPL0 gives a VMPL below it events in that one's save area, and the host gives it none."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.guest import alternate
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.ports import HostCpu
from snpbook.spec.msr import Msr
from tests.host.askers import CODE, INFO1, INFO2, RAX, Asker, ghcb, infos
from tests.host.test_ap_creation import VMSA_GPA, save_area
from tests.machines import PAGE

VALID = 1 << 31


@pytest.fixture
def two_levels() -> Asker:
    return Asker("svsm-host")


def lower(asker: Asker, prepare: Any) -> Any:
    """VMPL0 makes a save area of VMPL2 with alternate injection, prepares it, has it run: events as VMPL2 met them."""

    async def program(cpu: GuestCpu) -> Any:
        met: list[tuple[int, int, int]] = []

        async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
            (vmpl,) = await cpu.look("vmpl")
            met.append((vmpl, exception.vector, exception.error))
            return True

        for vector in (0x41, 0x42, 13):
            cpu.set_handler(vector, handler)
        await save_area(cpu, vmpl=2, sev_features=1 | 1 << 4, rflags=0x202)
        prepared = await prepare(cpu)
        await cpu.write(asker.ghcb, ghcb({CODE: 0x80000013, INFO1: 2 << 16, INFO2: VMSA_GPA, RAX: 1 | 1 << 4}))
        await cpu.wrmsr(Msr.GHCB, asker.ghcb)
        await cpu.vmgexit()
        assert infos(await cpu.read(asker.ghcb, PAGE)) == (0, 0)
        await cpu.wrmsr(Msr.GHCB, 2 << 32 | 0x016)
        await cpu.vmgexit()
        await cpu.look("vmpl")
        return prepared, met, await cpu.look("vmpl")

    return asker.drive(program)


def test_vmpl0_injects_an_interrupt_and_an_exception(two_levels: Asker) -> None:
    async def interrupt(cpu: GuestCpu) -> list[bool]:
        return [await alternate.interrupt(cpu, VMSA_GPA, vector) for vector in (0x41, 0x42)]

    async def exception(cpu: GuestCpu) -> list[bool]:
        return [await alternate.exception(cpu, VMSA_GPA, 13, error) for error in (0x5678, 9)]

    assert lower(two_levels, interrupt) == ([True, False], [(2, 0x41, 0)], (2,))
    assert lower(Asker("svsm-host"), exception) == ([True, False], [(2, 13, 0x5678)], (2,))


def test_what_the_host_injects_there_is_dropped(two_levels: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = two_levels.vcpu

    async def nothing(cpu: GuestCpu) -> None:
        vcpu.set_control("event_injection", 0)

    honest = HostCpu.vmrun

    def vmrun(cpu: HostCpu, *arguments: Any) -> Any:
        if vcpu.vmpl == 2:
            vcpu.set_control("event_injection", VALID | 0x41)
        return honest(cpu, *arguments)

    monkeypatch.setattr(HostCpu, "vmrun", vmrun)
    assert lower(two_levels, nothing) == (None, [], (2,))


def test_a_save_area_without_it_is_not_injected_into(two_levels: Asker) -> None:
    async def program(cpu: GuestCpu) -> None:
        await save_area(cpu, vmpl=2)
        await alternate.interrupt(cpu, VMSA_GPA, 0x41)

    with pytest.raises(ValueError, match="no alternate injection"):
        two_levels.drive(program)
