"""The two page walks of one access of a vCPU, word by word: guest tables, nested tables, RMP, and the A and D bits.

Every table access of the guest is itself walked through the nested tables and checked by the RMP before its word
counts. Shares nothing with the library. Sources: APM2 5.3, 5.4 (tables, #PF), 15.25 (nested paging), 15.36.10; for
what section 6 of the hardware sheet leaves open about A and D the reading is told at the place.
"""

from dataclasses import dataclass, field

from tests.reference.access import GRANTED, RMP, Outcome, access, exit_info, private
from tests.reference.rmp import ReferenceRmp

# An entry of a page table.
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, PAGE_SIZE, NO_EXECUTE = (1 << bit for bit in (0, 1, 2, 5, 6, 7, 63))
# An error code: #PF, and EXITINFO1 alike.
P, W, U, RSVD, ID = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True)
class Result:
    """Where an access ended: GRANTED with the system page, or a fault and its address.

    The address is the virtual one of #PF and #VC, the GPA of an NPF, each that of its page; 0 for #GP and GRANTED.
    """

    outcome: Outcome
    address: int = 0
    page: int = -1
    gfn: int = -1
    mapping: int = 1
    private: bool = False


@dataclass(frozen=True, slots=True)
class Used:
    """A word of a table of which a walk made use; `table` is the page of the table: the system's, or the guest's."""

    table: int
    address: int


class Fault(Exception):
    """A walk ended early."""

    def __init__(self, kind: str, code: int, address: int) -> None:
        self.result = Result((kind, code), address)


