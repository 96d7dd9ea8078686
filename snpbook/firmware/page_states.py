"""Commands on pages that name no guest: SNP_PAGE_RECLAIM, SNP_PAGE_SET_STATE, SNP_PAGE_UNSMASH.

Sources: SNP ABI, page states; order of checks of firmware 1.55.25.
"""

from __future__ import annotations

import numpy as np

from snpbook.firmware.pages import (
    ADDRESS_LIMIT,
    check_address,
    check_run,
    first_refusal,
    look_up,
    make_fixed,
    make_large,
    reclaim,
    refused_address,
    without_c_bit,
)
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.range_list import pages_between, pages_of, read_entries
from snpbook.hardware.dram import Words, page_numbers
from snpbook.hardware.rmp import U64
from snpbook.spec import rmp as spec
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, PageState
from snpbook.spec.platform import RANGE_ENTRY, RANGE_LIST_HEADER, RANGE_LIST_LIMIT
from snpbook.spec.snp_buffers import SNP_PAGE_SET_STATE
from snpbook.spec.status import FirmwareRefusal, Status, require

_RECLAIMABLE = (PageState.METADATA, PageState.FIRMWARE, PageState.PRE_GUEST, PageState.PRE_SWAP)
_ALIKE = U64(spec.ASSIGNED | spec.LARGE | spec.IMMUTABLE | spec.ASID | spec.VMSA | spec.VALIDATED)
"""Bits of the first word in which the pages of a region must agree to be joined."""


def snp_page_reclaim(psp: SecureProcessor, buffer: Record) -> None:
    """Take a page back from the firmware's or a launch's hold."""
    _, refusal = reclaim_run(psp, buffer, range(buffer.page, buffer.page + 1))
    if refusal is not None:
        raise refusal


def reclaim_run(psp: SecureProcessor, buffer: Record, pages: range) -> tuple[int, FirmwareRefusal | None]:
    """SNP_PAGE_RECLAIM for a run of pages; a page that is not immutable is a success without effect."""
    # CHECKS
    psp.require_initialised()
    step = PAGES_PER_LARGE if buffer.page_size else 1
    pages, bad_address = check_run(psp, pages, step * PAGE_SIZE, "page")
    numbers = page_numbers(pages)
    entries, states = look_up(psp, numbers)
    large = entries[:, 0] & U64(spec.LARGE) != 0
    held = entries[:, 0] & U64(spec.IMMUTABLE) != 0
    takeable = np.isin(states, _RECLAIMABLE)
    misaligned = numbers % U64(step) != 0
    stop, refusal = first_refusal(
        [
            (FirmwareRefusal(Status.INVALID_PAGE_SIZE, "RMP page size", buffer.page_size), large != (step > 1)),
            (FirmwareRefusal(Status.INVALID_ADDRESS, "a 2 MB page is aligned", 0), misaligned),
            (FirmwareRefusal(Status.INVALID_PAGE_STATE, "page state", "a reclaimable one"), held & ~takeable),
        ],
        len(pages),
    )

    # ACTION
    taken = numbers[:stop][held[:stop]]
    if len(taken):
        reclaim(psp, taken)
    return stop, refusal or bad_address


def snp_page_set_state(psp: SecureProcessor, buffer: Record) -> None:
    """Firmware -> HV-Fixed for the pages of a list: memory that the host will not give away before the next boot.

    Of a listed range the table's own part is skipped and what lies beyond its coverage is ignored.
    """
    # CHECKS
    size = SNP_PAGE_SET_STATE.size
    require(buffer.length == size, Status.INVALID_LENGTH, "length of the buffer", size, buffer.length)
    psp.require_reserved_zero()
    psp.require_initialised()
    ranges = _read_list(psp, buffer.list_paddr)
    misaligned = [hex(pages.start << PAGE_SHIFT) for pages in ranges if pages.start % PAGES_PER_LARGE]
    require(not misaligned, Status.INVALID_PARAM, "listed ranges begin at a 2 MB boundary", [], misaligned)
    runs = [run for pages in ranges for run in _without_rmp(psp, pages)]
    for run in runs:
        entries, states = look_up(psp, page_numbers(run))
        wrong = (states != PageState.FIRMWARE) | (entries[:, 0] & U64(spec.LARGE) != 0)
        require(not wrong.any(), Status.INVALID_PAGE_STATE, f"all pages of {run}", "FIRMWARE of 4K", int(wrong.sum()))

    # ACTION
    for run in runs:
        make_fixed(psp, page_numbers(run))


