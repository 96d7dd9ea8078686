"""Both page walks of a running guest and the RMP checks behind them: what one miss of the TLB costs and finds.

Each access of the guest, to a page or to one of its tables, goes through the nested tables and then the RMP. The order
for one page: guest tables from the top, their accessed and dirty bits, nested tables, RMP; that bits are set at
this place, and each as a write of its table page, is inferred. Sources: APM2 5.3, 5.4, 15.25, 15.34, 15.36.10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import USER_CPL, Access, AccessKind, check_guest, check_write
from snpbook.hardware.dram import Words
from snpbook.hardware.exits import GuestException, NotModelled, Npf
from snpbook.hardware.intercepts import nested_fault
from snpbook.hardware.key_choice import KeyChoice, choose_keys
from snpbook.hardware.paging import Flags, Keys, Rows, Step, Walk, address_mask, nested_walk, set_bits, walk
from snpbook.hardware.rmp import U64
from snpbook.hardware.tlb import ENTRY, Entries
from snpbook.spec.encryption import Context, Kind, Paging, Vtom
from snpbook.spec.msr import SYSCFG_MEM_ENCRYPT, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import PTE_GLOBAL, PTE_NO_EXECUTE, PTE_USER, ExitCode, FaultError, Vector
from snpbook.spec.vmsa import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LME,
    EFER_NXE,
    RFLAGS_AC,
)

if TYPE_CHECKING:
    from snpbook.hardware.core import GuestCore

Fault = Npf | GuestException
_NPF = 255
"""Stands for #NPF where others have their vector."""
_ALL_PAGES, _HALF = U64(2 ** (64 - PAGE_SHIFT) - 1), U64(2 ** (47 - PAGE_SHIFT))
"""Virtual page numbers; canonical addresses repeat bit 47 up to bit 63."""
_PURPOSES = {AccessKind.READ: Kind.DATA, AccessKind.WRITE: Kind.DATA, AccessKind.FETCH: Kind.FETCH}


def _nested_error(kind: AccessKind) -> FaultError:
    """The bits of EXITINFO1 that tell of an access; a nested access is a user's."""
    stage = FaultError.PAGE_TABLE_WALK if kind.of_tables else FaultError.FINAL_GPA
    access = FaultError.WRITE * kind.writes_nested | FaultError.FETCH * (kind is AccessKind.FETCH)
    return FaultError.USER | stage | access


_NESTED_ERRORS = {kind: U64(_nested_error(kind)) for kind in AccessKind}
_REFUSED, _NO_RIGHT = U64(FaultError.PRESENT | FaultError.RMP), U64(FaultError.VMPL)
_ENCRYPTED, _VC = U64(FaultError.ENCRYPTED), int(Vector.VC)


@dataclass(frozen=True, slots=True)
class Translation:
    """Guest virtual pages and what lies behind them, up to the first page that faults; `fault` is that one's."""

    entries: Entries
    fault: Fault | None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def virtual(self) -> Words:
        return self.entries["virtual"]

    @property
    def gfns(self) -> Words:
        return self.entries["gfn"]

    @property
    def pages(self) -> Words:
        return self.entries["page"]

    @property
    def keys(self) -> Keys:
        """The key ids under which memory is reached."""
        return self.entries["key"]

    @property
    def private(self) -> Flags:
        """The effective C-bits."""
        return self.entries["private"]


