"""Page state changes in the v7 era: KVM hands the guest's request on unread, and the VMM parses the GHCB itself.

Neighbouring entries of the same kind become one conversion. Sources: GHCB specification, SNP page state change; RFC v7
patches 46 to 48.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from snpbook.host import psc_lists
from snpbook.host.refusal import KernelError
from snpbook.spec import ghcb as spec
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.ghcb import GHCB, PSC_ENTRY, PSC_HEADER, PageOperation
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.vmm.guest import VcpuHandle, Vmm

_PRIVATE: dict[int, bool] = {PageOperation.PRIVATE: True, PageOperation.SHARED: False}
"""What an operation asks for. Others (PSMASH, UNSMASH) count as done without effect, as in KVM 6.12."""


def serve(vmm: Vmm, vcpu: Vcpu, ghcb_gpa: int) -> None:
    """Serve the entries of the shared buffer, and of the lists that follow, up to the first that cannot be done.

    SW_EXITINFO2 tells the guest of a malformed header or entry; entries before it are done.
    """
    ghcb = GHCB.unpack(vmm.read(ghcb_gpa, PAGE_SIZE))
    start = ghcb.sw_scratch - ghcb_gpa - spec.SHARED_BUFFER_OFFSET
    if not 0 <= start <= spec.SHARED_BUFFER_SIZE - PSC_HEADER.size:
        _answer(vmm, ghcb_gpa, spec.MALFORMED, spec.GhcbError.INVALID_SCRATCH)
        return
    body = ghcb.shared_buffer[start:]
    header = PSC_HEADER.unpack(body)
    capacity = (len(body) - PSC_HEADER.size) // PSC_ENTRY.size
    if header.end_entry >= capacity:
        _answer(vmm, ghcb_gpa, 0, spec.PSC_INVALID_HEADER)
        return
    words = np.frombuffer(body, "<u8", capacity, PSC_HEADER.size).copy()
    mine = words[header.cur_entry : header.end_entry + 1]
    following = psc_lists.following(vcpu.executor.following if not start else np.empty((0, 0), np.uint8))
    own, behind = PSC_ENTRY.columns(mine.view(PSC_ENTRY.dtype)), psc_lists.entries(following)
    done, error = _convert(vmm, {name: np.concatenate([own[name], behind[name]]) for name in own})
    more = max(done - len(mine), 0)
    done -= more
    mine[:done] = psc_lists.marked(mine[:done])
    fresh = bytes(header.replace(cur_entry=header.cur_entry + done)) + words.tobytes()
    if more:
        fresh = psc_lists.move_on(fresh, following.view(np.uint8), more, vcpu.answered)
    vmm.write(ghcb_gpa + spec.SHARED_BUFFER_OFFSET + start, fresh)
    state = PSC_HEADER.unpack(fresh)
    _answer(vmm, ghcb_gpa, 0, error if state.cur_entry <= state.end_entry else 0)


def _convert(vmm: Vmm, fields: psc_lists.Columns) -> tuple[int, int]:
    """Entries done, and the error of the one behind them (0: none)."""
    from snpbook.host.vmm.exits import convert

    count = len(fields["gfn"])
    sizes = psc_lists.sizes(fields)
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
        private = _PRIVATE.get(int(fields["operation"][first]))
        if pages and private is not None:
            try:
                convert(vmm, gpa, pages << PAGE_SHIFT, private=private)
            except KernelError:
                return first, spec.PSC_FAILURE
    return stop, spec.PSC_INVALID_ENTRY if stop < count else 0


def serve_msr(vmm: Vmm, handle: VcpuHandle, request: int) -> None:
    """Serve a request of the MSR protocol, one 4 KB page: `error` in `kvm_run` tells KVM how it went."""
    from snpbook.host.vmm.exits import convert, exit_record, put_exit_record

    entry = PSC_ENTRY.unpack(request.to_bytes(8, "little"))
    private, failed = _PRIVATE.get(entry.operation), 0
    try:
        if private is None:
            failed = 1
        else:
            convert(vmm, entry.gfn << PAGE_SHIFT, PAGE_SIZE, private=private)
    except KernelError:
        failed = 1
    put_exit_record(vmm, handle, exit_record(vmm, handle, structs.EXIT_VMGEXIT).replace(error=failed))


def _answer(vmm: Vmm, ghcb_gpa: int, info1: int, info2: int) -> None:
    """The results, where the guest finds them."""
    for name, value in (("sw_exit_info_1", info1), ("sw_exit_info_2", info2)):
        vmm.write(ghcb_gpa + GHCB.offset(name), int(value).to_bytes(8, "little"))
