"""A host, or another processor of the guest, against guest and SVSM: what it withholds, repeats, changes meanwhile."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest.boot import Kernel
from snpbook.guest.calling_area import CallingArea
from snpbook.guest.layout import Layout
from snpbook.guest.svsm import core_protocol, validation
from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import HYPERVISOR
from snpbook.hardware.ports import HostCpu
from snpbook.spec.ghcb import MsrCode, Nae
from snpbook.spec.svsm import Protocol
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import Guest
from tests.guest.svsm_world import (
    ADDRESS,
    AREA,
    CODE,
    CORE,
    CPUID,
    FIRST_VMSA,
    OK,
    PVALIDATE,
    SECRETS,
    SPARE,
    STATE,
    TABLES,
    VALIDATE,
    call,
    calls,
    ended,
    enter,
    frame,
    fresh,
    give_page,
    pvalidate,
    rights,
    run,
)  # fmt: skip
from tests.guest.test_svsm_core import CAA, VMSA, create, vmsa
from tests.machines import PAGE, booted, launched, poke_private, private_bytes

RUN_VMPL0 = 0x016


def stops(guest: Guest, body: Callable[[GuestCpu], Any], vcpu: int = 0) -> tuple[int, int]:
    """Run to a termination request: its reason."""
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        run(guest, body, vcpu)
    return ended(guest, vcpu)


# The host does not run the SVSM.


def answering(value: int) -> Callable[[Moment], None]:
    """A host that answers run VMPL by itself."""

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.code is MsrCode.RUN_VMPL_REQUEST and moment.value == RUN_VMPL0:
            moment.keep()
            moment.answer_msr(value)

    return host


async def ask(cpu: GuestCpu) -> Any:
    return await CallingArea(cpu, AREA, 2).ask(Protocol.CORE, 6, 1)


@pytest.mark.parametrize("answer", [0x017, 1 << 32 | 0x017, 0x016, 0x000, 0x081])
def test_a_call_that_nobody_serves(answer: int) -> None:
    """`call_pending` stays 1: whatever the registers hold, the guest ends."""
    guest = fresh()
    tamper(guest, answering(answer))
    assert stops(guest, ask) == (0, 0)


@pytest.mark.parametrize("answer", [1 << 32 | 0x017, 0x081])
def test_a_served_call_with_another_answer(answer: int) -> None:
    """The SVSM was run, and the host says that it was not: not believed either."""
    guest = fresh()

    def host(moment: Moment) -> None:
        if moment.stage is Stage.ENTRY and moment.vcpu.vmpl == 2:
            moment.answer_msr(answer)

    tamper(guest, host)
    assert stops(guest, ask) == (0, 0)


def test_the_host_serves_later() -> None:
    """Twice not, then it does: the guest has ended by then, and does not go on."""
    guest = fresh()
    tamper(guest, answering(0x017))
    assert stops(guest, ask) == (0, 0)
    guest.system.host.cpu = HostCpu(guest.system.machine)
    with pytest.raises(Terminated):
        guest.go_on()


def test_a_replayed_answer() -> None:
    """The host keeps the SVSM's page of an earlier answer and does not run it again: the old registers do not count."""
    guest, served = fresh(), []

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.code is MsrCode.RUN_VMPL_REQUEST and moment.value == RUN_VMPL0:
            served.append(moment)
            if len(served) > 1:
                moment.keep()
                moment.answer_msr(0x017)

    async def body(cpu: GuestCpu) -> None:
        area = CallingArea(cpu, AREA, 2)
        await area.ask(Protocol.CORE, 6, 1)
        await area.ask(Protocol.CORE, PVALIDATE, SECRETS)

    tamper(guest, host)
    assert stops(guest, body) == (0, 0)


# The host runs the SVSM when nobody has called.


def test_an_svsm_that_is_run_unasked_does_nothing() -> None:
    guest = fresh()

    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(AREA + 8, struct.pack("<HHIQ", 1, 0, 0, SPARE * PAGE))
        found = [await enter(cpu, PVALIDATE, AREA + 8) for _ in range(3)]
        return found, await cpu.read(AREA + 8, 4)

    found, told = run(guest, body)
    assert found == [(PVALIDATE, AREA + 8, 0, 0)] * 3
    assert told == struct.pack("<HH", 1, 0)
    assert rights(guest, SPARE * PAGE) == ([0xF, 0, 0xF, 0], False, True)


