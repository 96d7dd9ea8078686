"""The reverse map table as a dictionary of plain objects: slow, obvious, written from the specification alone.

One method per instruction or check, one page at a time, in the order in which the documents name the checks. It
shares nothing with the library: the numbers are typed again on purpose. Sources: APM2 15.36, PPR (raw entry).
"""

from dataclasses import dataclass, field, replace

SUCCESS, FAIL_INPUT, FAIL_PERMISSION, FAIL_INUSE, FAIL_OVERLAP, FAIL_SIZEMISMATCH = 0, 1, 2, 3, 4, 6
FAIL_BADADDR = 7  # PSMASH: the page does not qualify
VMPLS = 4
VMPL0_FULL = [0b1111, 0, 0, 0]
GFN_END = 1 << 39


@dataclass(slots=True)
class Entry:
    """One 16-byte entry; as it is made here, a page of the hypervisor."""

    assigned: bool = False
    large: bool = False
    immutable: bool = False
    subpages: int = 0
    gfn: int = 0
    asid: int = 0
    vmsa: bool = False
    validated: bool = False
    lock: bool = False
    vmpl: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def raw(self) -> tuple[int, int]:
        """The two quadwords."""
        low = self.assigned << 0 | self.large << 1 | self.immutable << 2 | self.subpages << 3 | self.gfn << 12
        low |= self.asid << 51 | self.vmsa << 61 | self.validated << 62 | self.lock << 63
        return low, sum(byte << 8 * number for number, byte in enumerate(self.vmpl))

    def state(self) -> str:
        """The row of the page-state table that the entry matches."""
        plain = not self.validated and self.asid == 0
        tag, number = self.gfn >> 36, self.gfn % 2**36
        if not self.assigned:
            return ("HV_FIXED" if self.immutable else "HYPERVISOR") if plain else "INVALID"
        if plain and not self.immutable:
            return "INVALID" if self.lock else "RECLAIM"
        if plain:
            if self.gfn == 0:
                return "CONTEXT" if self.vmsa else "FIRMWARE"
            if tag == 2 and number == 1 and not self.vmsa:
                return "FIRMWARE_IOMMU"
            return "METADATA" if tag == 1 and number > 0 else "INVALID"
        if self.asid == 0:
            return "INVALID"
        if self.immutable:
            return "PRE_SWAP" if self.validated else "PRE_GUEST"
        return "GUEST_VALID" if self.validated else "GUEST_INVALID"


