"""The access explorer: why an access is let through or refused, entry by entry and check by check.

The verdict is the core's, the host port's or the IOMMU's own answer to that very access, made and then undone; this
file reads again what they read, in the same order, and says it. Source: APM2 15.36.10 (table 15-39), 15.25, 5.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_

import numpy as np

from snpbook.hardware.checks import USER_CPL, Access, AccessKind, check_guest, check_write
from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, HostPageFault, Npf
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.reasons import Page, Step, guest_steps, hypervisor_steps, not_canonical
from snpbook.hardware.snapshot import Snapshot
from snpbook.hardware.walker import Fault
from snpbook.spec.encryption import KeyId
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.vmcb import (
    PAGE_TABLE_LEVELS,
    PTE_ADDRESS,
    PTE_LARGE,
    PTE_NO_EXECUTE,
    PTE_PRESENT,
    PTE_SIZE,
    PTE_USER,
    PTE_WRITE,
    PTES_PER_TABLE,
    FaultError,
    Vector,
)
from snpbook.spec.vmsa import CR0_PG, CR0_WP

NAMES = ("page table", "page directory", "page-directory pointers", "PML4")
"""The tables of a walk by their level; level 0 maps pages of 4 KB."""
_NESTED, _GUEST = "APM2 15.25", "APM2 5.3"


@dataclass(frozen=True, slots=True)
class Level:
    """One entry of a walk, where it lies in memory, and what it says; `tables` is guest or nested."""

    tables: str
    level: int
    spa: int
    entry: int
    says: str


@dataclass(frozen=True, slots=True)
class Visit:
    """One page that an access needs, the page itself or a table on the way: how it was found and what was checked.

    `level` is that of a table of the guest, in which its walk reads `entry`; None for the page itself. `gfn` is None
    for parties that use system addresses.
    """

    what: str
    gfn: int | None
    nested: tuple[Level, ...]
    page: int | None
    checks: tuple[Step, ...]
    level: int | None = None
    entry: Level | None = None

    @property
    def failed(self) -> Step | None:
        return next((step for step in self.checks if step.met is False), None)


@dataclass(frozen=True, slots=True)
class Explanation:
    """An access, the pages that it visited in order, and how it ended: `fault` is None where it was let through.

    `rights` is the check on what all entries of a guest's walk grant together, where the walk came to its end.
    """

    actor: str
    address: int
    kind: AccessKind
    visits: tuple[Visit, ...]
    fault: Fault | HostPageFault | DmaBlocked | None
    rights: Step | None = None

    @property
    def failed(self) -> Step | None:
        """The check that ended it."""
        if self.rights and not self.rights.met:
            return self.rights
        return next((visit.failed for visit in self.visits if visit.failed), None)

    @property
    def page(self) -> int | None:
        """The system page that was reached."""
        return self.visits[-1].page if self.fault is None else None

    def __repr__(self) -> str:
        step = self.failed
        end = f"refused: {step.name}, expected {step.expected}, found {step.found}" if step else "let through"
        return f"Explanation({self.actor}, {self.kind.name.lower()} of {self.address:#x}: {end})"


def explain_host(machine: Machine, spa: int, kind: AccessKind) -> Explanation:
    """A read or write by the host at a system physical address."""
    before, fault = Snapshot(machine=machine), None
    try:
        if kind.writes:
            HostCpu(machine).write(spa, b"\0")
    except HostPageFault as refused:
        fault = refused
    before.restore()
    return Explanation("host", spa, kind, (_by_address(machine, spa, kind),), fault)


def explain_device(machine: Machine, spa: int, kind: AccessKind) -> Explanation:
    """A read or write by a device, through the IOMMU."""
    fault = None
    try:
        if kind.writes:
            machine.iommu.check_write(machine.rmp, spa, 1)
    except DmaBlocked as refused:
        fault = refused
    return Explanation("device", spa, kind, (_by_address(machine, spa, kind, " (inferred)"),), fault)


def _by_address(machine: Machine, spa: int, kind: AccessKind, mark: str = "") -> Visit:
    page = spa >> PAGE_SHIFT
    checks = _unowned(machine, page) if kind.writes else [_free(f"reads are not checked{mark}")]
    return Visit("the page", None, (), page, tuple(checks))


def explain_guest(core: GuestCore, address: int, kind: AccessKind) -> Explanation:
    """An access of a running guest at a virtual address, as if the TLB held nothing; WALK uses the page as a table."""
    fault = _verdict(core, address, kind)
    snp = f"guest, ASID {core.asid}, VMPL{core.registers['vmpl']}" if core.snp else "guest without SNP"
    actor = f"{snp}, CPL {core.registers['cpl']}"
    if isinstance(fault, GuestException) and fault.vector == Vector.GP:
        wild = Visit("the address", None, (), None, (not_canonical(address),))
        return Explanation(actor, address, kind, (wild,), fault)
    visits, leaf = _tables(core, address) if core.registers["cr0"] & CR0_PG else ([], None)
    number, encrypted = address >> PAGE_SHIFT, bool(core.vmcb.sev)
    c_bit, rights = 1 << core.machine.product.c_bit if encrypted else 0, None
    if not any(visit.failed for visit in visits):
        gfn, private = number, encrypted
        if leaf is not None:
            inside = PTES_PER_TABLE**leaf.level - 1
            gfn = (leaf.entry & PTE_ADDRESS & ~c_bit) >> PAGE_SHIFT & ~inside | number & inside
            always = kind is AccessKind.FETCH or kind.of_tables
            private = encrypted and (always or bool(leaf.entry & c_bit))
            rights = _allowed(visits, core, kind, fault)
        if rights is None or rights.met:
            update = _update(core, visits, fault)
            visits.append(update or _visit(core, "the page", gfn, kind, private))
    return Explanation(actor, address, kind, tuple(visits), fault, rights)


def _verdict(core: GuestCore, address: int, kind: AccessKind) -> Fault | None:
    """The core's answer to the access; whatever it has changed is taken back."""
    before = Snapshot(core=core)
    core.flush_tlb()
    fault = core.translate(np.array([address >> PAGE_SHIFT], np.uint64), kind).fault
    before.restore()
    return fault