def test_the_svsm_is_started_once() -> None:
    """The second vCPU enters at the measured entry point, as the first did: it must not make everything anew."""
    guest = fresh()
    guest.vmm.vcpus[1].queued.clear()
    before = private_bytes(guest, STATE + 32, 32)
    assert guest.vmm.run(1) is Exit.SYSTEM_EVENT
    assert ended(guest, 1) == (0, 0)
    assert private_bytes(guest, STATE + 32, 32) == before
    assert calls(guest, (CORE, 6, 1)) == [OK], "the first goes on"


@pytest.mark.parametrize("ids", [[], [0, 0], [1, 2], [*range(65)]])
def test_processors_that_the_host_makes_up(ids: list[int]) -> None:
    """None, one twice, not the own one, more than there is room for: the SVSM does not begin."""
    guest = launched(booted(era="svsm-host"), memory="12 MiB", svsm=True)

    def host(moment: Moment) -> None:
        if moment.stage is Stage.ENTRY and moment.event is Nae.APIC_ID_LIST:
            assert moment.page is not None
            moment.write(moment.page.sw_exit_info_1, struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))

    tamper(guest, host)
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        guest.boot()
    assert ended(guest) == (0, 0)


def test_ram_that_the_host_makes_up() -> None:
    """A clock that says "4 GiB below 4 GiB": the SVSM's own memory does not become the guest's by that."""
    guest = fresh()
    poke_private(guest, STATE + 8, (1 << 20).to_bytes(8, "little"))
    own = (TABLES, SECRETS, CPUID, STATE, FIRST_VMSA, CODE)
    before = [rights(guest, page) for page in own]

    async def body(cpu: GuestCpu) -> list[Any]:
        found = [await pvalidate(cpu, page | flag) for page in own for flag in (0, VALIDATE)]
        found += [await pvalidate(cpu, 0xFEE00000 | 1 | VALIDATE)]
        return [
            *found,
            (await call(cpu, CORE, 0, STATE))[0],
            await create(cpu, at=STATE),
            await create(cpu, area=STATE),
        ]

    assert run(guest, body) == [(ADDRESS, 0)] * 13 + [ADDRESS] * 3
    assert [rights(guest, page) for page in own] == before


# Pages under it.


def test_a_page_of_the_svsm_that_the_host_takes_away() -> None:
    """The SVSM meets another page there, which it has not validated: it ends, and the guest does not go on."""
    guest = fresh()

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.value == RUN_VMPL0 and not moment.kept:
            moment.fresh(STATE + PAGE)

    tamper(guest, host)
    assert stops(guest, ask) == (0, 0)


def test_validation_meets_a_page_that_is_not_the_guests() -> None:
    """The host has taken the page back: it gets a fault, not the guest's data, and serves it with a new page."""
    guest = fresh()

    async def take(cpu: GuestCpu) -> Any:
        await cpu.write(SPARE * PAGE, b"old")
        return await pvalidate(cpu, SPARE * PAGE)

    async def give(cpu: GuestCpu) -> Any:
        return await pvalidate(cpu, SPARE * PAGE | VALIDATE), await cpu.read(SPARE * PAGE, 3)

    run(guest, take)
    pages = range(frame(guest, SPARE * PAGE), frame(guest, SPARE * PAGE) + 1)
    guest.system.host.cpu.rmpupdate(pages, np.zeros(1, np.uint64), HYPERVISOR)
    give_page(guest.vmm.vm, pages.start, SPARE)
    assert run(guest, give) == ((OK, 1), bytes(3))


