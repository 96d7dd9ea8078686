"""The guest's boot: page tables, GHCB, the size of memory, and the acceptance of every page of it.

The program stands for the code in the firmware image, so it knows the image's own tables; everything
else it learns from its memory and from the hypervisor. Each guest page is validated once and never
again: a second PVALIDATE that changes nothing ends the guest. Sources: edk2 OvmfPkg (order of steps);
GHCB specification; Linux arch/x86/coco/sev.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snpbook.guest.ghcb import Ghcb, Reason, terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import ghcb as spec
from snpbook.spec import kvm
from snpbook.spec.ghcb import PSC_ENTRIES, PSC_ENTRY, PSC_HEADER, Nae, PageOperation
from snpbook.spec.image import FOUR_GIB, Image, ImageError, SectionType
from snpbook.spec.kvm import Cmos
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.vmcb import PTE_LARGE, PTE_PRESENT, PTE_USER, PTE_WRITE, PTES_PER_TABLE
from snpbook.spec.vmsa import CR0_ET, CR0_PE, CR0_PG, CR4_MCE, CR4_PAE, EFER_LMA, EFER_LME, EFER_SVME

_RIGHTS = PTE_PRESENT | PTE_WRITE | PTE_USER
_GIB = 1 << 30
TABLE_PAGES = 4
"""PML4, one page of 1 GB entries, one of 2 MB entries, one of 4 KB entries for the shared pages."""
SHARED_PAGES = 3
"""GHCB, request page, response page."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the program puts what it needs: page tables in validated memory, shared pages in free RAM."""

    tables: int
    shared: int
    secrets: int

    @classmethod
    def of(cls, image: Image) -> Layout:
        """Choose the places from the image's metadata.

        `ImageError` where the image has no secrets page or no room that is validated at launch.
        """
        rom = image.gpa >> PAGE_SHIFT
        room = [s for s in image.sections_of(SectionType.SEC_MEM) if s.size >= TABLE_PAGES * PAGE_SIZE]
        secrets = image.sections_of(SectionType.SECRETS)
        if not secrets or not room:
            missing = "secrets page" if not secrets else f"SEC memory of {TABLE_PAGES} pages"
            found = f"SEV metadata without a {missing}" if image.sections else "no SEV metadata"
            raise ImageError(f"the image cannot boot as an SNP guest: it has {found}")
        taken = {page for s in image.sections for page in range(s.gpa >> PAGE_SHIFT, s.gpa + s.size >> PAGE_SHIFT)}
        free = (
            base + i
            for base in range(0, rom, PAGES_PER_LARGE)
            for i in range(1, PAGES_PER_LARGE - SHARED_PAGES)
            if taken.isdisjoint(range(base + i, base + i + SHARED_PAGES))
        )
        return cls(room[0].gpa, next(free) << PAGE_SHIFT, secrets[0].gpa)

    @property
    def ghcb(self) -> int:
        return self.shared

    @property
    def request(self) -> int:
        return self.shared + PAGE_SIZE

    @property
    def response(self) -> int:
        return self.shared + 2 * PAGE_SIZE


async def boot(cpu: GuestCpu, image: Image, c_bit: int) -> int:
    """Bring the guest up; the bytes of memory that it accepted."""
    place = Layout.of(image)
    await enable_paging(cpu, place, c_bit)
    ghcb = await Ghcb.register(cpu, place.ghcb)
    accepted = 0
    for pages in unaccepted(image, place, await memory_ranges(ghcb)):
        await accept(ghcb, pages)
        accepted += len(pages) * PAGE_SIZE
    return accepted


async def enable_paging(cpu: GuestCpu, place: Layout, c_bit: int) -> None:
    """An identity map of 512 GiB with the C-bit everywhere but on the shared pages; then long mode."""
    private = 1 << c_bit
    pml4, pdpt, pd, pt = (place.tables + i * PAGE_SIZE for i in range(TABLE_PAGES))
    numbers = np.arange(PTES_PER_TABLE, dtype=np.uint64)
    gigabyte, region = place.shared // _GIB, place.shared // LARGE_PAGE_SIZE

    first = np.zeros(PTES_PER_TABLE, np.uint64)
    first[0] = pdpt | _RIGHTS | private
    third = numbers * np.uint64(_GIB) | np.uint64(_RIGHTS | PTE_LARGE | private)
    third[gigabyte] = pd | _RIGHTS | private
    second = (numbers + np.uint64(gigabyte * PTES_PER_TABLE)) * np.uint64(LARGE_PAGE_SIZE)
    second |= np.uint64(_RIGHTS | PTE_LARGE | private)
    second[region % PTES_PER_TABLE] = pt | _RIGHTS | private
    small = (numbers + np.uint64(region * PTES_PER_TABLE)) * np.uint64(PAGE_SIZE) | np.uint64(_RIGHTS)
    start = place.shared % LARGE_PAGE_SIZE // PAGE_SIZE
    hidden = (numbers < start) | (numbers >= start + SHARED_PAGES)
    small[hidden] |= np.uint64(private)

    await cpu.write(pml4, b"".join(table.astype("<u8").tobytes() for table in (first, third, second, small)))
    await cpu.load(
        cr3=pml4 | private,
        cr4=CR4_MCE | CR4_PAE,
        efer=EFER_SVME | EFER_LME | EFER_LMA,
        cr0=CR0_PG | CR0_ET | CR0_PE,
    )


