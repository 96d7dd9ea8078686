"""A core in guest mode: what the running guest's accesses and instructions do, between VMRUN and #VMEXIT.

`translate` walks both tables and asks the RMP, in this order: guest tables, nested tables, RMP. All
executors share it. A guest's registers are the VMSA's fields and nothing else. Sources: APM2 15.34 to
15.36; section numbers at the checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from snpbook.hardware.checks import Access, check_guest, check_write
from snpbook.hardware.dram import Words, page_numbers
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.instructions import Codes, Validation, pvalidate
from snpbook.hardware.machine import Machine
from snpbook.hardware.paging import Flags, guest_walk, nested_walk
from snpbook.hardware.rmp import U64
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, VmplPermission
from snpbook.spec.rmp import RmpCode
from snpbook.spec.vmcb import ExitCode, FaultError
from snpbook.spec.vmsa import CR0_PG, EFER_LME
from snpbook.trace import Instruction

VECTOR_PF, VECTOR_VC = 14, 29
WINDOW = 2048
"""Pages of a run that are translated at once: a fault costs at most this many walks again."""
Fault = Npf | GuestException


@dataclass(frozen=True, slots=True)
class Translation:
    """System pages behind guest virtual pages, up to the first fault at index `stop`."""

    pages: Words
    gfns: Words
    private: Flags
    stop: int
    fault: Fault | None


class GuestCore:
    """One vCPU while it runs: its VMCB (asid, nested tables) and its registers."""

    def __init__(self, machine: Machine, vmcb: Record, registers: dict[str, Any], vcpu: str) -> None:
        self.machine, self.vcpu = machine, vcpu
        self.asid: int = vmcb.asid
        self.nested_root: int = vmcb.nested_cr3
        self.ghcb_msr: int = vmcb.ghcb_gpa
        self.registers = registers

    def translate(self, virtual: Words, *, write: bool = False, validating: bool = False) -> Translation:
        """Translate guest virtual pages for a data access, or for PVALIDATE (`validating`).

        Without paging every access is private and the address is physical (APM2 15.34.4).
        """
        count = len(virtual)
        if not self.registers["cr0"] & CR0_PG:
            return self._system(virtual, np.ones(count, bool), count, None, write, validating)
        if not self.registers["efer"] & EFER_LME:
            raise ValueError("paging without long mode is not modelled (LIMITATIONS.md)")
        walk = guest_walk(self._read_table, self.registers["cr3"], self.machine.product.c_bit, virtual)
        stop, fault = walk.stop, walk.fault
        bad = ~(walk.writable if write else walk.present)
        if bad[:stop].any():
            stop = int(np.argmax(bad[:stop]))
            error = FaultError.PRESENT * int(walk.present[stop]) | FaultError.WRITE * write
            fault = GuestException(VECTOR_PF, error, int(virtual[stop]) << PAGE_SHIFT)
        assert fault is None or isinstance(fault, Npf | GuestException)
        return self._system(walk.gfns, walk.private, stop, fault, write, validating, virtual)

    def _read_table(self, gfn: int) -> Words | Fault:
        """One page of the guest's page tables: always private, whatever the C-bit says."""
        found = self._system(np.array([gfn], U64), np.ones(1, bool), 1, None, False, False)
        if isinstance(found.fault, Npf):
            error = found.fault.error & ~FaultError.FINAL_GPA | FaultError.PAGE_TABLE_WALK
            return Npf(found.fault.gpa, error)
        if found.fault is not None:
            return found.fault
        return self.machine.encryption.read_pages(self.asid, found.pages).view("<u8").reshape(-1)

    def _system(
        self,
        gfns: Words,
        private: Flags,
        stop: int,
        fault: Fault | None,
        write: bool,
        validating: bool,
        virtual: Words | None = None,
    ) -> Translation:
        """The nested half: nested tables first, then the RMP (APM2 15.36.10)."""
        gfns, private = gfns[:stop], private[:stop]
        nested = nested_walk(self.machine.dram, self.nested_root, gfns)
        bad = ~(nested.writable if write else nested.present)
        if bad.any():
            stop = int(np.argmax(bad))
            error = FaultError.PRESENT * int(nested.present[stop]) | self._error(private[stop], write)
            fault = Npf(int(gfns[stop]) << PAGE_SHIFT, error, _alike(bad, gfns, private, stop))
        found = np.zeros(stop, np.uint8)
        pages, large = nested.pages[:stop], nested.large[:stop]
        need = VmplPermission.WRITE | VmplPermission.READ if write else VmplPermission.READ
        for size in np.unique(large):
            mine = private[:stop] & (large == size)
            found[mine] = check_guest(
                self.machine.rmp,
                pages[mine],
                gfns[:stop][mine],
                self.asid,
                self.registers["vmpl"],
                need,
                large=bool(size),
                owner_only=validating,
            )
        if write and not private[:stop].all():
            found[~private[:stop]] = check_write(self.machine.rmp, pages[~private[:stop]])
        if found.any():
            bad = found != Access.GRANTED
            stop = int(np.argmax(bad))
            kind = Access(int(found[stop]))
            if kind is Access.NOT_VALIDATED:
                address = int((gfns if virtual is None else virtual)[stop]) << PAGE_SHIFT
                fault = GuestException(VECTOR_VC, ExitCode.PAGE_NOT_VALIDATED, address)
            else:
                error = FaultError.PRESENT | FaultError.RMP | self._error(private[stop], write)
                if kind is Access.VMPL:
                    error |= FaultError.VMPL
                fault = Npf(int(gfns[stop]) << PAGE_SHIFT, error, _alike(found == kind, gfns, private, stop))
        return Translation(pages, gfns, private, stop, fault)

    def _error(self, private: bool, write: bool) -> FaultError:
        error = FaultError.USER | FaultError.FINAL_GPA
        return error | FaultError.ENCRYPTED * int(private) | FaultError.WRITE * int(write)

    def read(self, address: int, size: int) -> bytes | Fault:
        """Read guest virtual memory: plaintext of private pages, raw bytes of shared ones."""
        found = self.translate(_pages(address, size))
        if found.fault is not None:
            return found.fault
        start = address % PAGE_SIZE
        return self._load(found).reshape(-1)[start : start + size].tobytes()

    def _load(self, found: Translation) -> np.ndarray[Any, np.dtype[np.uint8]]:
        private = found.private
        if private.all():
            return self.machine.encryption.read_pages(self.asid, found.pages)
        data = np.array(self.machine.dram.gather(found.pages))
        if private.any():
            data[private] = self.machine.encryption.read_pages(self.asid, found.pages[private])
        return data

    def write(self, address: int, data: bytes) -> Fault | None:
        """Write guest virtual memory; on a fault nothing is written."""
        found = self.translate(_pages(address, len(data)), write=True)
        if found.fault is not None:
            return found.fault
        content = np.array(self._load(found))
        start = address % PAGE_SIZE
        content.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        private = found.private
        if private.any():
            self.machine.encryption.write_pages(self.asid, found.pages[private], content[private])
        if not private.all():
            self.machine.dram.scatter(found.pages[~private], content[~private])
        return None

    def pvalidate(self, address: int, count: int, validate: bool, large: bool) -> tuple[Codes, Flags, Fault | None]:
        """Execute PVALIDATE for `count` pages from `address` on, up to the first fault.

        Return codes and carry flags of the pages done; the fault of the page behind them.
        """
        step = PAGES_PER_LARGE if large else 1
        if large and address >> PAGE_SHIFT & PAGES_PER_LARGE - 1:
            return np.full(count, RmpCode.FAIL_INPUT, np.uint8), np.zeros(count, bool), None
        if self.registers["vmpl"] or self.registers["cpl"]:
            raise GuestException(13, 0, address)
        first = address >> PAGE_SHIFT
        codes: list[Codes] = []
        unchanged: list[Flags] = []
        fault: Fault | None = None
        for start in range(0, count, WINDOW):
            virtual = first + step * np.arange(start, min(start + WINDOW, count), dtype=U64)
            done, fault = self._pvalidate(virtual, validate, large)
            codes.append(done.codes)
            unchanged.append(done.unchanged)
            if fault is not None:
                break
        return np.concatenate(codes), np.concatenate(unchanged), fault

    def _pvalidate(self, virtual: Words, validate: bool, large: bool) -> tuple[Validation, Fault | None]:
        """One window of a PVALIDATE run: what was done, and the fault behind it."""
        found = self.translate(virtual, validating=True)
        rmp, pages = self.machine.rmp, found.pages[: found.stop]
        before = rmp.load(pages).copy() if self.machine.trace else None
        done = pvalidate(rmp, pages, found.gfns[: found.stop], self.asid, validate, large)
        stop, fault = len(done.codes), found.fault
        if done.fault is not None:
            error = FaultError.PRESENT | FaultError.RMP | self._error(True, False)
            if done.fault is Access.PAGE_SIZE:
                error |= FaultError.SIZE_MISMATCH
            fault = Npf(int(found.gfns[stop]) << PAGE_SHIFT, error)
        if before is not None and stop:
            self.machine.trace.emit(
                Instruction(
                    name="PVALIDATE",
                    actor=self.vcpu,
                    pages=_run(pages[:stop], PAGES_PER_LARGE if large else 1),
                    status=done.codes,
                    before=before[:stop],
                    after=rmp.load(pages[:stop]).copy(),
                )
            )
        return done, fault


def _pages(address: int, size: int) -> Words:
    """The virtual page numbers that a byte range touches."""
    return np.arange(address >> PAGE_SHIFT, (address + max(size, 1) - 1 >> PAGE_SHIFT) + 1, dtype=U64)


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
