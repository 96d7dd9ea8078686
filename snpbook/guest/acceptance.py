"""Pages change sides: the hypervisor is asked, and PVALIDATE makes the guest's own record of what it holds.

Only this file validates. To private: ask, then validate. To shared: rescind, then ask. Each page is validated once: a
PVALIDATE that changes nothing means that the hypervisor has put another page there, and ends the guest. A host without
2 MB pages answers a 2 MB PVALIDATE with a size mismatch, and its 512 pages are validated one by one. Pages that have
been validated are touched unless the processor does without, so that no stale lines of theirs stay in a cache.
Sources: GHCB specification; Linux arch/x86/coco/sev/core.c (vmgexit_psc, pvalidate_pages; sev_evict_cache is later than
6.12).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.svsm_pages import change_validation
from snpbook.guest.termination import terminate
from snpbook.hardware.dram import Words
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF
from snpbook.spec.ghcb import PSC_ENTRIES, PSC_ENTRY, PSC_HEADER, Nae, PageOperation
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.termination import Reason

_LISTS = 512
"""Lists that are made at once, if they are not of too many pages: 1 MB of them."""
_PAGES = 1 << 18
"""Pages that are asked for and validated at once."""


async def accept(ghcb: Ghcb, pages: range, entries: int = PSC_ENTRIES, *, large: bool = True) -> None:
    """Make pages private and validate them, if `large` 2 MB at a time where the range allows.

    A list has `entries` at most: Linux, whose stack bounds them, makes 64, and the buffer holds `PSC_ENTRIES`.
    """
    parts = _parts(pages) if large else [pages]
    await ask(ghcb, parts, PageOperation.PRIVATE, entries)
    for run in parts:
        await _change(ghcb, run, validate=True)
    if not (await ghcb.cpu.cpuid(ENCRYPTED_MEMORY_LEAF)).decode(ENCRYPTED_MEMORY).coherency_sfw_no:
        await ghcb.cpu.touch(pages.start << PAGE_SHIFT, len(pages))


async def give_up(ghcb: Ghcb, pages: range, entries: int = PSC_ENTRIES) -> None:
    """Rescind the validation of pages and make them shared; what is in them is lost to the guest."""
    parts = _parts(pages)
    for run in parts:
        await _change(ghcb, run, validate=False)
    await ask(ghcb, parts, PageOperation.SHARED, entries)


def _parts(pages: range) -> list[range]:
    """Single pages up to the first 2 MB boundary, 2 MB pages by their first, and single pages again."""
    first = min(-(-pages.start // PAGES_PER_LARGE) * PAGES_PER_LARGE, pages.stop)
    last = max(pages.stop // PAGES_PER_LARGE * PAGES_PER_LARGE, first)
    parts = [range(pages.start, first), range(first, last, PAGES_PER_LARGE), range(last, pages.stop)]
    return [part for part in parts if part]


async def ask(ghcb: Ghcb, parts: Sequence[range], operation: PageOperation, entries: int = PSC_ENTRIES) -> None:
    """Page state changes in lists of `entries`. A range with steps of 512 stands for 2 MB pages.

    The hypervisor may stop early and is asked again; an error, going back or changing the list ends the guest.
    """
    if not 0 < entries <= PSC_ENTRIES:
        raise ValueError(f"entries = {entries}: a list has 1 to {PSC_ENTRIES}")
    most = entries * max(min(_LISTS, _PAGES // (entries * max(part.step for part in parts))), 1) if parts else 1
    for start in range(0, sum(map(len, parts)), most):
        await _ask_each(ghcb, *_lists(_words(parts, operation, start, start + most), entries))


async def _ask_each(ghcb: Ghcb, lists: Words, lengths: Words) -> None:
    """Lists one after the other, with as many of them in one exit as the hypervisor serves."""
    done = _headers(lengths, lengths).reshape(-1, 1)
    first = 0
    while first < len(lists):
        before, length = PSC_HEADER.unpack(lists[first].tobytes()).cur_entry, int(lengths[first])
        served, answer = await ghcb.call_each(
            Nae.PAGE_STATE_CHANGE, lists[first:].view(np.uint8), done[first:].view(np.uint8), reason=Reason.PSC
        )
        if served > 1:
            first += served - 1
            before, length = 0, int(lengths[first])
        buffer = answer.shared_buffer
        state = PSC_HEADER.unpack(buffer)
        honest = before < state.cur_entry <= length == state.end_entry + 1 and not PSC_HEADER.reserved_set(buffer)
        if answer.sw_exit_info_2 or not honest:
            await terminate(ghcb.cpu, Reason.PSC, f"entry {state.cur_entry}: {answer.sw_exit_info_2:#x}")
        lists[first] = np.frombuffer(buffer, "<u8")
        first += state.cur_entry == length


def _lists(words: Words, entries: int) -> tuple[Words, Words]:
    """Entries in lists as the shared buffer holds them, and how many each has."""
    count = -(-len(words) // entries)
    lengths = np.full(count, entries, np.uint64)
    lengths[-1] -= np.uint64(count * entries - len(words))
    lists = np.zeros((count, 1 + PSC_ENTRIES), "<u8")
    lists[:, 0] = _headers(np.zeros_like(lengths), lengths)
    lists[:, 1 : 1 + entries] = np.append(words, np.zeros(count * entries - len(words), np.uint64)).reshape(count, -1)
    return lists, lengths


def _headers(done: Words, lengths: Words) -> Words:
    """Headers of lists of which some entries are done."""
    headers = np.zeros(len(lengths), PSC_HEADER.dtype)
    headers["cur_entry"], headers["end_entry"] = done, lengths - np.uint64(1)
    return headers.view("<u8")


def _words(parts: Sequence[range], operation: PageOperation, start: int, stop: int) -> Words:
    """The entries from number `start` to `stop`."""
    result = [np.empty(0, np.uint64)]
    for part in parts:
        pages = part[max(start, 0) : max(stop, 0)]
        kind = int.from_bytes(PSC_ENTRY.pack(operation=operation, page_size=int(part.step > 1)), "little")
        gfns = np.arange(pages.start, pages.stop, pages.step, dtype=np.uint64)
        result.append(gfns << np.uint64(PSC_ENTRY.fields["gfn"].lo) | np.uint64(kind))
        start, stop = start - len(part), stop - len(part)
    return np.concatenate(result)


async def _change(ghcb: Ghcb, pages: range, *, validate: bool) -> None:
    """PVALIDATE a run; above VMPL0 the SVSM does it."""
    if ghcb.area:
        await change_validation(ghcb.area, pages, validate=validate)
        return
    for start in range(0, len(pages), _PAGES):
        await _pvalidate(ghcb, pages[start : start + _PAGES], validate=validate)


async def _pvalidate(ghcb: Ghcb, pages: range, *, validate: bool) -> None:
    """One run; those of its 2 MB pages that the host backs with 4 KB pages one by one."""
    large = pages.step > 1
    codes, unchanged = await ghcb.cpu.pvalidate(pages.start << PAGE_SHIFT, len(pages), validate=validate, large=large)
    smaller = (codes == RmpCode.FAIL_SIZEMISMATCH) & large
    bad = ~smaller & ((codes != RmpCode.SUCCESS) | unchanged)
    if bad.any():
        number = int(np.argmax(bad))
        what = f"code {codes[number]}" if codes[number] else "it had been so before"
        await terminate(ghcb.cpu, Reason.PVALIDATE, f"page {pages[number]:#x}: {what}")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], smaller, [False]]).astype(np.int8)))
    for first, stop in edges.reshape(-1, 2).tolist():
        run = range(pages.start + first * PAGES_PER_LARGE, pages.start + stop * PAGES_PER_LARGE)
        await _change(ghcb, run, validate=validate)
