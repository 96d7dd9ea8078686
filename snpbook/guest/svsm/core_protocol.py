"""The core protocol: the calling area, validation of pages, and the guest's processors.

A save area is the guest's to fill and the SVSM's to mark: it is out of the guest's reach before it is looked at, and
what is wrong with it is refused then. Depositing memory and a virtual top of memory are not supported. Source:
COCONUT-SVSM kernel/src/protocols/core.rs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from snpbook.guest.svsm.call import Answer, Call, Processor
from snpbook.guest.svsm.errors import Refused, check
from snpbook.guest.svsm.validation import grant, serve_list
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.svsm import (
    CALLING_AREA,
    GUEST_VMPL,
    VERSION,
    VMPL_COUNT,
    VMSA_RIGHTS,
    Core,
    Protocol,
    SvsmCode,
)
from snpbook.spec.vmsa import EFER_SVME, VMSA

SUPPORTED = (Protocol.CORE, Protocol.ATTEST, Protocol.VTPM)
_LOW = (1 << 32) - 1


async def _remap(processor: Processor, call: Call) -> Answer:
    """RCX: the new calling area, of which the first quadword is cleared. To where it is already changes nothing."""
    check(call.rcx % PAGE_SIZE == 0, SvsmCode.INVALID_PARAMETER, f"the calling area {call.rcx:#x} is a page")

    old = await processor.registry.current(processor.number)
    assert old is not None
    if call.rcx != old.calling_area:
        await processor.memory.read(call.rcx, 1)
        await processor.registry.remap(processor.number, call.rcx)
    await processor.memory.write(call.rcx, bytes(CALLING_AREA.offset("buffer")))
    return Answer()


async def _pvalidate(processor: Processor, call: Call) -> Answer:
    """RCX: a list of pages."""
    await serve_list(processor.memory, call.rcx)
    return Answer()


async def _create(processor: Processor, call: Call) -> Answer:
    """RCX: the page that becomes a save area, RDX: the calling area of its processor, R8: the processor's APIC ID."""
    vmsa, area = call.rcx, call.rdx
    aligned = vmsa % PAGE_SIZE == 0 == area % PAGE_SIZE and vmsa != area
    check(aligned, SvsmCode.INVALID_ADDRESS, f"two pages: save area {vmsa:#x}, calling area {area:#x}")
    for page in (vmsa, area):
        await processor.memory.check(page, PAGE_SIZE)
    number = await processor.registry.number_of(call.r8 & _LOW)
    await processor.registry.register(vmsa, area, number)
    try:
        with processor.memory.refusing():
            await _rights(processor, vmsa, 0)
        await _check_save_area(processor, vmsa)
    except Refused:
        await processor.registry.forget(vmsa)
        raise
    await _rights(processor, vmsa, VMSA_RIGHTS, vmsa=True)
    await processor.registry.use(vmsa)
    return Answer()


async def _check_save_area(processor: Processor, vmsa: int) -> None:
    """Of the guest's VMPL, with SVM on, and with its caller's features; else it is the guest's again."""
    area = VMSA.unpack(await processor.cpu.read(vmsa, PAGE_SIZE))
    mine = await processor.features()
    if (area.vmpl, area.efer & EFER_SVME, area.sev_features) != (GUEST_VMPL, EFER_SVME, mine):
        await grant(processor.cpu, vmsa, 1)
        found = f"VMPL{area.vmpl}, EFER {area.efer:#x}, SEV_FEATURES {area.sev_features:#x}"
        raise Refused(SvsmCode.INVALID_PARAMETER, f"a save area of VMPL{GUEST_VMPL} with features {mine:#x}: {found}")


async def _delete(processor: Processor, call: Call) -> Answer:
    """RCX: a save area, which becomes the guest's page again; one in the SVSM's own memory stays the SVSM's."""
    entry = await processor.registry.find(call.rcx)
    check(entry is not None, SvsmCode.INVALID_PARAMETER, f"{call.rcx:#x} is a save area in use")
    await _rights(processor, call.rcx, 0)
    if call.rcx not in processor.registry.places.own:
        await grant(processor.cpu, call.rcx, 1)
    await processor.registry.forget(call.rcx)
    return Answer()


async def _rights(processor: Processor, page: int, rights: int, *, vmsa: bool = False) -> None:
    """What the guest's VMPL may do with a page: `rights`; the less privileged one nothing."""
    for vmpl in reversed(range(GUEST_VMPL, VMPL_COUNT)):
        given = rights if vmpl == GUEST_VMPL else 0
        codes = await processor.cpu.rmpadjust(page, 1, vmpl=vmpl, permissions=given, vmsa=vmsa)
        if codes[0]:
            raise Refused(SvsmCode.PROTOCOL_BASE + int(codes[0]), f"rights on {page:#x}")


async def _query(processor: Processor, call: Call) -> Answer:
    """RCX: a protocol and a version of it. RCX: the highest and the lowest version, 0 where it is not supported."""
    supported = call.rcx >> 32 in SUPPORTED and call.rcx & _LOW == VERSION
    return Answer(rcx=VERSION << 32 | VERSION if supported else 0)


async def _vtom(processor: Processor, call: Call) -> Answer:
    """RCX bit 0: whether there can be a virtual top of memory. There cannot."""
    check(bool(call.rcx & 1), SvsmCode.INVALID_REQUEST, "a virtual top of memory can be configured")
    return Answer(rcx=0)


async def _unsupported(processor: Processor, call: Call) -> Answer:
    raise Refused(SvsmCode.UNSUPPORTED_CALL, f"{Core(call.number).name} is supported")


CALLS: Mapping[int, Callable[[Processor, Call], Awaitable[Answer]]] = {
    Core.REMAP_CA: _remap,
    Core.PVALIDATE: _pvalidate,
    Core.CREATE_VCPU: _create,
    Core.DELETE_VCPU: _delete,
    Core.DEPOSIT_MEM: _unsupported,
    Core.WITHDRAW_MEM: _unsupported,
    Core.QUERY_PROTOCOL: _query,
    Core.CONFIGURE_VTOM: _vtom,
}
