"""Two processors of a guest call their SVSM at once, or the host runs a guest that its SVSM has not answered yet."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.hardware.exits import Npf
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import ap_creation
from snpbook.host.refusal import KernelError
from snpbook.spec.ghcb import Nae
from snpbook.system import Guest
from tests.guest.svsm_world import (
    AREA,
    ATTEST,
    BUSY,
    CORE,
    CREATE,
    OK,
    REMAP,
    SPARE,
    STATE,
    VTPM,
    call,
    fresh,
    rights,
    run,
)  # fmt: skip
from tests.guest.test_svsm_attest import NONCE, NONCE_AT, attest, operation
from tests.guest.test_svsm_boot import second, start_second
from tests.guest.test_svsm_core import VMSA, vmsa
from tests.machines import PAGE, private_bytes

SECOND_AREA, SECOND_CAA = 0x302000, 0x30C000
CAPABILITIES = bytes.fromhex("8001 00000016 0000017a 00000002 00000000 00000008")


def by_second(guest: Guest, body: Callable[[GuestCpu], Awaitable[Any]]) -> Any:
    return second(guest, lambda kernel: body(kernel.cpu))


def test_an_answer_is_not_written_into_a_save_area() -> None:
    """The host stops the first processor between check and use. Zeros of an answer's length would make it VMPL0's."""
    guest, found = fresh(), list[int]()
    start_second(guest)
    at, state = VMSA + 0xC8, range(STATE >> 12, (STATE >> 12) + 2)

    def host(moment: Moment) -> None:
        """Each page that it takes away is a fault, by which it knows how far the SVSM is."""
        if found or moment.vcpu is not guest.vmm.vcpus[0]:
            return
        fault = moment.exit if isinstance(moment.exit, Npf) else None
        if moment.stage is Stage.EXIT:
            if fault and fault.gpa >> 12 == VMSA >> 12 and fault.error & 2:
                found.append(by_second(guest, make))
            elif moment.value == 0x016:
                moment.unmap(range(VMSA >> 12, (VMSA >> 12) + 1))
                moment.unmap(state)
        elif fault and fault.gpa >> 12 == VMSA >> 12:
            moment.unmap(state)
        elif fault:
            moment.unmap(range(VMSA >> 12, (VMSA >> 12) + 1))

    async def make(cpu: GuestCpu) -> int:
        await cpu.write(VMSA, vmsa())
        return (await call(cpu, CORE, CREATE, VMSA, SECOND_CAA, 1, area=SECOND_AREA))[0]

    async def body(cpu: GuestCpu) -> int:
        await cpu.write(at, struct.pack("<IBI", 8, 0, len(CAPABILITIES)) + CAPABILITIES)
        return (await call(cpu, VTPM, 1, at))[0]

    tamper(guest, host)
    assert run(guest, body) == OK
    assert found == [BUSY]
    assert rights(guest, VMSA) == ([0xF, 0, 0xF, 0], False, True)
    assert private_bytes(guest, VMSA + 0xCA, 1) == b"\0", "else the page would have become VMPL0's"


def test_two_reports_at_once() -> None:
    """Both would use one message number and one request page: the second is to ask again, and both succeed."""
    guest, found = fresh(), list[int]()
    start_second(guest)
    buffers = operation(False, report_gpa=0x303000, manifest_gpa=0x304000)

    async def other(cpu: GuestCpu) -> int:
        await cpu.write(SECOND_AREA + 8, buffers)
        return (await call(cpu, ATTEST, 0, SECOND_AREA + 8, area=SECOND_AREA))[0]

    def host(moment: Moment) -> None:
        if not found and moment.stage is Stage.EXIT and moment.event is Nae.GUEST_REQUEST:
            found.append(0)
            found[0] = by_second(guest, other)

    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(NONCE_AT, NONCE)
        return (await attest(cpu, raw=buffers))[0]

    tamper(guest, host)
    assert run(guest, body) == OK
    assert found == [BUSY]
    assert by_second(guest, other) == OK


def test_a_guest_cannot_be_run_before_it_is_answered() -> None:
    """Registers of a REMAP_CA that has only been taken look as after its success: VMRUN refuses the save area."""
    guest, runs = fresh(), list[int]()

    def host(moment: Moment) -> None:
        fault = moment.exit if isinstance(moment.exit, Npf) else None
        if moment.stage is Stage.EXIT and moment.value == 0x016:
            moment.unmap(range(SPARE, SPARE + 1))
        if moment.stage is Stage.EXIT and fault and fault.gpa >> 12 == SPARE and moment.vcpu.vmpl == 0:
            runs.append(moment.vcpu.vmpl)
            ap_creation.switch(moment.vcpu, 2)
            moment.keep()
            moment.answer_msr(0x017)

    async def body(cpu: GuestCpu) -> Any:
        return (await call(cpu, CORE, REMAP, SPARE * PAGE))[0], await cpu.read(AREA, 1)

    tamper(guest, host)
    with pytest.raises(KernelError, match=r"EFER\.SVME"):
        run(guest, body)
    assert runs == [0]
