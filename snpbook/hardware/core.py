"""A core in guest mode: what the running guest's accesses do, between VMRUN and #VMEXIT.

`translate` asks the TLB, and for what it does not hold both page walks and the RMP (`walker`). All executors share it.
A guest's registers are the fields of its save area and nothing else. Sources: APM2 15.34 to 15.36.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from snpbook.hardware.cache import Cache
from snpbook.hardware.checks import USER_CPL, AccessKind
from snpbook.hardware.dram import Bytes, Words
from snpbook.hardware.exits import GuestException
from snpbook.hardware.machine import Core, Machine
from snpbook.hardware.msr import GuestMsrs
from snpbook.hardware.paging import Flags, distinct_keys
from snpbook.hardware.rmp import U64
from snpbook.hardware.tlb import Entries
from snpbook.hardware.walker import Fault, PageWalker, Translation
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.products import TSC_MHZ
from snpbook.spec.vmcb import ExitCode
from snpbook.spec.vmsa import RFLAGS_AC, SNP_ACTIVE

_WORD = 8
VECTOR_GP, VECTOR_PF, VECTOR_VC = 13, 14, 29
_FLUSHING = {"cr0": False, "cr3": True, "cr4": False, "efer": False}
"""Registers whose load drops the guest's translations, and whether those of global pages stay."""