def test_the_guest_notices_pages_that_change_under_it() -> None:
    """A page behind a validated address, validated by nobody: 0x404, and no second validation by the guest."""
    guest = fresh()

    async def body(cpu: GuestCpu) -> int:
        await cpu.write(SPARE * PAGE, b"mine")
        await cpu.vmgexit()
        cpu.set_handler(29, None)
        try:
            await cpu.read(SPARE * PAGE, 4)
        except GuestException as fault:
            return fault.error
        return 0

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.vcpu.vmpl == 2 and moment.value & 0xFFF != 0x100:
            moment.fresh(SPARE * PAGE)

    tamper(guest, host)
    assert run(guest, body) == 0x404


# Races: another processor of the guest writes between check and use.


def test_a_list_that_changes_while_it_is_worked_on() -> None:
    """At the fault for the first page the second entry becomes the SVSM's state: the copy counts."""
    guest, faults = fresh(), list[Npf]()
    first, second = SPARE * PAGE, (SPARE + 4) * PAGE

    async def take(cpu: GuestCpu) -> Any:
        return await pvalidate(cpu, first, second)

    async def give(cpu: GuestCpu) -> Any:
        raw = struct.pack("<HHIQQ", 2, 0, 0, first | VALIDATE, second | VALIDATE)
        await cpu.write(AREA + 8, raw)
        return (await call(cpu, CORE, PVALIDATE, AREA + 8))[0]

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.value == RUN_VMPL0 and not faults:
            moment.unmap(range(SPARE, SPARE + 1))
        if moment.stage is Stage.EXIT and isinstance(moment.exit, Npf) and moment.exit.gpa == first:
            faults.append(moment.exit)
            poke_private(guest, AREA + 8 + 16, struct.pack("<Q", STATE))

    run(guest, take)
    tamper(guest, host)
    assert run(guest, give) == OK
    assert faults
    assert rights(guest, second) == ([0xF, 0, 0xF, 0], False, True)
    assert rights(guest, STATE)[0] == [0xF, 0, 0, 0]
    assert rights(guest, STATE)[2], "still valid"


def test_a_page_is_zero_when_it_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    guest, seen = fresh(), []
    grant = validation.grant

    async def watched(cpu: GuestCpu, address: int, count: int, *, large: bool = False) -> None:
        seen.append((private_bytes(guest, address, PAGE), rights(guest, address)[0]))
        await grant(cpu, address, count, large=large)

    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(SPARE * PAGE, b"old" * 100)
        return await pvalidate(cpu, SPARE * PAGE), await pvalidate(cpu, SPARE * PAGE | VALIDATE)

    monkeypatch.setattr(validation, "grant", watched)
    run(guest, body)
    assert seen == [(bytes(PAGE), [0xF, 0, 0, 0])]


def test_a_save_area_is_out_of_reach_when_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    guest, seen = fresh(), []
    check = core_protocol._check_save_area

    async def watched(processor: Any, page: int) -> None:
        seen.append(rights(guest, page)[0])
        await check(processor, page)

    async def body(cpu: GuestCpu) -> int:
        return await create(cpu, vmsa())

    monkeypatch.setattr(core_protocol, "_check_save_area", watched)
    assert run(guest, body) == OK
    assert seen == [[0xF, 0, 0, 0]]
    assert (VMSA, CAA) == (0x305000, 0x306000)


def test_the_lock_is_free_after_every_refusal() -> None:
    async def body(cpu: GuestCpu) -> list[Any]:
        found: list[Any] = [await pvalidate(cpu, STATE), await create(cpu, vmsa(vmpl=0)), await create(cpu, at=STATE)]
        found += [(await call(cpu, CORE, 0, STATE))[0], (await call(cpu, CORE, 3, VMSA))[0]]
        return [*found, await pvalidate(cpu, SPARE * PAGE)]

    guest = fresh()
    assert run(guest, body)[-1] == (OK, 1)
    assert private_bytes(guest, STATE + 1, 1) == b"\0"


def test_kernel_and_svsm_agree_on_levels() -> None:
    """A guest's kernel on a host that lies about nothing: the whole way through its own driver."""
    guest = fresh()

    async def program(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, Layout.of(guest.vmm.image))
        assert kernel.channel.area is not None
        return (await kernel.channel.area.call(Protocol.CORE, 6, 1)).rcx

    assert guest.run(program) == 1 << 32 | 1
