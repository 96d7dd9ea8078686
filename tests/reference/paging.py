"""Page walks and access checks of one page at a time, as the manual tells them: no arrays, nothing of the library.

An outcome is a page number, or a tuple: ("npf", gpa, EXITINFO1) or ("exception", vector, error code, address).
Sources: APM2 5.3, 15.25.5, 15.36.10.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.reference.rmp import ReferenceRmp

P, W, U, RSVD = 1, 2, 4, 8
RMP, FINAL, WALK, ENC, VMPL = 1 << 31, 1 << 32, 1 << 33, 1 << 34, 1 << 36
READ_RIGHT, WRITE_RIGHT = 1, 2
ADDRESS = sum(1 << bit for bit in range(12, 51))


def nested(read: Callable[[int], int], root: int, gfn: int, write: bool, top: int) -> tuple[int, bool] | int:
    """The nested walk in memory that ends at `top`: (page, large leaf), or the bits P and RSVD of a fault."""
    if gfn >= 2**36:
        return 0
    table, allowed = root & ADDRESS, True
    for level in (3, 2, 1, 0):
        if table >= top:
            return P | RSVD
        entry = read(table + 8 * (gfn >> 9 * level & 511))
        if not entry & P:
            return 0
        allowed = allowed and bool(entry & U) and bool(entry & W or not write)
        if level == 0 or (level < 3 and entry & 0x80):
            inside = (1 << 9 * level) - 1
            page = (entry & ADDRESS) >> 12 & ~inside | gfn & inside
            if page << 12 >= top:
                return P | RSVD
            return (page, level > 0) if allowed else P
        table = entry & ADDRESS
    raise AssertionError


@dataclass
class ReferenceGuest:
    """A vCPU of an SNP guest in long mode: `read` gives raw words of memory, `plain` the guest's words."""

    read: Callable[[int], int]
    plain: Callable[[int], int]
    rmp: ReferenceRmp
    top: int
    nested_root: int
    asid: int
    c_bit: int
    cr3: int
    vmpl: int = 0
    write_protect: bool = False

    def access(self, virtual: int, write: bool) -> Any:
        """A data access of the supervisor to a virtual page: the system page and its C-bit, or the fault."""
        if virtual not in range(2**35) and virtual not in range(2**52 - 2**35, 2**52):
            return "exception", 13, 0, 0
        table, writable = (self.cr3 & ADDRESS & ~(1 << self.c_bit)) >> 12, True
        for level in (3, 2, 1, 0):
            page = self.physical(table, True, False, virtual, WALK)
            if isinstance(page, tuple):
                return page
            entry = self.plain(page * 4096 + 8 * (virtual >> 9 * level & 511))
            if not entry & P:
                return "exception", 14, W * write, virtual * 4096
            writable = writable and bool(entry & W)
            frame = (entry & ADDRESS & ~(1 << self.c_bit)) >> 12
            if level == 0 or (level < 3 and entry & 0x80):
                if write and not writable and self.write_protect:
                    return "exception", 14, P | W, virtual * 4096
                inside = (1 << 9 * level) - 1
                gfn, private = frame & ~inside | virtual & inside, bool(entry >> self.c_bit & 1)
                page = self.physical(gfn, private, write, virtual, FINAL)
                return page if isinstance(page, tuple) else (page, private)
            table = frame
        raise AssertionError

    def physical(self, gfn: int, private: bool, write: bool, virtual: int, stage: int) -> Any:
        """The nested half: nested tables, then the RMP."""
        error = U | stage | ENC * private | W * write
        found = nested(self.read, self.nested_root, gfn, write, self.top)
        if isinstance(found, int):
            return "npf", gfn * 4096, error | found
        page, large = found
        if not private:
            if write and self.rmp.check_write(page, large) != "GRANTED":
                return "npf", gfn * 4096, error | P | RMP
            return page
        need = READ_RIGHT | WRITE_RIGHT * write
        result = self.rmp.check(page, gfn, self.asid, self.vmpl, need, large)
        if result == "NOT_VALIDATED":
            return "exception", 29, 0x404, virtual * 4096
        if result != "GRANTED":
            return "npf", gfn * 4096, error | P | RMP | VMPL * (result == "VMPL")
        return page