@dataclass
class Vcpu:
    """A vCPU in long mode with four levels of tables and nested paging; `actor` as in the access checks, not `host`.

    `host` and `guest` hold the words of memory by system physical address, as the host writes them in the nested
    tables and as the guest writes them in its own (decrypted); words that are not there are 0. Both are changed by A
    and D, and `updates` lists each such write in order: ("nested" or "guest", address, bits that were added).
    Widths count address bits: the guest's own, and those that the host is left with after the reduction.
    """

    host: dict[int, int]
    guest: dict[int, int]
    rmp: ReferenceRmp
    nested_root: int
    cr3: int
    actor: str = "snp"
    asid: int = 1
    vmpl: int = 0
    cpl: int = 0
    write_protect: bool = True  # CR0.WP
    no_execute: bool = True  # EFER.NXE of the guest
    host_no_execute: bool = True  # EFER.NXE of the host, for nested tables
    c_bit: int = 51
    guest_width: int = 48
    host_width: int = 43
    virtual_tom: int | None = None
    updates: list[tuple[str, int, int]] = field(default_factory=list)

    def access(self, virtual: int, kind: str) -> Result:
        """A read, write or fetch of a virtual page."""
        if virtual not in range(2**35) and virtual not in range(2**52 - 2**35, 2**52):
            return Result(("#GP", 0))
        try:
            gfn, c = self.guest_walk(virtual, kind)
            page, mapping = self.physical(gfn, kind, c, virtual)
        except Fault as fault:
            return fault.result
        return Result(GRANTED, 0, page, gfn, mapping, private(self.actor, kind, c))

    def guest_walk(self, virtual: int, kind: str) -> tuple[int, bool]:
        """The guest's tables: the guest page and whether it is private data."""
        write, fetch, user = kind == "write", kind == "fetch", self.cpl == 3
        error = W * write | U * user | ID * (fetch and self.no_execute)  # I/D is defined with NXE only
        sev = self.actor in ("sev", "sev-es", "snp")

        path: list[Used] = []
        writable = for_user = executable = True
        table = self.address(self.cr3, sev) >> 12
        for level in (4, 3, 2, 1):
            page, _ = self.physical(table, "walk", True, virtual)
            address = page * 4096 + 8 * (virtual >> 9 * (level - 1) & 511)
            word = self.guest.get(address, 0)
            if not word & PRESENT:
                raise Fault("#PF", error, virtual * 4096)
            c_reserved = self.virtual_tom is not None and bool(word >> self.c_bit & 1)
            address_bits = word & ~(1 << self.c_bit) if sev else word
            if c_reserved or reserved(address_bits, level, self.guest_width, self.no_execute):
                raise Fault("#PF", error | P | RSVD, virtual * 4096)
            path.append(Used(table, address))
            writable = writable and bool(word & WRITABLE)
            for_user = for_user and bool(word & USER)
            executable = executable and not word & NO_EXECUTE
            if is_leaf(word, level):
                break
            table = self.address(word, sev) >> 12

        forbidden = user and not for_user
        forbidden = forbidden or (write and not writable and (user or self.write_protect))
        forbidden = forbidden or (fetch and not executable)
        if forbidden:
            raise Fault("#PF", error | P, virtual * 4096)

        # A and D once the guest's tables grant the access, from the top, before the final page is looked for; each a
        # write to the table through the nested tables and the RMP [inferred]. Bits that are set already cost nothing.
        for entry in path:
            bits = missing(self.guest[entry.address], entry is path[-1], write)
            if bits:
                self.physical(entry.table, "ad-update", True, virtual)
                self.guest[entry.address] |= bits
                self.updates.append(("guest", entry.address, bits))

        gfn = leaf_page(self.address(word, sev), level, virtual)
        if self.virtual_tom is not None:
            return gfn, gfn * 4096 < self.virtual_tom
        return gfn, sev and bool(word >> self.c_bit & 1)

    def physical(self, gfn: int, kind: str, c: bool, virtual: int) -> tuple[int, int]:
        """The nested half of an access to a guest page: nested tables, then the RMP; the page and the leaf's size."""
        page, mapping = self.nested_walk(gfn, kind, c)
        outcome = access(self.actor, kind, c, self.rmp, page, gfn, self.asid, self.vmpl, self.cpl, mapping)
        if outcome != GRANTED:
            raise Fault(*outcome, virtual * 4096 if outcome[0] == "#VC" else gfn * 4096)
        return page, mapping

    def nested_walk(self, gfn: int, kind: str, c: bool) -> tuple[int, int]:
        """The nested tables: every access is a user's, and CR0.WP is nothing to it."""
        # "Table walks for guest page tables are always treated as user writes" (APM2 15.25.5).
        write, fetch = kind in ("write", "walk", "ad-update"), kind == "fetch"
        error = exit_info(self.actor, kind, c)
        if gfn >= 2**36:
            raise Fault("NPF", error, gfn * 4096)  # four levels reach no further

        path: list[Used] = []
        writable = for_user = executable = True
        table = self.address(self.nested_root, True) >> 12
        for level in (4, 3, 2, 1):
            # A page-table access of the host's, by the host's rule; inferred: it stops the guest's access, whose own
            # bits the NPF tells, and RMP.
            if access("host", "walk", False, self.rmp, table) != GRANTED:
                raise Fault("NPF", error | P | RMP, gfn * 4096)
            address = table * 4096 + 8 * (gfn >> 9 * (level - 1) & 511)
            word = self.host.get(address, 0)
            if not word & PRESENT:
                raise Fault("NPF", error, gfn * 4096)
            if reserved(word & ~(1 << self.c_bit), level, self.host_width, self.host_no_execute):
                raise Fault("NPF", error | P | RSVD, gfn * 4096)
            path.append(Used(table, address))
            writable = writable and bool(word & WRITABLE)
            for_user = for_user and bool(word & USER)
            executable = executable and not word & NO_EXECUTE
            if is_leaf(word, level):
                break
            table = self.address(word, True) >> 12

        if not for_user or (write and not writable) or (fetch and not executable):
            raise Fault("NPF", error | P, gfn * 4096)

        # A and D once the nested tables grant the access, before the RMP looks at the page itself [inferred]. They are
        # 4 KB data writes to tables of which the walk has just found that the hypervisor owns them.
        for entry in path:
            bits = missing(self.host[entry.address], entry is path[-1], write)
            if bits:
                self.host[entry.address] |= bits
                self.updates.append(("nested", entry.address, bits))
        return leaf_page(self.address(word, True), level, gfn), 1 << 9 * (level - 1)

    def address(self, word: int, c_bit: bool) -> int:
        """Bits 51:12 of a word, the C-bit stripped where there is one."""
        bits = word & (2**52 - 2**12)
        return bits & ~(1 << self.c_bit) if c_bit else bits


def is_leaf(word: int, level: int) -> bool:
    return level == 1 or (level in (2, 3) and bool(word & PAGE_SIZE))


def leaf_page(address: int, level: int, page: int) -> int:
    """The page in a leaf of 4 KB, 2 MB or 1 GB that stands where `page` stands in its own."""
    inside = (1 << 9 * (level - 1)) - 1
    return address >> 12 & ~inside | page & inside


def missing(word: int, leaf: bool, write: bool) -> int:
    """The bits that an access has to add to an entry it used: A in every one, D in the leaf alone and on a write."""
    return (ACCESSED | DIRTY * (leaf and write)) & ~word


def reserved(word: int, level: int, width: int, no_execute: bool) -> bool:
    """A bit that must be zero is set in a present entry, whose C-bit has been taken out where there is one."""
    if word & (2**52 - 2**width):
        return True  # address bits beyond the width
    if word & NO_EXECUTE and not no_execute:
        return True
    if level == 4 and word & PAGE_SIZE:
        return True
    if level == 3 and word & PAGE_SIZE and word & (2**30 - 2**13):
        return True  # bit 12 is PAT
    return level == 2 and bool(word & PAGE_SIZE) and bool(word & (2**21 - 2**13))