async def memory_ranges(ghcb: Ghcb) -> list[range]:
    """RAM as the clock's registers tell it, in pages."""

    async def word(*registers: Cmos) -> int:
        value = 0
        for position, register in enumerate(registers):
            await ghcb.port_out(Cmos.INDEX_PORT, register)
            value |= await ghcb.port_in(Cmos.DATA_PORT) << 8 * position
        return value

    above_16m = await word(Cmos.ABOVE_16M_LOW, Cmos.ABOVE_16M_HIGH) * kvm.CMOS_UNIT_16M
    above_1m = await word(Cmos.ABOVE_1M_LOW, Cmos.ABOVE_1M_HIGH) * kvm.CMOS_UNIT_1M
    above_4g = await word(Cmos.ABOVE_4G_LOW, Cmos.ABOVE_4G_MID, Cmos.ABOVE_4G_HIGH) * kvm.CMOS_UNIT_16M
    low = kvm.SIXTEEN_MIB + above_16m if above_16m else kvm.ONE_MIB + above_1m
    ranges = [range(low >> PAGE_SHIFT)]
    if above_4g:
        ranges.append(range(FOUR_GIB >> PAGE_SHIFT, FOUR_GIB + above_4g >> PAGE_SHIFT))
    return ranges


def unaccepted(image: Image, place: Layout, memory: list[range]) -> list[range]:
    """The parts of memory that the launch did not validate and that are to be private."""
    taken = [(s.gpa >> PAGE_SHIFT, s.gpa + s.size >> PAGE_SHIFT) for s in image.sections]
    taken.append((place.shared >> PAGE_SHIFT, (place.shared >> PAGE_SHIFT) + SHARED_PAGES))
    result = []
    for pages in memory:
        start = pages.start
        for first, stop in sorted(taken):
            if start < first < pages.stop:
                result.append(range(start, first))
            if first < pages.stop and stop > start:
                start = stop
        if start < pages.stop:
            result.append(range(start, pages.stop))
    return result


async def accept(ghcb: Ghcb, pages: range) -> None:
    """Make pages private: ask the hypervisor, then validate. 2 MB at a time where the range allows."""
    first = min(-(-pages.start // PAGES_PER_LARGE) * PAGES_PER_LARGE, pages.stop)
    last = max(pages.stop // PAGES_PER_LARGE * PAGES_PER_LARGE, first)
    small = PSC_ENTRY.record(operation=PageOperation.PRIVATE)
    large = small.replace(page_size=1)
    await _ask(
        ghcb,
        [
            (small, range(pages.start, first)),
            (large, range(first, last, PAGES_PER_LARGE)),
            (small, range(last, pages.stop)),
        ],
    )
    await _validate(ghcb, range(pages.start, first))
    await _validate_large(ghcb, range(first, last, PAGES_PER_LARGE))
    await _validate(ghcb, range(last, pages.stop))


async def _ask(ghcb: Ghcb, parts: list[tuple[object, range]]) -> None:
    """Page state changes, as many entries a call as the shared buffer holds.

    The hypervisor may stop early and is asked again; going back or changing the list ends the guest.
    """
    words = np.concatenate(
        [
            np.arange(pages.start, pages.stop, pages.step, dtype=np.uint64) << np.uint64(PSC_ENTRY.fields["gfn"].lo)
            | np.uint64(int.from_bytes(bytes(kind), "little"))  # type: ignore[call-overload]
            for kind, pages in parts
        ]
    )
    for start in range(0, len(words), PSC_ENTRIES):
        batch = words[start : start + PSC_ENTRIES]
        header = PSC_HEADER.pack(cur_entry=0, end_entry=len(batch) - 1)
        buffer = (header + batch.astype("<u8").tobytes()).ljust(spec.SHARED_BUFFER_SIZE, b"\0")
        done = 0
        while done < len(batch):
            answer = await ghcb.call(Nae.PAGE_STATE_CHANGE, sw_scratch=ghcb.shared_buffer, shared_buffer=buffer)
            buffer = answer.shared_buffer
            state, before = PSC_HEADER.unpack(buffer), done
            done = state.cur_entry
            honest = before < done <= len(batch) == state.end_entry + 1 and not PSC_HEADER.reserved_set(buffer)
            if answer.sw_exit_info_2 or not honest:
                await terminate(ghcb.cpu, Reason.PSC, f"entry {done}: {answer.sw_exit_info_2:#x}")


async def _validate(ghcb: Ghcb, pages: range) -> None:
    if len(pages):
        codes, unchanged = await ghcb.cpu.pvalidate(pages.start << PAGE_SHIFT, len(pages))
        if codes.any() or unchanged.any():
            bad = pages[int(np.argmax((codes != RmpCode.SUCCESS) | unchanged))]
            await terminate(ghcb.cpu, Reason.PVALIDATE, f"page {bad:#x} was not validated by this call")


async def _validate_large(ghcb: Ghcb, pages: range) -> None:
    """2 MB pages; where the host backs one with 4 KB pages, its 512 pages one by one."""
    if not len(pages):
        return
    codes, unchanged = await ghcb.cpu.pvalidate(pages.start << PAGE_SHIFT, len(pages), large=True)
    smaller = codes == RmpCode.FAIL_SIZEMISMATCH
    bad = ~smaller & ((codes != RmpCode.SUCCESS) | unchanged)
    if bad.any():
        await terminate(ghcb.cpu, Reason.PVALIDATE, f"2 MB page {pages[int(np.argmax(bad))]:#x}")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], smaller, [False]]).astype(np.int8)))
    for first, stop in edges.reshape(-1, 2).tolist():
        await _validate(ghcb, range(pages.start + first * PAGES_PER_LARGE, pages.start + stop * PAGES_PER_LARGE))
