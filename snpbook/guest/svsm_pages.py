"""Validation by an SVSM: a guest above VMPL0 lists its pages, and VMPL0 executes PVALIDATE on them.

What PVALIDATE would have answered comes back as a code, and is taken as it would have been. Source: Linux
arch/x86/coco/sev/shared.c (svsm_pval_pages).
"""

from __future__ import annotations

import numpy as np

from snpbook.guest.calling_area import CallingArea
from snpbook.guest.termination import terminate
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.svsm import PVALIDATE_ENTRIES, PVALIDATE_ENTRY, PVALIDATE_LIST, Core, Protocol, SvsmCode
from snpbook.spec.termination import Reason


async def change_validation(area: CallingArea, pages: range, *, validate: bool) -> None:
    """Validate pages, or rescind that: a range with steps of 512 stands for 2 MB pages.

    Those of them that the host backs with 4 KB pages go one by one; anything else that is refused ends the guest.
    """
    left = pages
    while left:
        done, code = await _ask(area, left[:PVALIDATE_ENTRIES], validate=validate)
        left = left[done:]
        if code == SvsmCode.SIZE_MISMATCH and pages.step > 1:
            await change_validation(area, range(left[0], left[0] + PAGES_PER_LARGE), validate=validate)
            left = left[1:]
        elif code != SvsmCode.SUCCESS or not done:
            what = "it had been so before" if code == SvsmCode.UNCHANGED else f"code {code:#x}"
            await terminate(area.cpu, Reason.PVALIDATE, f"page {left[0] if left else pages[0]:#x}: {what}")


async def _ask(area: CallingArea, pages: range, *, validate: bool) -> tuple[int, int]:
    """One list: how many of its pages are done, and the code of the next one."""
    kind = int.from_bytes(PVALIDATE_ENTRY.pack(page_size=int(pages.step > 1), validate=int(validate)), "little")
    words = np.arange(pages.start, pages.stop, pages.step, dtype=np.uint64) << np.uint64(PAGE_SHIFT) | np.uint64(kind)
    head = PVALIDATE_LIST.pack(entries=len(pages))
    await area.cpu.write(area.buffer, head + words.astype("<u8").tobytes())
    answer = await area.ask(Protocol.CORE, Core.PVALIDATE, area.buffer)
    told = PVALIDATE_LIST.unpack(await area.cpu.read(area.buffer, PVALIDATE_LIST.size))
    return min(told.next, len(pages)), answer.code