class ReferenceRmp:
    """A table with entries for pages 0 to `entries` - 1; `in_use` are pages of a running VMCB or VMSA."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.table: dict[int, Entry] = {}
        self.counters: dict[int, int] = {}
        self.in_use: set[int] = set()

    def entry(self, page: int) -> Entry:
        """A page's own entry."""
        found = self.table.get(page)
        if found is None:
            found = self.table[page] = Entry()
        return found

    def answering(self, page: int) -> tuple[Entry, int]:
        """The entry that answers for a page, and the guest page that it gives: a 2 MB entry speaks for all 512."""
        head = self.entry(page - page % 512)
        if head.assigned and head.large:
            return head, (head.gfn + page % 512) % GFN_END
        own = self.entry(page)
        return own, own.gfn

    def rmpupdate(
        self,
        page: int,
        gfn: int,
        assigned: bool,
        asid: int = 0,
        immutable: bool = False,
        large: bool = False,
        current_asid: int = 0,
    ) -> int:
        """RMPUPDATE by the host: its return code. A current ASID other than 0 is guest mode."""
        if current_asid != 0:
            return FAIL_PERMISSION
        if large and page % 512 != 0:
            return FAIL_INPUT
        if not assigned and (immutable or asid != 0):
            return FAIL_INPUT
        if page >= self.entries:
            return FAIL_INPUT
        if self.busy(page, 512 if large else 1):
            return FAIL_INUSE
        entry, head = self.entry(page), self.entry(page - page % 512)
        if entry.immutable:
            return FAIL_PERMISSION
        whole = head.assigned and head.large
        if not large and whole:
            return FAIL_OVERLAP
        if large and not whole and any(self.entry(page + i).assigned for i in range(512)):
            return FAIL_OVERLAP

        pages = 512 if large else 1
        if entry.asid:
            self.counters[entry.asid] -= pages
        if asid:
            self.counters[asid] = self.counters.get(asid, 0) + pages
        if large:
            for i in range(1, 512):
                self.table[page + i] = Entry(assigned=assigned)
        elif page % 512 and entry.assigned != assigned:
            head.subpages += 1 if assigned else -1
        if not assigned:
            self.table[page] = Entry(subpages=entry.subpages)
            return SUCCESS
        if not (entry.assigned and entry.asid == asid and entry.gfn == gfn and entry.large == large):
            entry.validated = entry.vmsa = False
            entry.vmpl = list(VMPL0_FULL)
        entry.assigned, entry.asid, entry.gfn, entry.large, entry.immutable = True, asid, gfn, large, immutable
        return SUCCESS

    def busy(self, page: int, pages: int) -> bool:
        """Whether an operation on these pages meets one in use; which pages of a 2 MB range count is inferred: all."""
        return any(page <= number < page + pages for number in self.in_use)

    def psmash(self, page: int, current_asid: int = 0) -> int:
        """PSMASH by the host: its return code. A current ASID other than 0 is guest mode."""
        if page % 512 != 0:
            return FAIL_INPUT
        if current_asid != 0:
            return FAIL_PERMISSION
        if page >= self.entries:
            return FAIL_INPUT  # where the sheet is silent: before in-use, as RMPUPDATE has it
        if self.busy(page, 512):
            return FAIL_INUSE
        head = self.entry(page)
        if not (head.assigned and head.large):
            return FAIL_BADADDR
        if head.immutable:
            return FAIL_PERMISSION  # unconfirmed
        for i in range(512):
            gfn = (head.gfn + i) % GFN_END
            self.table[page + i] = replace(head, large=False, gfn=gfn, subpages=0, vmpl=list(head.vmpl))
        self.table[page].subpages = 511
        return SUCCESS

    def rmpread(self, page: int, current_asid: int = 0) -> tuple[int, bytes]:
        """RMPREAD by the host: its return code and the 16 bytes it stores, none after a failure.

        It shows the page's own entry, as Linux takes it, which looks for a 2 MB entry itself. The bit of the 2 MB
        region is told by Linux: other pages of the region are assigned, in the answer for the 2 MB-aligned page only.
        """
        if current_asid != 0:
            return FAIL_PERMISSION, b""
        if page >= self.entries:
            return FAIL_INPUT, b""  # unconfirmed
        entry = self.entry(page)
        others = page % 512 == 0 and entry.subpages > 0
        answer = (entry.gfn * 4096).to_bytes(8, "little")
        answer += bytes([entry.assigned, entry.large | others << 1, entry.immutable, 0])
        return SUCCESS, answer + entry.asid.to_bytes(4, "little")

    def pvalidate(
        self, page: int, gfn: int, asid: int, validate: bool, large: bool = False, virtual: int = 0
    ) -> tuple[int | str, bool]:
        """PVALIDATE of a guest page that translates to `page`: (return code, CF), or (the check that faults, False).

        `virtual` is the page's virtual number, of which only the place in its 2 MB matters.
        """
        if large and virtual % 512 != 0:
            return FAIL_INPUT, False
        fault = self.ownership(page, gfn, asid)
        if fault:
            return fault, False
        entry, _ = self.answering(page)
        if entry.large and not large:
            return "PAGE_SIZE", False
        if large and not entry.large:
            return FAIL_SIZEMISMATCH, False
        unchanged = entry.validated == validate
        entry.validated = validate
        return SUCCESS, unchanged

    def rmpadjust(
        self,
        page: int,
        gfn: int,
        asid: int,
        current_vmpl: int,
        target_vmpl: int,
        mask: int,
        vmsa: bool = False,
        large: bool = False,
        virtual: int = 0,
    ) -> int | str:
        """RMPADJUST of a guest page that translates to `page`: its return code, or the check that faults.

        PAGE_SIZE and the names of `ownership` are an #NPF, NOT_VALIDATED is the #VC; `virtual` as in `pvalidate`.
        """
        if large and virtual % 512 != 0:
            return FAIL_INPUT
        if target_vmpl <= current_vmpl:
            return FAIL_PERMISSION
        if target_vmpl >= VMPLS:
            return FAIL_INPUT  # from memory
        fault = self.ownership(page, gfn, asid)
        if fault:
            return fault
        entry, _ = self.answering(page)
        if entry.large and not large:
            return "PAGE_SIZE"
        if not entry.validated:
            return "NOT_VALIDATED"
        if large and not entry.large:
            return FAIL_SIZEMISMATCH
        if mask & ~entry.vmpl[current_vmpl]:
            return FAIL_PERMISSION
        entry.vmpl[target_vmpl] = mask
        if current_vmpl == 0:
            entry.vmsa = vmsa
        return SUCCESS

    def rmpquery(
        self, page: int, gfn: int, asid: int, current_vmpl: int, target_vmpl: int
    ) -> tuple[int | str, bool, int, bool]:
        """RMPQUERY: (return code or the check that faults, large, mask, vmsa), the last three of the answering entry.

        The sheet gives its operands and that it answers 0 or 2. Inferred: which targets get 2 (RMPADJUST's rule, and
        a VMPL that does not exist, there being no code 1), the order, and the faults; there is no size to mismatch.
        """
        if target_vmpl <= current_vmpl or target_vmpl >= VMPLS:
            return FAIL_PERMISSION, False, 0, False
        fault = self.ownership(page, gfn, asid)
        if fault:
            return fault, False, 0, False
        entry, _ = self.answering(page)
        if not entry.validated:
            return "NOT_VALIDATED", False, 0, False
        return SUCCESS, entry.large, entry.vmpl[target_vmpl], entry.vmsa

    def ownership(self, page: int, gfn: int, asid: int) -> str:
        """RMP-Covered, Guest-Owned, Reverse-Map, Mutable: the first of them that fails, or nothing."""
        if page >= self.entries:
            return "NOT_COVERED"
        entry, answer = self.answering(page)
        if not entry.assigned or entry.asid != asid:
            return "NOT_GUEST_OWNED"
        if answer != gfn:
            return "REVERSE_MAP"
        return "IMMUTABLE" if entry.immutable else ""

    def check(self, page: int, gfn: int, asid: int, vmpl: int, need: int, large: bool = False) -> str:
        """A private access of an SNP guest through a 4 KB or 2 MB nested mapping: GRANTED or the check that fails."""
        fault = self.ownership(page, gfn, asid)
        if fault:
            return fault
        entry, _ = self.answering(page)
        if entry.large != large:
            return "PAGE_SIZE"
        if not entry.validated:
            return "NOT_VALIDATED"
        return "GRANTED" if entry.vmpl[vmpl] & need == need else "VMPL"

    def check_write(self, page: int, large: bool = False) -> str:
        """A write by the host, or a shared write of a guest, through a 4 KB or 2 MB mapping."""
        pages = range(page - page % 512, page - page % 512 + 512) if large else [page]
        owned = any(p < self.entries and self.answering(p)[0].assigned for p in pages)
        return "NOT_HYPERVISOR_OWNED" if owned else "GRANTED"

    def state(self, page: int) -> str:
        """The page's state."""
        return "DEFAULT" if page >= self.entries else self.answering(page)[0].state()

    def recount(self) -> None:
        """Subpage counts and counters by ASID from their definitions."""
        self.counters = {}
        for entry in self.table.values():
            entry.subpages = 0
            if entry.asid:
                self.counters[entry.asid] = self.counters.get(entry.asid, 0) + (512 if entry.large else 1)
        for page, entry in list(self.table.items()):
            head = self.entry(page - page % 512)
            if page % 512 and entry.assigned and not (head.assigned and head.large):
                head.subpages += 1