class _Run:
    """The pages of one translation: the first fault of each, and the bits that their walks have to set."""

    def __init__(self, virtual: Words) -> None:
        self.virtual = virtual
        self.vectors = np.zeros(len(virtual), np.uint8)
        self.errors = np.zeros(len(virtual), U64)
        self.addresses = np.zeros(len(virtual), U64)
        self.updates: list[tuple[Rows, Keys, Words, Words]] = []
        self.tables: list[tuple[Rows, Entries]] = []
        """Where tables were found, and for which pages."""

    def fail(self, owners: Rows, vectors: NDArray[np.uint8] | int, errors: Words | int, addresses: Words | int) -> None:
        """Note what stops some pages, unless something has stopped them before; vector 0 is nothing."""
        vectors, errors, addresses = (np.broadcast_to(value, len(owners)) for value in (vectors, errors, addresses))
        first = (self.vectors[owners] == 0) & (vectors != 0)
        owners = owners[first]
        self.vectors[owners], self.errors[owners] = vectors[first], errors[first]
        self.addresses[owners] = addresses[first]

    def spread(self, ends: Rows) -> None:
        """What has stopped a page on the way to a table has stopped those whose walk went along with its own."""
        stopped = (self.vectors == 0) & (self.vectors[ends] != 0)
        if stopped.any():
            self.vectors[stopped], self.errors[stopped] = self.vectors[ends[stopped]], self.errors[ends[stopped]]
            nested = self.vectors[stopped] == _NPF
            own = self.virtual[stopped] << U64(PAGE_SHIFT)
            self.addresses[stopped] = np.where(nested, self.addresses[ends[stopped]], own)

    def update(self, owners: Rows, keys: Keys, addresses: Words, bits: Words) -> None:
        """Note bits that the pages' walks set in words of memory, as far as nothing has stopped them."""
        mine = (self.vectors[owners] == 0) & (bits != 0)
        if mine.any():
            self.updates.append((owners[mine], keys[mine], addresses[mine], bits[mine]))

    @property
    def stop(self) -> int:
        """The index of the first page that faults, else their number."""
        return int(np.argmax(self.vectors != 0)) if self.vectors.any() else len(self.vectors)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where guest pages lie, and what stops an access to them; vector 0 is nothing."""

    pages: Words
    keys: Keys
    large: Flags
    private: Flags
    vectors: NDArray[np.uint8]
    errors: Words


class PageWalker:
    """The walks of one vCPU, by the registers that it has at that moment."""

    def __init__(self, core: GuestCore) -> None:
        self._core, self._machine = core, core.machine
        vmcb, features = core.vmcb, core.registers["sev_features"] if core.sev_es else 0
        self.context = Context.GUEST
        if vmcb.sev:
            self.context = Context.SNP if core.snp else Context.SEV_ES if core.sev_es else Context.SEV
        self._c_bit = core.machine.product.c_bit if vmcb.sev else None
        self._vtom = core.snp and bool(features & SevFeatures.VIRTUAL_TOM)
        self._vte, self._nested_root = bool(vmcb.vte), vmcb.nested_cr3
        self._encryption = bool(core.physical.rdmsr(Msr.SYSCFG) & SYSCFG_MEM_ENCRYPT)
        self._host_keys = self._choose(Kind.NESTED_WALK, np.zeros(2, bool), np.array([False, True]), None).keys

    def walk(self, virtual: Words, kind: AccessKind, *, checked: bool = True) -> Translation:
        """Translate guest virtual pages in their order, and set the accessed and dirty bits of those that pass.

        The first page that faults ends the translation; `checked` asks the RMP about the pages themselves, not only
        about the tables.
        """
        run, everything = _Run(virtual), np.arange(len(virtual))
        if self._core.registers["cr0"] & CR0_PG:
            gfns, guest_c, is_global = self._guest_walk(run, kind)
        else:  # every access is private, and the address is physical (APM2 15.34.4)
            gfns, guest_c, is_global = virtual, np.ones(len(virtual), bool), np.zeros(len(virtual), bool)
        found = self._place(run, everything, gfns, kind, guest_c, checked=checked)
        addresses = np.where(found.vectors == _NPF, gfns, virtual) << U64(PAGE_SHIFT)
        run.fail(everything, found.vectors, found.errors, addresses)
        stop = run.stop
        self._leave(run, stop)
        entries = np.zeros(stop, ENTRY)
        entries["virtual"], entries["gfn"], entries["is_global"] = virtual[:stop], gfns[:stop], is_global[:stop]
        entries["page"], entries["key"] = found.pages[:stop], found.keys[:stop]
        entries["private"], entries["large"] = found.private[:stop], found.large[:stop]
        return Translation(entries, self._fault(run, stop, gfns))

    def _guest_walk(self, run: _Run, kind: AccessKind) -> tuple[Words, Flags, Flags]:
        """The guest's tables: guest pages, the C-bits and the global bits of the leaves; faults are noted in `run`."""
        registers, virtual, everything = self._core.registers, run.virtual, np.arange(len(run.virtual))
        if not registers["efer"] & EFER_LME or registers["cr4"] & CR4_LA57:
            raise NotModelled("only long mode with four levels of page tables is modelled (LIMITATIONS.md)")
        wild = (virtual + _HALF) & _ALL_PAGES >= U64(2) * _HALF
        run.fail(everything[wild], Vector.GP, 0, 0)
        found = walk(
            self._machine.memory,
            registers["cr3"],
            virtual,
            lambda pointers, owners: self._tables(run, pointers, owners),
            c_bit=self._c_bit,
            reserved=self._reserved(),
            together=True,
        )
        run.spread(found.ends)
        error = self._page_fault(kind)
        user = registers["cpl"] == USER_CPL
        write = kind.writes and (user or bool(registers["cr0"] & CR0_WP))
        forbidden = found.forbids(write=write, fetch=kind is AccessKind.FETCH, user=user)
        if self._guards_user_pages(kind):
            forbidden |= found.rights & U64(PTE_USER) != 0
        errors = np.where(found.done, U64(FaultError.PRESENT), found.errors) | U64(error)
        bad = np.flatnonzero(~found.done | forbidden)
        run.fail(bad, Vector.PF, errors[bad], virtual[bad] << U64(PAGE_SHIFT))
        self._mark_tables(run, found, kind.writes)
        guest_c = found.entries >> U64(self._c_bit or 0) & U64(1) != 0
        is_global = found.entries & U64(PTE_GLOBAL) != 0
        return found.frames(self._c_bit), guest_c, is_global & bool(registers["cr4"] & CR4_PGE)

    def _page_fault(self, kind: AccessKind) -> FaultError:
        """The bits of a #PF's error code that tell of the access; FETCH exists with EFER.NXE or SMEP (unconfirmed)."""
        registers = self._core.registers
        user = bool(registers["cpl"] == USER_CPL)
        tells_fetch = bool(registers["efer"] & EFER_NXE or registers["cr4"] & CR4_SMEP)
        fetch = kind is AccessKind.FETCH and tells_fetch
        return FaultError(FaultError.WRITE * kind.writes | FaultError.USER * user | FaultError.FETCH * fetch)

    def _guards_user_pages(self, kind: AccessKind) -> bool:
        """Whether SMEP or SMAP keeps this access from pages of the user."""
        registers = self._core.registers
        if registers["cpl"] == USER_CPL:
            return False
        if kind is AccessKind.FETCH:
            return bool(registers["cr4"] & CR4_SMEP)
        return bool(registers["cr4"] & CR4_SMAP) and not registers["rflags"] & RFLAGS_AC

    def _reserved(self) -> int:
        """The bits that must be 0 in the guest's entries: addresses too wide, no-execute, the C-bit under vTOM."""
        width = self._machine.product.physical_bits
        bits = int(address_mask(self._c_bit)) >> width << width
        bits |= PTE_NO_EXECUTE * (not self._core.registers["efer"] & EFER_NXE)
        return bits | (1 << (self._c_bit or 0)) * self._vtom

    def _tables(self, run: _Run, pointers: Words, owners: Rows) -> tuple[Words, Keys, Flags]:
        """Where the guest's tables behind some pointers lie: each is looked for once."""
        gfns = (pointers & address_mask(self._c_bit)) >> U64(PAGE_SHIFT)
        pages, keys = np.zeros(len(owners), U64), np.zeros(len(owners), np.uint16)
        alive = run.vectors[owners] == 0
        distinct, member = np.unique(gfns[alive], return_inverse=True)
        held, hits = self._core.held(AccessKind.WALK, distinct)
        if not hits.all():
            held = self._access_tables(run, gfns[alive], owners[alive], AccessKind.WALK)
        pages[alive], keys[alive] = held["page"][member], held["key"][member]
        return pages, keys, run.vectors[owners] == 0

    def _access_tables(self, run: _Run, gfns: Words, owners: Rows, kind: AccessKind) -> Entries:
        """Access table pages for the pages `owners`: where the distinct ones lie. A fault stops all that need it."""
        distinct, first, member = np.unique(gfns, return_index=True, return_inverse=True)
        found = self._place(run, owners[first], distinct, kind, np.ones(len(distinct), bool))
        addresses = np.where(found.vectors[member] == _NPF, gfns, run.virtual[owners]) << U64(PAGE_SHIFT)
        run.fail(owners, found.vectors[member], found.errors[member], addresses)
        entries = np.zeros(len(distinct), ENTRY)
        entries["virtual"], entries["page"], entries["key"] = distinct, found.pages, found.keys
        if kind is AccessKind.WALK:
            granted = found.vectors == 0
            run.tables.append((owners[first][granted], entries[granted]))
        return entries

    def _mark_tables(self, run: _Run, found: Walk, write: bool) -> None:
        """Set accessed and dirty bits in the guest's tables, from the top; each is a write to the table's page."""
        for step in found.steps:
            bits = step.missing(write)
            mine = (bits != 0) & (run.vectors[step.owners] == 0)
            if mine.any():
                self._access_tables(run, step.tables[mine], step.owners[mine], AccessKind.UPDATE)
                run.update(step.owners[mine], step.keys[mine], step.addresses[mine], bits[mine])

    def _place(
        self, run: _Run, owners: Rows, gfns: Words, kind: AccessKind, guest_c: Flags, *, checked: bool = True
    ) -> _Placed:
        """The nested half of an access to guest pages, for the pages `owners`: nested tables, then the RMP."""
        purpose = _PURPOSES.get(kind, Kind.GUEST_WALK)
        choice = self._choose(purpose, guest_c, False, gfns)
        snp_enabled = self._core.physical.snp_enabled
        rmp = self._machine.rmp if snp_enabled else None
        c_bit = self._machine.product.c_bit
        nested = nested_walk(
            self._machine.memory,
            rmp,
            self._nested_root,
            gfns,
            kind,
            c_bit=c_bit,
            host_keys=self._host_keys,
            together=bool((owners[1:] > owners[:-1]).all()),
        )
        if nested.host_c.any():
            choice = self._choose(purpose, guest_c, nested.host_c, gfns)
        vectors = np.where(nested.faults, _NPF, 0).astype(np.uint8)
        errors = nested.errors.copy()
        self._mark_nested(run, owners, nested.steps, ~nested.faults, kind.writes_nested)
        if checked:
            for large in (False, True):
                mine = ~nested.faults & (nested.large == large)
                if not mine.any():
                    continue
                results = self._check(nested.pages[mine], gfns[mine], choice.private[mine], kind, large)
                refused = results != Access.GRANTED
                places = np.flatnonzero(mine)[refused]
                vectors[places] = np.where(results[refused] == Access.NOT_VALIDATED, _VC, _NPF)
                errors[places] = _REFUSED | _NO_RIGHT * (results[refused] == Access.VMPL)
        errors |= _NESTED_ERRORS[kind] | _ENCRYPTED * choice.private
        errors[vectors == _VC] = ExitCode.PAGE_NOT_VALIDATED
        return _Placed(nested.pages, choice.keys, nested.large, choice.private, vectors, errors)

    def _mark_nested(self, run: _Run, owners: Rows, steps: list[Step], passed: Flags, write: bool) -> None:
        """Accessed and dirty bits in the nested tables, whose pages the walk has just found the hypervisor's."""
        for step in steps:
            mine = passed[step.owners]
            run.update(owners[step.owners[mine]], step.keys[mine], step.addresses[mine], step.missing(write)[mine])

    def _check(self, pages: Words, gfns: Words, private: Flags, kind: AccessKind, large: bool) -> NDArray[np.uint8]:
        """The RMP's checks on pages in nested leaves of one size, by the guest's context (APM2 table 15-39).

        That updates of tables count as 4 KB writes cannot show: the walk before has asked for all of a 2 MB mapping.
        """
        core, rmp, results = self._core, self._machine.rmp, np.zeros(len(pages), np.uint8)
        own = private & (self.context is Context.SNP)
        if own.any():
            vmpl, need = core.registers["vmpl"], kind.need(core.registers["cpl"])
            results[own] = check_guest(rmp, pages[own], gfns[own], core.asid, vmpl, need, large=large)
        if kind.writes_nested and core.physical.snp_enabled and not own.all():
            results[~own] = check_write(rmp, pages[~own], large=large)
        return results

    def _choose(self, purpose: Kind, guest_c: Flags, host_c: Flags | bool, gfns: Words | None) -> KeyChoice:
        """Who decides encryption, for this guest."""
        registers, vtom = self._core.registers, np.asarray(Vtom.OFF)
        if self._vtom and gfns is not None:
            vtom = np.where(gfns << U64(PAGE_SHIFT) < U64(registers["virtual_tom"]), Vtom.BELOW, Vtom.ABOVE)
        return choose_keys(
            self.context,
            purpose,
            guest_c,
            host_c,
            self._core.asid,
            paging=Paging.LONG if registers["cr0"] & CR0_PG else Paging.OFF,
            vtom=vtom,
            vte=self._vte,
            encryption_enabled=self._encryption,
        )

    def _leave(self, run: _Run, stop: int) -> None:
        """What the walks leave, up to that of the page that faults, which has got as far as it has: bits, and in the
        TLB the places of tables.
        """
        for owners, keys, addresses, bits in run.updates:
            mine = owners <= stop
            set_bits(self._machine.memory, keys[mine], addresses[mine], bits[mine])
        for owners, entries in run.tables:
            self._core.hold(AccessKind.WALK, entries[owners <= stop])

    def _fault(self, run: _Run, stop: int, gfns: Words) -> Fault | None:
        """The fault of the first page that has one; an #NPF stands for all that follow before another kind."""
        if stop == len(run.virtual):
            return None
        vector, error, address = int(run.vectors[stop]), int(run.errors[stop]), int(run.addresses[stop])
        if vector != _NPF:
            return GuestException(vector, error, address)
        refused = run.vectors[stop:] == _NPF
        places = np.where(refused, run.addresses[stop:] >> U64(PAGE_SHIFT), gfns[stop:])
        step = run_step(places)
        alike = (refused & (run.errors[stop:] == error)) | (run.vectors[stop:] == 0)
        alike &= places == places[0] + np.arange(len(places), dtype=U64) * U64(step)
        refused = refused[: len(alike) if alike.all() else int(np.argmin(alike))]
        count, span = int(np.count_nonzero(refused)), len(refused) - int(np.argmax(refused[::-1]))
        fault = Npf(address, FaultError(error), count, step, span if span > count else 0)
        return nested_fault(self._core, fault, int(run.virtual[stop]) << PAGE_SHIFT)


def run_step(gfns: Words) -> int:
    """The distance of pages that fault one after the other: 512 where the first two are a 2 MB page apart, else 1."""
    return PAGES_PER_LARGE if len(gfns) > 1 and gfns[1] == gfns[0] + U64(PAGES_PER_LARGE) else 1
