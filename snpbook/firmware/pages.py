"""Page states in the firmware's eyes: looking them up, demanding them, moving pages between them.

Only this file writes RMP entries on the firmware's behalf. Source: SNP ABI, page states; firmware
1.55.25 for the codes of bad addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Words
from snpbook.hardware.rmp import LARGE_MASK, U64, decode_states
from snpbook.spec import rmp as spec
from snpbook.spec.commands import LOCATION_BITS, LOCATION_DEFAULT_PAGE
from snpbook.spec.memory_map import ASEG
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, PageSize, PageState
from snpbook.spec.rmp import ASSIGNED, IMMUTABLE, LOCK, VALIDATED
from snpbook.spec.status import FirmwareRefusal, Status, require

if TYPE_CHECKING:
    from snpbook.firmware.processor import SecureProcessor

ADDRESS_LIMIT = spec.FIRMWARE_ADDRESS_LIMIT
_LOCATIONS = 64 // LOCATION_BITS + 1
"""As many ids as leave a trace in the 64 bits of error information."""
_OUTPUT = (PageState.FIRMWARE, PageState.DEFAULT)
"""The states in which the firmware writes a page for the host once SNP is on."""


def check_address(psp: SecureProcessor, spa: int, size: int, name: str, *, lookup: bool = True) -> int:
    """A buffer that the firmware is asked to touch: the address without the C-bit, if it may.

    `lookup` is for addresses whose page state is wanted: inside the RMP those are INVALID_PARAM,
    mere data accesses INVALID_ADDRESS.
    """
    spa = without_c_bit(psp, spa)
    refusal = refused_address(psp, spa, size, name, lookup)
    if refusal is not None:
        raise refusal
    return spa


def check_run(psp: SecureProcessor, pages: range, size: int, name: str) -> tuple[range, FirmwareRefusal | None]:
    """`check_address` for the `size` bytes of each page: the pages before the first bad one, and its refusal."""
    first = without_c_bit(psp, pages.start << PAGE_SHIFT) >> PAGE_SHIFT
    pages = range(first, first + len(pages) * pages.step, pages.step)
    joined = pages.step << PAGE_SHIFT == size
    if joined and refused_address(psp, first << PAGE_SHIFT, len(pages) * size, name, lookup=True) is None:
        return pages, None
    for index, page in enumerate(pages):
        refusal = refused_address(psp, page << PAGE_SHIFT, size, name, lookup=True)
        if refusal is not None:
            return pages[:index], refusal
    return pages, None


def without_c_bit(psp: SecureProcessor, spa: int) -> int:
    """The address that is meant: the C-bit is ignored."""
    return spa & ~(1 << psp.machine.product.c_bit)


def refused_address(psp: SecureProcessor, spa: int, size: int, name: str, lookup: bool) -> FirmwareRefusal | None:
    """Why the firmware does not touch a range of bytes, which has no C-bit; None where it may."""
    end, rmp = spa + size, psp.machine.rmp.where
    if end > ADDRESS_LIMIT:
        return FirmwareRefusal(Status.INVALID_ADDRESS, f"{name} is below the address limit", ADDRESS_LIMIT, spa)
    if spa <= rmp.end and end > rmp.base:
        status = Status.INVALID_PARAM if lookup else Status.INVALID_ADDRESS
        return FirmwareRefusal(status, f"{name} is not inside the RMP", "elsewhere", spa)
    forbidden = {"TSEG": psp.machine.map.tseg, "ASEG": ASEG, "the TMR": psp.legacy.tmr or (0, 0)}
    for region, (start, stop) in forbidden.items():
        if spa < stop and end > start:
            return FirmwareRefusal(Status.INVALID_ADDRESS, f"{name} is not in {region}", "elsewhere", spa)
    if not any(start <= spa and end <= stop for start, stop in psp.machine.map.dram):
        return FirmwareRefusal(Status.INVALID_CONFIG, f"{name} lies in one region of DRAM", "DRAM", spa)
    return None


def look_up(psp: SecureProcessor, pages: Words) -> tuple[Words, NDArray[np.uint8]]:
    """The entries (n, 2) that answer for pages, and their states; a page that the RMP does not cover is Default."""
    rmp = psp.machine.rmp
    covered = pages < U64(rmp.entries)
    if covered.all():
        entries = rmp.effective(pages)
        return entries, decode_states(entries)
    for _ in range(min(int((~covered).sum()), _LOCATIONS)):
        psp.machine.mailbox.push(LOCATION_DEFAULT_PAGE)
    entries = np.zeros((len(pages), 2), U64)
    entries[covered] = rmp.effective(pages[covered])
    return entries, np.where(covered, decode_states(entries), np.uint8(PageState.DEFAULT))


def state_of(psp: SecureProcessor, spa: int) -> PageState:
    """The state of the page at an address that `check_address` has passed."""
    state = psp.machine.rmp.state(spa >> PAGE_SHIFT)
    if state is PageState.DEFAULT:
        psp.machine.mailbox.push(LOCATION_DEFAULT_PAGE)
    return state


def require_state(psp: SecureProcessor, spa: int, name: str, *allowed: PageState) -> None:
    """INVALID_PAGE_STATE unless the page is in one of the states."""
    found = state_of(psp, spa)
    wanted = " or ".join(state.name for state in allowed)
    require(found in allowed, Status.INVALID_PAGE_STATE, f"state of {name}", wanted, found.name)


def require_small(psp: SecureProcessor, spa: int, name: str) -> None:
    """INVALID_PAGE_SIZE where the page lies in a 2 MB entry."""
    entries, _ = look_up(psp, np.array([spa >> PAGE_SHIFT], U64))
    require(not int(entries[0, 0]) & spec.LARGE, Status.INVALID_PAGE_SIZE, f"RMP page size of {name}", "4K", "2M")


def writable(psp: SecureProcessor, spa: int, size: int, name: str) -> int:
    """An output buffer of an SNP command: within one page, and Firmware or Default once SNP is on."""
    require(spa % PAGE_SIZE + size <= PAGE_SIZE, Status.INVALID_PARAM, f"{name} stays in one page", size, spa)
    spa = check_address(psp, spa, size, name)
    require_output(psp, spa, name)
    return spa


def require_output(psp: SecureProcessor, spa: int, name: str) -> None:
    """INVALID_PAGE_STATE unless the firmware may write the page for the host, which it may before SNP is on."""
    if psp.initialised:
        require_state(psp, spa, name, *_OUTPUT)


def make_context(psp: SecureProcessor, spa: int) -> None:
    """Firmware -> Context."""
    _rewrite(psp, spa, ASSIGNED | IMMUTABLE | LOCK | spec.VMSA)


def make_firmware(psp: SecureProcessor, spa: int) -> None:
    """Context -> Firmware."""
    _rewrite(psp, spa, ASSIGNED | IMMUTABLE | LOCK)


def make_guest_valid(psp: SecureProcessor, pages: Words, permissions: tuple[int, int, int], vmsa: bool) -> None:
    """Pre-Guest -> Guest-Valid, with the permissions of VMPL1 to VMPL3; VMPL0's stay."""
    entries = psp.machine.rmp.load(pages).copy()
    entries[:, 0] &= ~U64(IMMUTABLE | LOCK)
    entries[:, 0] |= U64(VALIDATED | spec.VMSA * vmsa)
    vmpl1, vmpl2, vmpl3 = permissions
    entries[:, 1] &= U64(0xFF)
    entries[:, 1] |= U64(vmpl1 << 8 | vmpl2 << 16 | vmpl3 << 24)
    store_entries(psp, pages, entries)


