"""Page state changes: the guest says which pages it wants private or shared, and the VMM makes them so.

KVM changes neither attribute nor RMP itself. In the v7 era the VMM parses the GHCB; later KVM asks it for one run of
pages after the other, and the guest's buffer, read again each time, says how far it got. Sources: GHCB specification;
Linux arch/x86/kvm/svm/sev.c (snp_begin_psc, snp_begin_psc_msr); RFC v7 patches 46 to 48.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from snpbook.host import psc_lists
from snpbook.host.kvm import registered
from snpbook.host.kvm.exchange import Exchange
from snpbook.host.kvm.instructions import asks_userspace, hypercall_exit
from snpbook.host.psc_lists import Columns
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Step, Steps
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import PSC_ENTRY, PSC_HEADER, MsrCode, PageOperation
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.uapi_kvm import Exit, MapGpaRange
from snpbook.spec.uapi_kvm_structs import EXIT_HYPERCALL, EXIT_VMGEXIT

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_SERVED = (PageOperation.PRIVATE, PageOperation.SHARED)


def change(exchange: Exchange) -> bool:
    """A list of changes in the scratch area; how it went is in SW_EXITINFO2 alone."""
    vcpu = exchange.vcpu
    if vcpu.vm.kernel.era.psc_exit is Exit.VMGEXIT and not vcpu.vm.in_place:
        vcpu.leave(Exit.VMGEXIT, EXIT_VMGEXIT, ghcb_msr=exchange.gpa)
        vcpu.completion = _believed
        return True
    area = exchange.scratch(PSC_HEADER.size)
    return area is not None and _next_range(exchange, area)


def _believed(vcpu: Vcpu) -> Steps[bool]:
    """The VMM has served the GHCB, and said there how; the v7 series tells the guest of success all the same."""
    yield Step("page state changed")
    if vcpu.exchange is not None and not vcpu.vm.kernel.era.psc_result_told:
        vcpu.exchange.answer()
    return False


def _next_range(exchange: Exchange, area: int) -> bool:
    """Ask the VMM for the next run of pages; False once the list is done or wrong, and the guest is told."""
    vcpu = exchange.vcpu
    if not vcpu.vm.in_place and not asks_userspace(vcpu):
        exchange.answer(info_2=spec.PSC_FAILURE)
        return False
    while True:
        header = PSC_HEADER.unpack(vcpu.vm.read(area, PSC_HEADER.size))
        if header.end_entry >= (exchange.room(area) - PSC_HEADER.size) // PSC_ENTRY.size:
            exchange.answer(info_2=spec.PSC_INVALID_HEADER)
            return False
        entries = _entries(exchange, area, header.cur_entry, header.end_entry + 1)
        first, count, error = _first_range(entries)
        _store_header(exchange, area, header.replace(cur_entry=header.cur_entry + first))
        if not count:
            exchange.answer(info_2=error)
            return False
        own, more = range(header.cur_entry + first, header.cur_entry + first + count), 0
        if entries["operation"][first] in _SERVED:
            if own.stop == header.end_entry + 1:
                entries, more = _with_following(exchange, area, entries, first, count)
            run = {name: column[first : first + count + more] for name, column in entries.items()}
            if not vcpu.vm.in_place:
                _ask(exchange, area, own, more, run)
                return True
            if not _serve_in_place(vcpu, run):
                exchange.answer(info_2=spec.PSC_FAILURE)
                return False
        _complete(exchange, area, own, more)


def _with_following(exchange: Exchange, area: int, entries: Columns, first: int, count: int) -> tuple[Columns, int]:
    """The same entries with those of the lists that follow, and how many of these go on with the run."""
    lists = exchange.following(area)
    if not len(lists):
        return entries, 0
    both = {name: np.concatenate([entries[name], column]) for name, column in psc_lists.entries(lists).items()}
    return both, _first_range(both)[1] - count


def _first_range(entries: Columns) -> tuple[int, int, int]:
    """The first entry that is not done, how many from it on make one run, and the error that stands there instead."""
    sizes = psc_lists.sizes(entries)
    bad = (entries["cur_page"] > sizes) | (entries["gfn"] % sizes != 0)
    open_ = bad | (entries["cur_page"] != sizes)
    if not open_.any():
        return len(sizes), 0, 0
    first = int(np.argmax(open_))
    if bad[first]:
        return first, 0, spec.PSC_INVALID_ENTRY
    if entries["cur_page"][first]:
        return first, 1, 0
    follows = entries["gfn"][1:] == entries["gfn"][:-1] + sizes[:-1]
    for name in ("operation", "page_size"):
        follows &= entries[name][1:] == entries[name][first]
    follows &= entries["cur_page"][1:] == 0
    more = follows[first:]
    return first, 1 + (len(more) if more.all() else int(np.argmin(more))), 0


def _ask(exchange: Exchange, area: int, own: range, more: int, entries: Columns) -> None:
    """KVM_EXIT_HYPERCALL for one run; a part of a 2 MB entry counts 4 KB pages, and has its flag all the same."""
    gfns = _gfns(entries)
    private = entries["operation"][0] == PageOperation.PRIVATE
    attributes = MapGpaRange.ENCRYPTED * bool(private) | MapGpaRange.PAGE_SZ_2M * bool(entries["page_size"][0])
    hypercall_exit(exchange.vcpu, gfns.start << PAGE_SHIFT, len(gfns), int(attributes))
    exchange.vcpu.completion = partial(_answered, exchange, area, own, more)


def _gfns(entries: Columns) -> range:
    """The guest pages of a run of entries, of which the first may be done in part."""
    gfn = int(entries["gfn"][0] + entries["cur_page"][0])
    return range(gfn, gfn + int((psc_lists.sizes(entries) - entries["cur_page"]).sum()))


def _serve_in_place(vcpu: Vcpu, entries: Columns) -> bool:
    """Serve one run in the kernel, as series v6 did; whether it succeeded."""
    private = entries["operation"][0] == PageOperation.PRIVATE
    return registered.converted(vcpu.vm, _gfns(entries), private=bool(private))


def _answered(exchange: Exchange, area: int, own: range, more: int, vcpu: Vcpu) -> Steps[bool]:
    """The VMM has changed a run, or failed to: then the guest is told, and the run stays to be done."""
    yield Step("page state changed")
    if vcpu.answer(EXIT_HYPERCALL).ret:
        exchange.answer(info_2=spec.PSC_FAILURE)
        return False
    _complete(exchange, area, own, more)
    return _next_range(exchange, area)


def _complete(exchange: Exchange, area: int, own: range, more: int) -> None:
    """Mark entries as done in the guest's buffer as it now is, and then `more` of the lists that follow."""
    vm, start = exchange.vcpu.vm, area + PSC_HEADER.size + own.start * PSC_ENTRY.size
    words = np.frombuffer(vm.read(start, len(own) * PSC_ENTRY.size), "<u8")
    vm.write(start, psc_lists.marked(words).tobytes())
    header = PSC_HEADER.unpack(vm.read(area, PSC_HEADER.size))
    _store_header(exchange, area, header.replace(cur_entry=own.stop))
    if more:
        exchange.move_on(area, more)


