"""The SVSM's program on each processor: run the guest, and serve what it calls for, for ever.

A call counts where the guest has set `call_pending`, which is taken back in one step before the call is looked at.
Meanwhile the guest's save area is one that VMRUN refuses, or its host could have it go on without its answer, and the
other processors' guests are busy. A processor whose guest has no save area, or whose host does not run it, waits.
Source: COCONUT-SVSM kernel/src/requests.rs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from snpbook.guest import msr_protocol
from snpbook.guest.svsm import attest_protocol, core_protocol, startup, vtpm_protocol
from snpbook.guest.svsm.call import Answer, Call, Processor
from snpbook.guest.svsm.errors import Refused
from snpbook.guest.svsm.places import Places
from snpbook.hardware.guest_cpu import GuestCpu, Program
from snpbook.spec.image import Image
from snpbook.spec.svsm import GUEST_VMPL, Protocol, SvsmCode
from snpbook.spec.vmsa import EFER_SVME, VMSA

_PROTOCOLS: Mapping[int, Mapping[int, Callable[[Processor, Call], Awaitable[Answer]]]] = {
    Protocol.CORE: core_protocol.CALLS,
    Protocol.ATTEST: attest_protocol.CALLS,
    Protocol.VTPM: vtpm_protocol.CALLS,
}
_WORD = 8


def program(svsm: Image, firmware: int, gpa: int) -> Program:
    """The program of an SVSM's image at guest address `gpa`, for each processor at VMPL0.

    The guest's firmware lies from guest address `firmware` up to 4 GiB.
    """
    places = Places.of(svsm, firmware)

    async def run(cpu: GuestCpu) -> None:
        (number,) = await cpu.look("rdi")
        if number:
            processor = await startup.further(cpu, places, number)
        else:
            processor = await startup.first(cpu, places, gpa + svsm.svsm_entry)
        while True:
            await _serve(processor)
            await _run_guest(processor)

    return run


async def _run_guest(processor: Processor) -> None:
    """Have the host run the guest's VMPL; wait where there is nothing to run, or the host knows of nothing."""
    entry = await processor.registry.current(processor.number)
    if entry is not None:
        await _let_run(processor.cpu, entry.vmsa, on=True)
    if entry is None or not await msr_protocol.run_vmpl(processor.cpu, GUEST_VMPL):
        await processor.cpu.hlt()


async def _let_run(cpu: GuestCpu, vmsa: int, *, on: bool) -> None:
    """Whether the host can run a save area: with EFER.SVME clear, VMRUN refuses it."""
    place = vmsa + VMSA.offset("efer")
    efer = int.from_bytes(await cpu.read(place, _WORD), "little")
    await cpu.write(place, (efer | EFER_SVME if on else efer & ~EFER_SVME).to_bytes(_WORD, "little"))


async def _serve(processor: Processor) -> None:
    """One call of the guest, if it has made one: the answer goes into the save area from which it came."""
    entry = await processor.registry.current(processor.number)
    if entry is None:
        return
    await _let_run(processor.cpu, entry.vmsa, on=False)
    if await processor.cpu.exchange(entry.calling_area, b"\0") == b"\0":
        return
    call = await Call.of(processor.cpu, entry.vmsa)
    try:
        answer = await processor.registry.exclusively(lambda: _dispatch(processor, call))
        registers = {"rax": int(SvsmCode.SUCCESS), "rcx": answer.rcx, "rdx": answer.rdx, "r8": answer.r8}
    except Refused as refused:
        registers = {"rax": int(refused.code), **refused.registers}
    if await processor.registry.find(entry.vmsa) is None:
        return
    for name, value in registers.items():
        if value is not None:
            await processor.cpu.write(entry.vmsa + VMSA.offset(name), value.to_bytes(_WORD, "little"))


async def _dispatch(processor: Processor, call: Call) -> Answer:
    if call.protocol not in _PROTOCOLS:
        raise Refused(SvsmCode.UNSUPPORTED_PROTOCOL, f"protocol {call.protocol} is supported")
    calls = _PROTOCOLS[call.protocol]
    if call.number not in calls:
        raise Refused(SvsmCode.UNSUPPORTED_CALL, f"protocol {call.protocol} has a call {call.number}")
    return await calls[call.number](processor, call)