def reclaim(psp: SecureProcessor, pages: Words) -> None:
    """Hand pages back to the hypervisor: Firmware and Metadata become Reclaim, Pre-Guest Guest-Invalid,
    Pre-Swap Guest-Valid; all by clearing Immutable and Lock.
    """
    entries = psp.machine.rmp.load(pages).copy()
    entries[:, 0] &= ~U64(IMMUTABLE | LOCK)
    store_entries(psp, pages, entries)


def release_buffer(psp: SecureProcessor, spa: int) -> None:
    """Clear Immutable and Lock of the entry that answers for a command buffer's page: Firmware becomes Reclaim."""
    entry = entry_of(psp, spa)
    if entry.state is not PageState.DEFAULT:
        reclaim(psp, np.array([entry.head >> PAGE_SHIFT], U64))


def make_fixed(psp: SecureProcessor, pages: Words) -> None:
    """Firmware -> HV-Fixed, for pages of 4 KB: they are assigned no longer, which their regions count."""
    entries = psp.machine.rmp.load(pages).copy()
    entries[:, 0] = entries[:, 0] & U64(spec.SUBPAGES) | U64(IMMUTABLE)
    entries[:, 1] = 0
    store_entries(psp, pages, entries)
    bases, counts = np.unique(pages[pages % U64(PAGES_PER_LARGE) != 0] & ~LARGE_MASK, return_counts=True)
    heads = psp.machine.rmp.load(bases).copy()
    heads[:, 0] -= counts.astype(U64) << U64(spec.SUBPAGE_SHIFT)
    psp.machine.rmp.store(bases, heads)