def _tables(core: GuestCore, address: int) -> tuple[list[Visit], Level | None]:
    """The guest's own tables from the top, each a page to be reached; and the leaf, where there is one."""
    encrypted = bool(core.vmcb.sev)
    c_bit = 1 << core.machine.product.c_bit if encrypted else 0
    pointer, key = core.registers["cr3"], core.asid if encrypted else KeyId.UNENCRYPTED
    visits: list[Visit] = []
    for level in reversed(range(PAGE_TABLE_LEVELS)):
        gfn = (pointer & PTE_ADDRESS & ~c_bit) >> PAGE_SHIFT
        visit = replace(_visit(core, NAMES[level], gfn, AccessKind.WALK, encrypted), level=level)
        if visit.page is None or visit.failed:
            return [*visits, visit], None
        place = (visit.page << PAGE_SHIFT) + _index(address >> PAGE_SHIFT, level) * PTE_SIZE
        entry = _level(core.machine, "guest", level, place, key, c_bit)
        visit = replace(visit, entry=entry)
        pointer = entry.entry
        if not pointer & PTE_PRESENT:
            absent = Step("Guest tables: present", "present", "not present", False, _GUEST)
            return [*visits, replace(visit, checks=(*visit.checks, absent))], None
        visits.append(visit)
        if _is_leaf(pointer, level):
            return visits, entry
    raise AssertionError("level 0 ends every walk")


def _allowed(visits: Sequence[Visit], core: GuestCore, kind: AccessKind, fault: object) -> Step:
    """The check on the rights that all entries on the way grant together."""
    entries = [visit.entry.entry for visit in visits if visit.entry]
    user = core.registers["cpl"] == USER_CPL
    wanted = [
        *(["user"] if user else []),
        *(["writable"] if kind.writes and (user or core.registers["cr0"] & CR0_WP) else []),
        *(["executable"] if kind is AccessKind.FETCH else []),
    ]
    met = not (isinstance(fault, GuestException) and fault.vector == Vector.PF)
    return Step("Guest tables: rights", ", ".join(wanted) or "present", _shared(entries), met, _GUEST)


def _update(core: GuestCore, visits: Sequence[Visit], fault: object) -> Visit | None:
    """The table whose accessed or dirty bit could not be set, where that is what ended the access."""
    if not isinstance(fault, Npf) or not fault.error & FaultError.PAGE_TABLE_WALK:
        return None
    table = next((visit for visit in visits if visit.gfn == fault.gpa >> PAGE_SHIFT), None)
    if table is None:  # the page itself, used as a table
        return None
    what = f"{table.what}, to set its A and D bits"
    return replace(_visit(core, what, fault.gpa >> PAGE_SHIFT, AccessKind.UPDATE, core.snp), level=table.level)


