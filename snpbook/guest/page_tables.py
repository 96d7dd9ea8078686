"""The guest's page tables: one-to-one, with the C-bit on everything that is private.

Only this file writes them. 512 GiB are mapped by 1 GB and 2 MB entries, and by 4 KB entries around the shared pages;
more of them are taken apart as pages change sides. Sources: APM2 5.3, 15.34.5; edk2 OvmfPkg (reset vector).
"""

from __future__ import annotations

import numpy as np

from snpbook.guest.layout import SHARED_PAGES, TABLE_PAGES, Layout
from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.termination import GeneralReason
from snpbook.spec.vmcb import PTE_LARGE, PTE_PRESENT, PTE_USER, PTE_WRITE, PTES_PER_TABLE
from snpbook.spec.vmsa import CR0_ET, CR0_PE, CR0_PG, CR4_MCE, CR4_PAE, EFER_LMA, EFER_LME, EFER_SVME

_RIGHTS = PTE_PRESENT | PTE_WRITE | PTE_USER
_GIB = 1 << 30
_ENTRY = 8
_SHIFTS = (39, 30, 21, 12)
"""The lowest address bit of each level's index."""


async def enable_paging(cpu: GuestCpu, place: Layout, c_bit: int | None, probe: int = 0) -> None:
    """Map 512 GiB with the C-bit, if any, everywhere but on the shared pages; then long mode.

    The last entry, which maps nothing, holds `probe`, for `verify_c_bit`.
    """
    private = _bit(c_bit)
    pml4, pdpt, pd, pt = (place.tables + i * PAGE_SIZE for i in range(TABLE_PAGES))
    numbers = np.arange(PTES_PER_TABLE, dtype=np.uint64)
    gigabyte, region = place.shared // _GIB, place.shared // LARGE_PAGE_SIZE

    first = np.zeros(PTES_PER_TABLE, np.uint64)
    first[0], first[-1] = pdpt | _RIGHTS | private, probe
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
    await use(cpu, place, c_bit)


async def use(cpu: GuestCpu, place: Layout, c_bit: int | None) -> None:
    """Long mode with the tables that are there: what every further processor does."""
    await cpu.load(
        cr3=place.tables | _bit(c_bit),
        cr4=CR4_MCE | CR4_PAE,
        efer=EFER_SVME | EFER_LME | EFER_LMA,
        cr0=CR0_PG | CR0_ET | CR0_PE,
    )


async def verify_c_bit(cpu: GuestCpu, place: Layout, probe: int) -> None:
    """Read back the probe, which was written before paging was on, when all memory is private.

    With the wrong bit the page would be shared, and the guest would find what the host has there. Linux halts for
    ever (sev_verify_cbit); here the guest ends (MODEL).
    """
    last = place.tables + PAGE_SIZE - _ENTRY
    if await _entry(cpu, last) != probe:
        await terminate(cpu, GeneralReason.GENERAL, "memory is not encrypted by the bit that CPUID names")
    await cpu.write(last, bytes(_ENTRY))


def probe_of(random: int) -> int:
    """A probe that maps nothing."""
    return random & ~PTE_PRESENT


def _bit(c_bit: int | None) -> int:
    return 0 if c_bit is None else 1 << c_bit


async def mark(cpu: GuestCpu, place: Layout, c_bit: int, pages: range, *, private: bool) -> None:
    """Set or clear the C-bit of pages, whole 2 MB entries where they are, and drop all translations.

    `ValueError` where no spare page is left for a table.
    """
    for region in range(pages.start // PAGES_PER_LARGE, -(-pages.stop // PAGES_PER_LARGE)):
        first = max(pages.start - region * PAGES_PER_LARGE, 0)
        stop = min(pages.stop - region * PAGES_PER_LARGE, PAGES_PER_LARGE)
        gigabyte, index = divmod(region, PTES_PER_TABLE)
        table = await _below(cpu, place, c_bit, place.tables + PAGE_SIZE + gigabyte * _ENTRY, LARGE_PAGE_SIZE)
        entry = table + index * _ENTRY
        if stop - first < PAGES_PER_LARGE or not await _entry(cpu, entry) & PTE_LARGE:
            table = await _below(cpu, place, c_bit, entry, PAGE_SIZE)
            await _flip(cpu, table + first * _ENTRY, stop - first, 1 << c_bit, private=private)
        else:
            await _flip(cpu, entry, 1, 1 << c_bit, private=private)
    (cr3,) = await cpu.look("cr3")
    await cpu.load(cr3=cr3)


async def leaf(cpu: GuestCpu, address: int) -> tuple[int, int]:
    """The entry that maps a virtual address and the guest address behind that, by a walk from CR3; (0, 0) for none."""
    (entry,) = await cpu.look("cr3")
    for shift in _SHIFTS:
        entry = await _entry(cpu, _table_of(entry) + (address >> shift) % PTES_PER_TABLE * _ENTRY)
        if not entry & PTE_PRESENT:
            break
        if entry & PTE_LARGE or shift == PAGE_SHIFT:
            return entry, _table_of(entry) >> shift << shift | address & (1 << shift) - 1
    return 0, 0


def _table_of(entry: int) -> int:
    """The address in an entry, without the C-bit, which no address of this map reaches."""
    return entry & (_GIB * PTES_PER_TABLE - 1) & -PAGE_SIZE


async def _entry(cpu: GuestCpu, address: int) -> int:
    return int.from_bytes(await cpu.read(address, _ENTRY), "little")


async def _flip(cpu: GuestCpu, address: int, count: int, bit: int, *, private: bool) -> None:
    words = np.frombuffer(await cpu.read(address, count * _ENTRY), "<u8")
    words = words | np.uint64(bit) if private else words & ~np.uint64(bit)
    await cpu.write(address, words.astype("<u8").tobytes())


async def _below(cpu: GuestCpu, place: Layout, c_bit: int, address: int, size: int) -> int:
    """The table below the entry at `address`; a large entry becomes one of entries of `size` bytes each."""
    entry = await _entry(cpu, address)
    if not entry & PTE_LARGE:
        return _table_of(entry)
    table = await _spare(cpu, place)
    numbers = np.arange(PTES_PER_TABLE, dtype=np.uint64) * np.uint64(size)
    flags = entry if size > PAGE_SIZE else entry & ~PTE_LARGE
    await cpu.write(table, (numbers + np.uint64(flags)).astype("<u8").tobytes())
    await cpu.write(address, (table | _RIGHTS | 1 << c_bit).to_bytes(_ENTRY, "little"))
    return table


async def _spare(cpu: GuestCpu, place: Layout) -> int:
    """A page behind the tables that is none yet: a table's first entry is never zero."""
    for number in range(TABLE_PAGES, TABLE_PAGES + place.spare_tables):
        if not await _entry(cpu, place.tables + number * PAGE_SIZE):
            return place.tables + number * PAGE_SIZE
    raise ValueError(f"the {place.spare_tables} spare pages for page tables are used up: convert whole 2 MB regions")