def make_large(psp: SecureProcessor, first: int) -> None:
    """Join 512 immutable entries of 4 KB into one of 2 MB; what is left of the others is assigned to nobody."""
    pages = np.arange(first, first + PAGES_PER_LARGE, dtype=U64)
    entries = psp.machine.rmp.load(pages).copy()
    entries[0, 0] = entries[0, 0] & U64(~spec.SUBPAGES & 2**64 - 1) | U64(spec.LARGE | LOCK)
    entries[1:] = ASSIGNED, 0
    store_entries(psp, pages, entries)


def store_entries(psp: SecureProcessor, pages: Words, entries: Words) -> None:
    """Write entries (n, 2), and tell the event of the command so."""
    if psp.machine.trace:
        psp.note_entries(pages, psp.machine.rmp.load(pages).copy(), entries)
    psp.machine.rmp.store(pages, entries)


def _rewrite(psp: SecureProcessor, spa: int, low: int, high: int | None = None) -> None:
    page = np.array([spa >> PAGE_SHIFT], U64)
    entry = psp.machine.rmp.load(page).copy()
    entry[0, 0] = entry[0, 0] & U64(spec.SUBPAGES) | U64(low)
    if high is not None:
        entry[0, 1] = high
    store_entries(psp, page, entry)


@dataclass(frozen=True, slots=True)
class Entry:
    """The RMP entry that answers for the page at `spa`, and the state in which the firmware sees it.

    `low` and `high` are its quadwords; the second holds the permissions of the VMPLs.
    """

    spa: int
    state: PageState
    low: int
    high: int

    @property
    def head(self) -> int:
        """The address that the entry itself is of: the first one of a 2 MB page."""
        return self.spa & -LARGE_PAGE_SIZE if self.low & spec.LARGE else self.spa

    @property
    def size(self) -> PageSize:
        return PageSize.SIZE_2M if self.low & spec.LARGE else PageSize.SIZE_4K

    @property
    def asid(self) -> int:
        return (self.low & spec.ASID) >> spec.ASID_SHIFT

    @property
    def gfn(self) -> int:
        return (self.low & spec.GFN) >> spec.GFN_SHIFT

    def belongs_to(self, gctx: int) -> bool:
        """Whether a Metadata page is that of the guest whose context is at `gctx`."""
        return self.low & spec.GFN == _metadata_tag(gctx)


def entry_of(psp: SecureProcessor, spa: int) -> Entry:
    """The entry that answers for the page at an address that `check_address` has passed."""
    entries, states = look_up(psp, np.array([spa >> PAGE_SHIFT], U64))
    low, high = entries[0].tolist()
    return Entry(spa, PageState(int(states[0])), low, high)


def make_metadata(psp: SecureProcessor, page: Entry, gctx: int) -> None:
    """Firmware -> Metadata of one guest."""
    _rewrite(psp, page.head, ASSIGNED | IMMUTABLE | LOCK | page.low & spec.LARGE | _metadata_tag(gctx))


def release_metadata(psp: SecureProcessor, page: Entry) -> None:
    """Metadata -> Firmware."""
    _rewrite(psp, page.head, ASSIGNED | IMMUTABLE | LOCK | page.low & spec.LARGE)


def set_guest_page(psp: SecureProcessor, page: Entry, content: Entry, *, immutable: bool) -> None:
    """Give a guest's page the guest address, VMSA bit, validation and permissions that `content` has.

    Immutable it is Pre-Swap or Pre-Guest, otherwise Guest-Valid or Guest-Invalid.
    """
    kept = page.low & (ASSIGNED | spec.LARGE | spec.ASID)
    moved = content.low & (spec.GFN | spec.VMSA | VALIDATED)
    _rewrite(psp, page.head, kept | moved | (IMMUTABLE | LOCK) * immutable, content.high)


def _metadata_tag(gctx: int) -> int:
    return (spec.GFN_TAG_METADATA << spec.GFN_TAG_SHIFT | gctx >> PAGE_SHIFT) << spec.GFN_SHIFT


def first_refusal(
    failed: list[tuple[FirmwareRefusal, NDArray[np.bool_]]], count: int
) -> tuple[int, FirmwareRefusal | None]:
    """Of checks in order, each with the pages that fail it: the first page that fails any, and its first check."""
    stop, reason = count, None
    for refusal, where in failed:
        if where.any() and (index := int(np.argmax(where))) < stop:
            stop, reason = index, refusal
    return stop, reason
