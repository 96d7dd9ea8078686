"""A core in guest mode: what the running guest's accesses and instructions do, between VMRUN and #VMEXIT.

`translate` walks both tables and asks the RMP, in this order: guest tables, nested tables, RMP. All
executors share it. A guest's registers are the VMSA's fields and nothing else. Sources: APM2 15.34 to
15.36; section numbers at the checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import Access, check_guest, check_write
from snpbook.hardware.dram import Bytes, Words, page_numbers
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.instructions import Codes, Validation, pvalidate
from snpbook.hardware.machine import Machine
from snpbook.hardware.msr import GuestMsrs
from snpbook.hardware.paging import Flags, guest_walk, nested_walk
from snpbook.hardware.rmp import U64
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, VmplPermission
from snpbook.spec.rmp import RmpCode
from snpbook.spec.vmcb import ExitCode, FaultError
from snpbook.spec.vmsa import CR0_PG, CR0_WP, EFER_LME
from snpbook.trace import Instruction

VECTOR_GP, VECTOR_PF, VECTOR_VC = 13, 14, 29
WINDOW = 2048
"""Pages of a run that are translated at once: a fault costs at most this many walks again."""
_ALL_PAGES, _HALF = U64(2 ** (64 - PAGE_SHIFT) - 1), U64(2 ** (47 - PAGE_SHIFT))
"""Virtual page numbers; canonical addresses repeat bit 47 up to bit 63."""
Fault = Npf | GuestException


@dataclass(frozen=True, slots=True)
class Translation:
    """Guest virtual pages and what lies behind them, up to the first page that faults; `fault` is that one's."""

    virtual: Words
    gfns: Words
    private: Flags
    pages: Words
    large: Flags
    fault: Fault | None

    def before(self, stop: int, fault: Fault) -> Translation:
        """The pages before index `stop`, where an earlier fault was found."""
        return Translation(
            self.virtual[:stop], self.gfns[:stop], self.private[:stop], self.pages[:stop], self.large[:stop], fault
        )