def _read_list(psp: SecureProcessor, address: int) -> list[range]:
    """The page ranges of a list, all of which stands in one page. A base counts in whole pages."""
    spa = without_c_bit(psp, address)
    bad = refused_address(psp, spa, RANGE_LIST_HEADER.size, "list_paddr", lookup=False)
    if bad is not None:
        raise FirmwareRefusal(Status.INVALID_ADDRESS, bad.rule, bad.expected, bad.found)
    room, header = PAGE_SIZE - spa % PAGE_SIZE, RANGE_LIST_HEADER.size
    require(header <= room, Status.INVALID_PARAM, "the list stays in its page", header, room)
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, room)
    count = RANGE_LIST_HEADER.unpack(data).count
    require(count <= RANGE_LIST_LIMIT, Status.INVALID_PARAM, "number of ranges", RANGE_LIST_LIMIT, count)
    size = header + count * RANGE_ENTRY.size
    require(size <= room, Status.INVALID_PARAM, "the list stays in its page", size, room)
    entries = read_entries(data, count)
    clear = not RANGE_LIST_HEADER.reserved_set(data) and all(good for _, good in entries)
    require(clear, Status.INVALID_PARAM, "reserved bytes of the list are zero", 0, "others")
    unaligned = [entry.base for entry, _ in entries if entry.base % PAGE_SIZE]
    require(not unaligned, Status.INVALID_PARAM, "listed ranges begin at a 2 MB boundary", [], unaligned)
    return [pages_of(entry) for entry, _ in entries]


def _without_rmp(psp: SecureProcessor, pages: range) -> list[range]:
    """The parts of a range that the table has entries of and that are not the table."""
    rmp = psp.machine.rmp
    own = pages_between(rmp.where.base, rmp.where.end + 1)
    before = range(pages.start, min(pages.stop, own.start, rmp.entries))
    behind = range(max(pages.start, own.stop), min(pages.stop, rmp.entries))
    return [part for part in (before, behind) if len(part)]


def snp_page_unsmash(psp: SecureProcessor, buffer: Record) -> None:
    """Join the 512 pages of a 2 MB region that a guest is to get as one; it stays immutable."""
    # CHECKS
    misaligned = buffer.page_paddr % LARGE_PAGE_SIZE
    require(not misaligned, Status.INVALID_PARAM, "page_paddr is 2 MB-aligned", 0, misaligned)
    psp.require_initialised()
    first = _check_region(psp, without_c_bit(psp, buffer.page_paddr))
    pages = np.arange(first, first + PAGES_PER_LARGE, dtype=U64)
    entries, states = look_up(psp, pages)
    joinable = _joinable(entries) and states[0] in (PageState.PRE_GUEST, PageState.PRE_SWAP)
    require(joinable, Status.INVALID_PAGE_STATE, "512 pages of one guest, alike and in a row", "alike", "different")

    # ACTION
    make_large(psp, first)


def _check_region(psp: SecureProcessor, spa: int) -> int:
    """The first page of a region that the table covers and that is not the table's own."""
    first, end, rmp = spa >> PAGE_SHIFT, spa + LARGE_PAGE_SIZE, psp.machine.rmp
    covered = first + PAGES_PER_LARGE <= rmp.entries or end > ADDRESS_LIMIT
    require(covered, Status.INVALID_PAGE_STATE, "the region has entries", "an entry", PageState.DEFAULT.name)
    inside = rmp.where.base <= spa and end <= rmp.where.end + 1
    require(not inside, Status.INVALID_PARAM, "page_paddr is not inside the RMP", "elsewhere", spa)
    check_address(psp, spa, LARGE_PAGE_SIZE, "page_paddr", lookup=False)
    return first


def _joinable(entries: Words) -> bool:
    """Whether 512 raw entries are those of 4 KB pages of one guest, none a VMSA, at consecutive guest addresses."""
    low, gfns = entries[:, 0], (entries[:, 0] & U64(spec.GFN)) >> U64(spec.GFN_SHIFT)
    flags = low & _ALIKE
    alike = (flags == flags[0]).all() and (entries[:, 1] == entries[0, 1]).all()
    plain = not int(flags[0]) & (spec.LARGE | spec.VMSA)
    in_row = int(gfns[0]) % PAGES_PER_LARGE == 0 and (gfns - gfns[0] == np.arange(PAGES_PER_LARGE, dtype=U64)).all()
    return bool(alike and plain and in_row)