class GuestCore:
    """One vCPU while it runs: its VMCB, its registers, and `physical`, the core that it runs on."""

    def __init__(
        self, machine: Machine, vmcb: Record, registers: dict[str, Any], vcpu: str, physical: Core | None = None
    ) -> None:
        self.machine, self.vcpu, self.vmcb = machine, vcpu, vmcb
        self.physical = physical or machine.cores[0]
        self.event: GuestException | None = None
        """What was injected and comes first."""
        self.sev_es = bool(vmcb.sev_es)
        self.snp = self.sev_es and bool(registers["sev_features"] & SNP_ACTIVE)
        self.asid: int = vmcb.asid
        self.registers = registers
        self.msrs = GuestMsrs(
            machine.product, registers, bool(vmcb.sev), bool(vmcb.sev_es), vmcb.ghcb_gpa, TSC_MHZ, self.flush_tlb
        )
        self._walker = PageWalker(self)

    def deliver(self, exception: GuestException) -> None:
        """What the core notes when it delivers an exception: CR2, where the exception has an address."""
        if exception.vector == VECTOR_PF or exception.error == ExitCode.PAGE_NOT_VALIDATED:
            self.registers["cr2"] = exception.address

    def load(self, name: str, value: int) -> None:
        """Load a register as its own instruction does: CR0, CR3, CR4 and EFER drop the guest's translations."""
        self.registers[name] = value
        if name in _FLUSHING:
            self.physical.tlb.flush(self.asid, keep_global=_FLUSHING[name])

    def flush_tlb(self) -> None:
        """Drop the guest's translations, those of global pages too."""
        self.physical.tlb.flush(self.asid)

    def invlpg(self, address: int) -> None:
        """INVLPG: drop the translations of one page."""
        self.physical.tlb.flush_page(self.asid, address >> PAGE_SHIFT)

    def translate(self, virtual: Words, kind: AccessKind = AccessKind.READ) -> Translation:
        """Translate guest virtual pages for an access at the guest's CPL, and check them against the RMP.

        What the TLB holds is neither walked for nor checked again. The first page that faults ends the translation; of
        its faults the first in this order counts: #PF of the guest's tables, #NPF of the nested tables, RMP checks
        (APM2 15.36.10).
        """
        held, hits = self.held(kind, virtual)
        if hits.all():
            return Translation(held, None)
        missed = np.flatnonzero(~hits)
        walked = self._walker.walk(virtual[missed], kind)
        self.hold(kind, walked.entries)
        held[missed[: len(walked)]] = walked.entries
        return Translation(held if walked.fault is None else held[: missed[len(walked)]], walked.fault)

    def translate_unchecked(self, virtual: Words) -> Translation:
        """Translate for an instruction that checks its pages against the RMP itself; the TLB is not asked (MODEL)."""
        return self._walker.walk(virtual, AccessKind.READ, checked=False)

    def held(self, kind: AccessKind, numbers: Words) -> tuple[Entries, Flags]:
        """What the TLB holds for an access to virtual pages, or to guest pages with tables, and of which it does."""
        return self.physical.tlb.lookup(self.machine.rmp.changes, self.asid, self._tag(kind), numbers)

    def hold(self, kind: AccessKind, entries: Entries) -> None:
        """Put into the TLB what a walk has found."""
        self.physical.tlb.fill(self.asid, self._tag(kind), entries)

    def _tag(self, kind: AccessKind) -> int:
        """What a translation depends on besides address, ASID and what flushes: VMPL, kind, CPL and RFLAGS.AC."""
        registers = self.registers
        number = int(registers["vmpl"]) * len(AccessKind) + kind.number
        return number << 2 | bool(registers["cpl"] == USER_CPL) << 1 | bool(registers["rflags"] & RFLAGS_AC)

    def read(self, address: int, size: int) -> bytes | Fault:
        """Read guest virtual memory: plaintext of private pages, raw bytes of shared ones."""
        return self._get(address, size, AccessKind.READ)

    def fetch(self, address: int, size: int) -> bytes | Fault:
        """Fetch instruction bytes: in a guest with SEV they are private whatever the tables say."""
        return self._get(address, size, AccessKind.FETCH)

    def touch(self, address: int, count: int) -> tuple[int, Fault | None]:
        """Read the first and the last byte of each of `count` pages: how many it got to, and the fault behind them.

        What is read is not asked for. It brings lines into a cache; where there is none it does nothing.
        """
        found = self.translate(_virtual_pages(address, count * PAGE_SIZE))
        if isinstance(self.machine.memory, Cache):
            for key in distinct_keys(found.keys):
                first = found.pages[found.keys == key] << U64(PAGE_SHIFT)
                self.machine.memory.words(key, np.stack([first, first + U64(PAGE_SIZE - _WORD)]))
        return len(found), found.fault

    def write(self, address: int, data: bytes) -> Fault | None:
        """Write guest virtual memory; on a fault nothing is written."""
        found = self._access(address, len(data), AccessKind.WRITE)
        if found.fault is not None:
            return found.fault
        if len(np.unique(found.pages)) < len(found.pages):  # one page by several names: in the order of the addresses
            for start, stop in pairwise(
                [0, *range(-address % PAGE_SIZE or PAGE_SIZE, len(data), PAGE_SIZE), len(data)]
            ):
                self.write(address + start, data[start:stop])
            return None
        content = np.array(self._load(found))
        start = address % PAGE_SIZE
        content.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        for key in distinct_keys(found.keys):
            mine = found.keys == key
            self.machine.memory.write_pages(key, found.pages[mine], content[mine])
        return None

    def _get(self, address: int, size: int, kind: AccessKind) -> bytes | Fault:
        found = self._access(address, size, kind)
        if found.fault is not None:
            return found.fault
        start = address % PAGE_SIZE
        return self._load(found).reshape(-1)[start : start + size].tobytes()

    def _access(self, address: int, size: int, kind: AccessKind) -> Translation:
        """Translate a range of bytes; an exception has the address of the first byte that it concerns."""
        found = self.translate(_virtual_pages(address, size), kind)
        if isinstance(found.fault, GuestException):
            found.fault.address = max(found.fault.address, address)
        return found

    def _load(self, found: Translation) -> Bytes:
        keys = distinct_keys(found.keys)
        if len(keys) == 1:
            return self.machine.memory.read_pages(keys[0], found.pages)
        data = np.empty((len(found.pages), PAGE_SIZE), np.uint8)
        for key in keys:
            mine = found.keys == key
            data[mine] = self.machine.memory.read_pages(key, found.pages[mine])
        return data


def _virtual_pages(address: int, size: int) -> Words:
    """The virtual page numbers that a byte range touches."""
    return np.arange(address >> PAGE_SHIFT, -(-(address + size) // PAGE_SIZE), dtype=U64)