class GuestCore:
    """One vCPU while it runs: its VMCB (asid, nested tables) and its registers."""

    def __init__(self, machine: Machine, vmcb: Record, registers: dict[str, Any], vcpu: str) -> None:
        self.machine, self.vcpu = machine, vcpu
        self.asid: int = vmcb.asid
        self.nested_root: int = vmcb.nested_cr3
        self.registers = registers
        self.msrs = GuestMsrs(
            machine.product, registers, bool(vmcb.sev), bool(vmcb.sev_es), vmcb.ghcb_gpa, 2400, lambda: None
        )

    def deliver(self, exception: GuestException) -> None:
        """What the core notes when it delivers an exception: CR2, where the exception has an address."""
        if exception.vector == VECTOR_PF or exception.error == ExitCode.PAGE_NOT_VALIDATED:
            self.registers["cr2"] = exception.address

    def translate(self, virtual: Words, *, write: bool = False) -> Translation:
        """Translate guest virtual pages for a data access at CPL 0, and check them against the RMP.

        The first page that faults ends the translation; of its faults the first in this order counts: #PF of the
        guest's tables, #NPF of the nested tables, RMP checks (APM2 15.36.10).
        """
        return self._checked(self._walk(virtual, write), write)

    def _walk(self, virtual: Words, write: bool) -> Translation:
        """Both page walks; without paging every access is private and the address is physical (APM2 15.34.4)."""
        if not self.registers["cr0"] & CR0_PG:
            return self._nested(virtual, virtual, np.ones(len(virtual), bool), None, write)
        if not self.registers["efer"] & EFER_LME:
            raise ValueError("paging without long mode is not modelled (LIMITATIONS.md)")
        wild = (virtual + _HALF) & _ALL_PAGES >= 2 * _HALF
        if wild.any():
            stop = int(np.argmax(wild))
            found = self._walk(virtual[:stop], write)
            return found if found.fault else found.before(stop, GuestException(VECTOR_GP, 0, 0))
        walk = guest_walk(self._read_table, self.registers["cr3"], self.machine.product.c_bit, virtual)
        stop, fault = walk.stop, walk.fault
        bad = ~(walk.writable if write and self.registers["cr0"] & CR0_WP else walk.present)
        if bad[:stop].any():
            stop = int(np.argmax(bad[:stop]))
            error = FaultError.PRESENT * int(walk.present[stop]) | FaultError.WRITE * write
            fault = GuestException(VECTOR_PF, error, 0)
        assert fault is None or isinstance(fault, Npf | GuestException)
        if isinstance(fault, GuestException):  # of a table page: the address is still the one that was asked for
            fault.address = int(virtual[stop]) << PAGE_SHIFT
        return self._nested(virtual[:stop], walk.gfns[:stop], walk.private[:stop], fault, write)

    def _read_table(self, gfn: int) -> Words | Fault:
        """One page of the guest's page tables: always private, whatever the C-bit says."""
        page = np.array([gfn], U64)
        found = self._checked(self._nested(page, page, np.ones(1, bool), None, False), False)
        if isinstance(found.fault, Npf):
            error = found.fault.error & ~FaultError.FINAL_GPA | FaultError.PAGE_TABLE_WALK
            return Npf(found.fault.gpa, error)
        if found.fault is not None:
            return found.fault
        return self.machine.memory.read_pages(self.asid, found.pages).view("<u8").reshape(-1)

    def _nested(self, virtual: Words, gfns: Words, private: Flags, fault: Fault | None, write: bool) -> Translation:
        """The nested tables, for guest pages of which the guest's own tables have faulted behind the last."""
        walk = nested_walk(self.machine.memory, self.nested_root, gfns, write)
        found = Translation(virtual, gfns, private, walk.pages, walk.large, fault)
        if not walk.faults.any():
            return found
        stop = int(np.argmax(walk.faults))
        error = FaultError(int(walk.errors[stop])) | self._error(bool(private[stop]), write)
        alike = walk.faults & (walk.errors == walk.errors[stop])
        return found.before(stop, Npf(int(gfns[stop]) << PAGE_SHIFT, error, _alike(alike, gfns, private, stop)))

    def _checked(self, found: Translation, write: bool) -> Translation:
        """The RMP's checks on the pages that both walks let through (APM2 15.36.10)."""
        rmp, private, pages = self.machine.rmp, found.private, found.pages
        results = np.zeros(len(pages), np.uint8)
        need = VmplPermission.WRITE | VmplPermission.READ if write else VmplPermission.READ
        for large in (False, True):
            mine = private & (found.large == large)
            if mine.any():
                vmpl = self.registers["vmpl"]
                results[mine] = check_guest(rmp, pages[mine], found.gfns[mine], self.asid, vmpl, need, large=large)
            shared = ~private & (found.large == large)
            if write and shared.any():
                results[shared] = check_write(rmp, pages[shared], large=large)
        if not results.any():
            return found
        stop = int(np.argmax(results != Access.GRANTED))
        return found.before(stop, self._rmp_fault(found, results, stop, write))

    def _rmp_fault(self, found: Translation, results: NDArray[np.uint8], stop: int, write: bool) -> Fault:
        """What a failed check becomes: #VC where the page is not validated, otherwise #NPF."""
        kind = Access(int(results[stop]))
        if kind is Access.NOT_VALIDATED:
            address = int(found.virtual[stop]) << PAGE_SHIFT
            return GuestException(VECTOR_VC, ExitCode.PAGE_NOT_VALIDATED, address)
        error = FaultError.PRESENT | FaultError.RMP | self._error(bool(found.private[stop]), write)
        if kind is Access.VMPL:
            error |= FaultError.VMPL
        count = _alike(results == kind, found.gfns, found.private, stop)
        return Npf(int(found.gfns[stop]) << PAGE_SHIFT, error, count)

    def _error(self, private: bool, write: bool) -> FaultError:
        error = FaultError.USER | FaultError.FINAL_GPA
        return error | FaultError.ENCRYPTED * int(private) | FaultError.WRITE * int(write)

    def read(self, address: int, size: int) -> bytes | Fault:
        """Read guest virtual memory: plaintext of private pages, raw bytes of shared ones."""
        found = self._access(address, size, write=False)
        if found.fault is not None:
            return found.fault
        start = address % PAGE_SIZE
        return self._load(found).reshape(-1)[start : start + size].tobytes()

    def write(self, address: int, data: bytes) -> Fault | None:
        """Write guest virtual memory; on a fault nothing is written."""
        found = self._access(address, len(data), write=True)
        if found.fault is not None:
            return found.fault
        if len(np.unique(found.pages)) < len(found.pages):  # one page by several names: in the order of the addresses
            for start, stop in pairwise(
                [0, *range(-address % PAGE_SIZE or PAGE_SIZE, len(data), PAGE_SIZE), len(data)]
            ):
                self.write(address + start, data[start:stop])
            return None
        content = np.array(self._load(found))
        start, private = address % PAGE_SIZE, found.private
        content.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        if private.any():
            self.machine.memory.write_pages(self.asid, found.pages[private], content[private])
        if not private.all():
            self.machine.memory.write_pages(KeyId.UNENCRYPTED, found.pages[~private], content[~private])
        return None

    def _access(self, address: int, size: int, *, write: bool) -> Translation:
        """Translate a range of bytes; an exception has the address of the first byte that it concerns."""
        found = self.translate(_virtual_pages(address, size), write=write)
        if isinstance(found.fault, GuestException):
            found.fault.address = max(found.fault.address, address)
        return found

    def _load(self, found: Translation) -> Bytes:
        private = found.private
        if private.all():
            return self.machine.memory.read_pages(self.asid, found.pages)
        data = np.array(self.machine.memory.read_pages(KeyId.UNENCRYPTED, found.pages))
        if private.any():
            data[private] = self.machine.memory.read_pages(self.asid, found.pages[private])
        return data

    def pvalidate(self, address: int, count: int, validate: bool, large: bool) -> tuple[Codes, Flags, Fault | None]:
        """Execute PVALIDATE for `count` pages from `address` on, up to the first fault.

        Return codes and carry flags of the pages done; the fault of the page behind them.
        """
        codes, unchanged = np.zeros(0, np.uint8), np.zeros(0, bool)
        if self.registers["vmpl"] or self.registers["cpl"]:
            return codes, unchanged, GuestException(VECTOR_GP, 0, address)
        if large and address % LARGE_PAGE_SIZE:
            return np.full(count, RmpCode.FAIL_INPUT, np.uint8), np.zeros(count, bool), None
        step, fault = PAGES_PER_LARGE if large else 1, None
        while len(codes) < count and fault is None:
            window = np.arange(len(codes), min(len(codes) + WINDOW, count), dtype=U64)
            done, fault = self._pvalidate(U64(address >> PAGE_SHIFT) + window * U64(step), validate, large)
            codes, unchanged = np.append(codes, done.codes), np.append(unchanged, done.unchanged)
        return codes, unchanged, fault

    def _pvalidate(self, virtual: Words, validate: bool, large: bool) -> tuple[Validation, Fault | None]:
        """One window of a PVALIDATE run: what was done, and the fault behind it.

        The page's own C-bit does not matter: the instruction works on the private page (unconfirmed).
        """
        found = self._walk(virtual, write=False)
        rmp, pages, private = self.machine.rmp, found.pages, np.ones(len(found.pages), bool)
        before = rmp.peek(pages) if self.machine.trace else None
        done = pvalidate(rmp, pages, found.gfns, self.asid, validate, large)
        stop, fault = len(done.codes), found.fault
        if done.fault is not None:
            error = FaultError.PRESENT | FaultError.RMP | self._error(True, False)
            if done.fault is Access.PAGE_SIZE:
                error |= FaultError.SIZE_MISMATCH
            alike = np.append(np.zeros(stop, bool), done.checks == done.fault)
            fault = Npf(int(found.gfns[stop]) << PAGE_SHIFT, error, _alike(alike, found.gfns, private, stop))
        if before is not None and stop:
            self.machine.trace.emit(
                Instruction(
                    name="PVALIDATE",
                    actor=self.vcpu,
                    pages=_run(pages[:stop], PAGES_PER_LARGE if large else 1),
                    status=done.codes,
                    before=before[:stop],
                    after=rmp.peek(pages[:stop]),
                )
            )
        return done, fault


def _virtual_pages(address: int, size: int) -> Words:
    """The virtual page numbers that a byte range touches."""
    return np.arange(address >> PAGE_SHIFT, -(-(address + size) // PAGE_SIZE), dtype=U64)


def _alike(bad: Flags, gfns: Words, private: Flags, first: int) -> int:
    """How many pages from `first` on fault in the same way at consecutive guest addresses."""
    count = len(bad) - first
    same = (
        bad[first:]
        & (gfns[first:] == gfns[first] + np.arange(count, dtype=U64))
        & (private[first : first + count] == private[first])
    )
    return count if same.all() else int(np.argmin(same))


def _run(pages: Words, step: int) -> range | Words:
    """System pages as a run where they are one."""
    first = int(pages[0])
    run = range(first, first + len(pages) * step, step)
    return run if np.array_equal(pages, page_numbers(run)) else pages