def _visit(core: GuestCore, what: str, gfn: int, kind: AccessKind, private: bool) -> Visit:
    """A guest page through the nested tables, then the RMP's checks on it by the core's own functions."""
    machine = core.machine
    levels, found = _nested(machine, core.vmcb.nested_cr3, gfn, kind)
    if isinstance(found, Step):
        return Visit(what, gfn, levels, None, (found,))
    page, large = found, levels[-1].level > 0
    if core.snp and private:
        numbers = np.array([page], np.uint64), np.array([gfn], np.uint64)
        vmpl, need = core.registers["vmpl"], kind.need(core.registers["cpl"])
        verdict = Access(int(check_guest(machine.rmp, *numbers, core.asid, vmpl, need, large=large)[0]))
        seen = Page.of(machine.rmp, page)
        return Visit(
            what, gfn, levels, page, tuple(guest_steps(seen, gfn, core.asid, vmpl, need, verdict, large=large))
        )
    if machine.snp_enabled and kind.writes_nested:
        return Visit(what, gfn, levels, page, tuple(_unowned(machine, page, large and kind is not AccessKind.UPDATE)))
    return Visit(what, gfn, levels, page, (_free("shared reads are not checked"),))


def _nested(machine: Machine, root: int, gfn: int, kind: AccessKind) -> tuple[tuple[Level, ...], int | Step]:
    """The nested entries for a guest page, and the system page that they lead to or what stopped them."""
    c_bit, pointer = 1 << machine.product.c_bit, root
    levels: list[Level] = []
    for level in reversed(range(PAGE_TABLE_LEVELS)):
        table = (pointer & PTE_ADDRESS & ~c_bit) >> PAGE_SHIFT
        if table >= machine.memory.size >> PAGE_SHIFT:
            return tuple(levels), Step("Nested tables: in memory", "memory", f"page {table:#x}", False, _NESTED)
        if machine.snp_enabled and (owned := _unowned(machine, table)[0]).met is False:
            return tuple(levels), Step(f"Nested tables: {owned.name}", owned.expected, owned.found, False, owned.cite)
        key = KeyId.HOST if pointer & c_bit else KeyId.UNENCRYPTED
        place = (table << PAGE_SHIFT) + _index(gfn, level) * PTE_SIZE
        levels.append(_level(machine, "nested", level, place, key, c_bit))
        pointer = levels[-1].entry
        if not pointer & PTE_PRESENT:
            return tuple(levels), Step("Nested tables: present", "present", "not present", False, _NESTED)
        if _is_leaf(pointer, level):
            break
    wanted = ["user", *(["writable"] if kind.writes_nested else [])]
    wanted += ["executable"] if kind is AccessKind.FETCH else []
    shared = _shared([level.entry for level in levels])
    if not set(wanted) <= set(shared.split(", ")):
        return tuple(levels), Step("Nested tables: rights", ", ".join(wanted), shared, False, _NESTED)
    inside = PTES_PER_TABLE ** levels[-1].level - 1
    page = (pointer & PTE_ADDRESS & ~c_bit) >> PAGE_SHIFT & ~inside | gfn & inside
    if page >= machine.memory.size >> PAGE_SHIFT:
        return tuple(levels), Step("Nested tables: in memory", "memory", f"page {page:#x}", False, _NESTED)
    return tuple(levels), page


def _unowned(machine: Machine, page: int, large: bool = False) -> list[Step]:
    verdict = Access(int(check_write(machine.rmp, range(page, page + 1), large=large)[0]))
    return hypervisor_steps(Page.of(machine.rmp, page), verdict, large=large)


def _free(why: str) -> Step:
    return Step("none", why, "", True, "APM2 table 15-39")


def _index(number: int, level: int) -> int:
    """Where a table of that level has the entry for a page number."""
    place: int = number // PTES_PER_TABLE**level % PTES_PER_TABLE
    return place


def _is_leaf(entry: int, level: int) -> bool:
    return not level or (level < PAGE_TABLE_LEVELS - 1 and bool(entry & PTE_LARGE))


def _level(machine: Machine, tables: str, level: int, spa: int, key: int, c_bit: int) -> Level:
    """One entry read from memory, decoded."""
    entry = int(machine.memory.words(key, np.array([spa], np.uint64))[0])
    if not entry & PTE_PRESENT:
        return Level(tables, level, spa, entry, "not present")
    target = f"{('4 KB', '2 MB', '1 GB')[level]} page at" if _is_leaf(entry, level) else "table at"
    c = ", C" if c_bit and entry & c_bit else ""
    return Level(tables, level, spa, entry, f"{target} {entry & PTE_ADDRESS & ~c_bit:#x}; {_shared([entry])}{c}")


def _shared(entries: Sequence[int]) -> str:
    """The rights that all of some entries grant."""
    common = reduce(and_, (entry ^ PTE_NO_EXECUTE for entry in entries))
    names = {PTE_USER: "user", PTE_WRITE: "writable", PTE_NO_EXECUTE: "executable"}
    return ", ".join(name for bit, name in names.items() if common & bit) or "read only, supervisor"
