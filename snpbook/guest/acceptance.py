"""Pages change sides: the hypervisor is asked, and PVALIDATE makes the guest's own record of what it holds.

Only this file validates. To private: ask, then validate. To shared: rescind, then ask. Each page is validated once: a
PVALIDATE that changes nothing means that the hypervisor has put another page there, and ends the guest. A host without
2 MB pages answers a 2 MB PVALIDATE with a size mismatch, and its 512 pages are validated one by one. Sources: GHCB
specification; Linux arch/x86/coco/sev/core.c (vmgexit_psc, pvalidate_pages).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.termination import terminate
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import PSC_ENTRIES, PSC_ENTRY, PSC_HEADER, Nae, PageOperation
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.termination import Reason


async def accept(ghcb: Ghcb, pages: range, entries: int = PSC_ENTRIES) -> None:
    """Make pages private and validate them, 2 MB at a time where the range allows.

    A list has `entries` at most: Linux, whose stack bounds them, makes 64, and the buffer holds `PSC_ENTRIES`.
    """
    parts = _parts(pages)
    await ask(ghcb, parts, PageOperation.PRIVATE, entries)
    for run in parts:
        await _validate(ghcb, run)


async def give_up(ghcb: Ghcb, pages: range, entries: int = PSC_ENTRIES) -> None:
    """Rescind the validation of pages and make them shared; what is in them is lost to the guest."""
    parts = _parts(pages)
    for run in parts:
        await _validate(ghcb, run, validate=False)
    await ask(ghcb, parts, PageOperation.SHARED, entries)


def _parts(pages: range) -> list[range]:
    """Single pages up to the first 2 MB boundary, 2 MB pages by their first, and single pages again."""
    first = min(-(-pages.start // PAGES_PER_LARGE) * PAGES_PER_LARGE, pages.stop)
    last = max(pages.stop // PAGES_PER_LARGE * PAGES_PER_LARGE, first)
    parts = [range(pages.start, first), range(first, last, PAGES_PER_LARGE), range(last, pages.stop)]
    return [part for part in parts if part]


async def ask(ghcb: Ghcb, parts: Sequence[range], operation: PageOperation, entries: int = PSC_ENTRIES) -> None:
    """Page state changes, `entries` a call. A range with steps of 512 stands for 2 MB pages.

    The hypervisor may stop early and is asked again; an error, going back or changing the list ends the guest.
    """
    if not 0 < entries <= PSC_ENTRIES:
        raise ValueError(f"entries = {entries}: a list has 1 to {PSC_ENTRIES}")
    words = np.concatenate([np.empty(0, np.uint64), *(_words(pages, operation) for pages in parts)])
    for start in range(0, len(words), entries):
        batch = words[start : start + entries]
        header = PSC_HEADER.pack(cur_entry=0, end_entry=len(batch) - 1)
        buffer = (header + batch.astype("<u8").tobytes()).ljust(spec.SHARED_BUFFER_SIZE, b"\0")
        done = 0
        while done < len(batch):
            answer = await ghcb.call(
                Nae.PAGE_STATE_CHANGE, reason=Reason.PSC, sw_scratch=ghcb.shared_buffer, shared_buffer=buffer
            )
            buffer = answer.shared_buffer
            state, before = PSC_HEADER.unpack(buffer), done
            done = state.cur_entry
            honest = before < done <= len(batch) == state.end_entry + 1 and not PSC_HEADER.reserved_set(buffer)
            if answer.sw_exit_info_2 or not honest:
                await terminate(ghcb.cpu, Reason.PSC, f"entry {done}: {answer.sw_exit_info_2:#x}")


def _words(pages: range, operation: PageOperation) -> NDArray[np.uint64]:
    kind = int.from_bytes(PSC_ENTRY.pack(operation=operation, page_size=int(pages.step > 1)), "little")
    gfns = np.arange(pages.start, pages.stop, pages.step, dtype=np.uint64)
    return gfns << np.uint64(PSC_ENTRY.fields["gfn"].lo) | np.uint64(kind)


async def _validate(ghcb: Ghcb, pages: range, *, validate: bool = True) -> None:
    """PVALIDATE a run; those of its 2 MB pages that the host backs with 4 KB pages one by one."""
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
        await _validate(ghcb, run, validate=validate)