def _entries(exchange: Exchange, area: int, first: int, stop: int) -> Columns:
    count = max(stop - first, 0)
    if not count:
        return PSC_ENTRY.columns(np.empty(0, PSC_ENTRY.dtype))
    start = area + PSC_HEADER.size + first * PSC_ENTRY.size
    data = exchange.vcpu.vm.read(start, count * PSC_ENTRY.size)
    return PSC_ENTRY.columns(np.frombuffer(data, PSC_ENTRY.dtype))


def _store_header(exchange: Exchange, area: int, header: Record) -> None:
    exchange.vcpu.vm.write(area, bytes(header))


def change_by_msr(vcpu: Vcpu, value: int) -> bool:
    """One 4 KB page by the MSR protocol. EPERM beside the exit where the era has it so."""
    era = vcpu.vm.kernel.era
    if era.psc_exit is Exit.VMGEXIT and not vcpu.vm.in_place:
        vcpu.leave(Exit.VMGEXIT, EXIT_VMGEXIT, ghcb_msr=value)
        vcpu.completion = _believed_by_msr
        if era.psc_msr_run_fails:
            raise KernelError(errno.EPERM, "KVM_RUN with KVM_EXIT_VMGEXIT for the MSR protocol", "0", "-1")
        return True
    entry = PSC_ENTRY.unpack(value.to_bytes(PSC_ENTRY.size, "little"))
    if vcpu.vm.in_place and entry.operation in _SERVED:
        private = entry.operation == PageOperation.PRIVATE
        failed = not registered.converted(vcpu.vm, range(entry.gfn, entry.gfn + 1), private=private)
        _answer_by_msr(vcpu, failed=failed)
        return False
    if entry.operation not in _SERVED or not asks_userspace(vcpu):
        _answer_by_msr(vcpu, failed=True)
        return False
    private = entry.operation == PageOperation.PRIVATE
    hypercall_exit(vcpu, entry.gfn << PAGE_SHIFT, 1, int(MapGpaRange.ENCRYPTED * private))
    vcpu.completion = _answered_by_msr
    return True


def _believed_by_msr(vcpu: Vcpu) -> Steps[bool]:
    yield Step("page state changed")
    _answer_by_msr(vcpu, failed=vcpu.vm.kernel.era.psc_result_told and bool(vcpu.answer(EXIT_VMGEXIT).error))
    return False


def _answered_by_msr(vcpu: Vcpu) -> Steps[bool]:
    yield Step("page state changed")
    _answer_by_msr(vcpu, failed=bool(vcpu.answer(EXIT_HYPERCALL).ret))
    return False


def _answer_by_msr(vcpu: Vcpu, *, failed: bool) -> None:
    vcpu.set_control("ghcb_gpa", spec.PAGE_STATE_FAILED * failed | MsrCode.PAGE_STATE)
