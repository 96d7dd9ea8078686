"""Page state changes in the VMM: the guest's list becomes KVM_SET_MEMORY_ATTRIBUTES calls.

In the v7 era KVM hands the request on unread and the VMM parses the GHCB itself. Source: GHCB
specification, SNP page state change; RFC v7, patches 46 to 48.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from snpbook.host.ghcb import answer_msr, complete, read_ghcb
from snpbook.host.kvm import Vcpu, Vm
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import PSC_ENTRY, PSC_HEADER, MsrCode, PageOperation
from snpbook.spec.kvm import MemoryAttribute
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE

_ATTRIBUTES: dict[int, MemoryAttribute] = {
    PageOperation.PRIVATE: MemoryAttribute.PRIVATE,
    PageOperation.SHARED: MemoryAttribute(0),
}
"""What an operation asks for. Others (PSMASH, UNSMASH) count as done without effect, as in KVM 6.12."""


def change_page_state(vm: Vm, vcpu: Vcpu) -> None:
    """Serve the entries of the shared buffer; neighbours of the same kind become one call.

    SW_EXITINFO2 tells the guest of a malformed header or entry; entries before it are done.
    """
    ghcb = read_ghcb(vcpu)
    start = ghcb.sw_scratch - (vcpu.ghcb_registered << PAGE_SHIFT) - spec.SHARED_BUFFER_OFFSET
    if not 0 <= start <= spec.SHARED_BUFFER_SIZE - PSC_HEADER.size:
        complete(vcpu, spec.MALFORMED, spec.GhcbError.INVALID_SCRATCH)
        return
    body = ghcb.shared_buffer[start:]
    header = PSC_HEADER.unpack(body)
    capacity = (len(body) - PSC_HEADER.size) // PSC_ENTRY.size
    if header.end_entry >= capacity:
        complete(vcpu, info2=spec.PSC_INVALID_HEADER)
        return
    entries = np.frombuffer(body, PSC_ENTRY.dtype, header.end_entry + 1, PSC_HEADER.size)
    fields = PSC_ENTRY.columns(entries[header.cur_entry :])
    done, error = _convert(vm, fields)
    words = np.frombuffer(body, "<u8", capacity, PSC_HEADER.size).copy()
    sizes = np.where(fields["page_size"], PAGES_PER_LARGE, 1).astype(np.uint64)
    mine = slice(header.cur_entry, header.cur_entry + done)
    words[mine] = words[mine] & ~np.uint64(PSC_ENTRY.fields["cur_page"].limit) | sizes[:done]
    fresh = bytes(header.replace(cur_entry=header.cur_entry + done)) + words.tobytes()
    buffer = ghcb.shared_buffer[:start] + fresh + body[len(fresh) :]
    complete(vcpu, info2=error, shared_buffer=buffer)


def _convert(vm: Vm, fields: dict[str, np.ndarray[tuple[int], np.dtype[np.uint64]]]) -> tuple[int, int]:
    """Entries done, and the error of the one behind them (0: none)."""
    count = len(fields["gfn"])
    sizes = np.where(fields["page_size"], PAGES_PER_LARGE, 1).astype(np.uint64)
    bad = (fields["cur_page"] > sizes) | (fields["gfn"] % sizes != 0)
    stop = int(np.argmax(bad)) if bad.any() else count
    begins = fields["gfn"] + fields["cur_page"]
    lengths = sizes - fields["cur_page"]
    joined = (begins[1:stop] == begins[: max(stop - 1, 0)] + lengths[: max(stop - 1, 0)]) & (
        fields["operation"][1:stop] == fields["operation"][: max(stop - 1, 0)]
    )
    bounds = [0, *(np.flatnonzero(~joined) + 1).tolist(), stop] if stop else []
    for first, last in pairwise(bounds):
        gpa, pages = int(begins[first]) << PAGE_SHIFT, int(lengths[first:last].sum())
        attributes = _ATTRIBUTES.get(int(fields["operation"][first]))
        if pages and attributes is not None:
            vm.set_memory_attributes(gpa, pages << PAGE_SHIFT, attributes)
    return stop, spec.PSC_INVALID_ENTRY if stop < count else 0


def change_page_state_by_msr(vm: Vm, vcpu: Vcpu, value: int) -> None:
    """Serve a request of the MSR protocol: one 4 KB page."""
    entry = PSC_ENTRY.unpack(value.to_bytes(8, "little"))
    attributes = _ATTRIBUTES.get(entry.operation)
    if attributes is None:
        answer_msr(vcpu, spec.PAGE_STATE_FAILED | MsrCode.PAGE_STATE)
        return
    vm.set_memory_attributes(entry.gfn << PAGE_SHIFT, PAGE_SIZE, attributes)
    answer_msr(vcpu, int(MsrCode.PAGE_STATE))
