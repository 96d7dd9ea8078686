"""A machine with SNP on and guests put together by hand: no firmware, no KVM, nothing between the reader and the RMP.

The workbench only does what a host, or the firmware for it, could do: guests' tables are real tables in memory, their
own ones private and validated by the guest itself. Its addresses and the rights in its tables are choices (MODEL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from snpbook.hardware.core import GuestCore
from snpbook.hardware.core_rmp import adjust_rights, validate_pages
from snpbook.hardware.dram import Words
from snpbook.hardware.host_instructions import Codes, NewState
from snpbook.hardware.machine import Machine
from snpbook.hardware.paging import Flags
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.walker import Fault
from snpbook.spec.msr import SYSCFG_MEM_ENCRYPT, SYSCFG_MFDM, SYSCFG_SNP_EN, SYSCFG_VMPL_EN, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE, VmplPermission
from snpbook.spec.products import product as find_product
from snpbook.spec.rmp import RmpCode
from snpbook.spec.vmcb import PTE_LARGE, PTE_PRESENT, PTE_SIZE, PTE_USER, PTE_WRITE, PTES_PER_TABLE, VMCB
from snpbook.spec.vmsa import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SVME,
    SNP_ACTIVE,
    VMSA,
)
from snpbook.trace import Trace

INSTALLED = 64 << 20
PLAY = range(4 * PAGES_PER_LARGE, 6 * PAGES_PER_LARGE)
"""The pages to play with: two regions of 2 MB, nobody's yet."""
SHARED_WINDOW = 1 << 39
"""From here on a guest sees its first GB once more, without the C-bit."""
SMALL_LEAVES = 2 * PAGES_PER_LARGE
"""Guest pages that the guest's own tables map by 4 KB leaves; the rest of the first GB is in leaves of 2 MB."""

_FIRST_TABLE = 8 * PAGES_PER_LARGE
_TABLE_GFN = 1 << 20
_LEVELS, _INDEX_BITS = 4, 9
_RIGHTS = PTE_PRESENT | PTE_WRITE | PTE_USER
_TABLE_RIGHTS = VmplPermission.READ | VmplPermission.WRITE
_SNP_ON = SYSCFG_MFDM | SYSCFG_MEM_ENCRYPT | SYSCFG_SNP_EN | SYSCFG_VMPL_EN
_LONG_MODE = {
    "cr0": CR0_PE | CR0_WP | CR0_PG,
    "cr4": CR4_PAE,
    "efer": EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME,
}


class Workbench:
    """One machine of a product, with `host` to act on it; `guest(asid)` adds a guest."""

    def __init__(self, product: str = "milan") -> None:
        self.trace = Trace()
        entropy = sha256(product.encode()).digest()
        self.machine = Machine(find_product(product), INSTALLED, boot_entropy=entropy, trace=self.trace, cores=1)
        for core in self.machine.cores:
            core.wrmsr(Msr.SYSCFG, _SNP_ON)
        self.machine.iommu.snp_enabled = True
        self.host = HostCpu(self.machine)
        self._free = _FIRST_TABLE
        self._guests: dict[int, BareGuest] = {}

    def __repr__(self) -> str:
        return f"Workbench({self.machine.product.name}, pages {PLAY.start:#x} to {PLAY[-1]:#x})"

    def guest(self, asid: int, *, snp: bool = True) -> BareGuest:
        """The guest with that ASID; a new one has its page tables in place and nothing else.

        One without `snp` is a guest without any encryption.
        """
        if asid not in self._guests:
            self._guests[asid] = BareGuest(self, asid, snp)
        return self._guests[asid]

    def free_page(self) -> int:
        """A page outside `PLAY` that nothing is in yet."""
        self._free += 1
        return self._free - 1


@dataclass(frozen=True, slots=True)
class Done:
    """What a guest's instruction answered: codes by name and carry flags of the pages before the fault, if any."""

    codes: tuple[str, ...]
    carries: tuple[bool, ...]
    fault: Fault | None

    @classmethod
    def of(cls, codes: Sequence[Codes], carries: Sequence[Flags], fault: Fault | None) -> Done:
        """The answers of the windows in which a run was executed, joined."""
        names = tuple(RmpCode(int(code)).name for part in codes for code in part)
        return cls(names, tuple(bool(carry) for part in carries for carry in part), fault)


class BareGuest:
    """A guest of the workbench: nested tables that the host writes, and tables of its own.

    Its virtual addresses are its physical ones, private, and behind `SHARED_WINDOW` the same without the C-bit.
    """

    def __init__(self, bench: Workbench, asid: int, snp: bool) -> None:
        self.bench, self.asid, self.snp = bench, asid, snp
        self.machine = bench.machine
        self.c_bit = 1 << self.machine.product.c_bit if snp else 0
        size = self.machine.product.memory_key_size
        key = sha256(f"guest {asid}".encode()).digest() + sha256(f"tweak {asid}".encode()).digest()
        self.machine.encryption.install(asid, key[:size])
        self._nested: dict[tuple[int, int], int] = {}
        self.nested_root = self._nested_table(_LEVELS - 1, 0)
        self.root = 0
        self.root = self._own_tables()

    def __repr__(self) -> str:
        return f"BareGuest(ASID {self.asid}{'' if self.snp else ', no SNP'})"

    def core(self, vmpl: int = 0, cpl: int = 0) -> GuestCore:
        """A core that runs this guest in 64-bit mode."""
        sev = {"sev": int(self.snp), "sev_es": int(self.snp)}
        vmcb = VMCB.record(nested_paging=1, **sev, asid=self.asid, nested_cr3=self.nested_root)
        features = SNP_ACTIVE * self.snp
        registers = dict(VMSA.record(**_LONG_MODE, cr3=self.root, vmpl=vmpl, cpl=cpl, sev_features=features))
        return GuestCore(self.machine, vmcb, registers, f"guest {self.asid} VMPL{vmpl}")

    def pvalidate(self, gfn: int, count: int = 1, *, validate: bool = True, large: bool = False) -> Done:
        """PVALIDATE at VMPL0, from the guest page `gfn` on."""
        done, fault = validate_pages(self.core(), gfn << PAGE_SHIFT, count, validate, large)
        return Done.of([one.codes for one in done], [one.unchanged for one in done], fault)

    def rmpadjust(
        self, gfn: int, count: int = 1, *, target: int, rights: VmplPermission, large: bool = False, vmpl: int = 0
    ) -> Done:
        """RMPADJUST at `vmpl`, from the guest page `gfn` on: what `target` may do."""
        done, fault = adjust_rights(self.core(vmpl), gfn << PAGE_SHIFT, count, target, rights, False, large)
        return Done.of([one.codes for one in done], [], fault)

    def map(self, gfn: int, pages: range, *, large: bool = False) -> None:
        """Map guest pages from `gfn` on to system pages in the nested tables, one leaf each (4 KB, or 2 MB)."""
        level = int(large)
        for number, page in enumerate(pages):
            at = gfn + number * PAGES_PER_LARGE**level
            self._put(level, at, page << PAGE_SHIFT | _RIGHTS | PTE_LARGE * large)
        self._flush()

    def unmap(self, gfn: int) -> None:
        """Remove a guest page from the nested tables."""
        self._put(0, gfn, 0)
        self._flush()

    def _flush(self) -> None:
        """What a host asks for after it has changed nested tables, by TLB_CONTROL at the next VMRUN."""
        self.machine.cores[0].tlb.flush(self.asid)

    def _put(self, level: int, gfn: int, entry: int) -> None:
        """Write the nested leaf of `gfn`; a leaf of 2 MB in the way is replaced by a table."""
        table = self._nested_table(level, gfn >> _INDEX_BITS * (level + 1))
        self._write(table, gfn >> _INDEX_BITS * level, entry)
        if not level:
            self._write(self._nested_table(1, gfn >> 2 * _INDEX_BITS), gfn >> _INDEX_BITS, table | _RIGHTS)

    def _nested_table(self, level: int, number: int) -> int:
        if (level, number) not in self._nested:
            self._nested[level, number] = self.bench.free_page() << PAGE_SHIFT
            if level < _LEVELS - 1:
                parent = self._nested_table(level + 1, number >> _INDEX_BITS)
                self._write(parent, number, self._nested[level, number] | _RIGHTS)
        return self._nested[level, number]

    def _write(self, table: int, index: int, entry: int) -> None:
        place = table + index % PAGES_PER_LARGE * PTE_SIZE
        self.bench.host.write(place, entry.to_bytes(PTE_SIZE, "little"))

    def _own_tables(self) -> int:
        """The guest's tables, in pages that it has validated: their root."""
        leaves = [_TABLE_GFN + 5 + number for number in range(SMALL_LEAVES // PAGES_PER_LARGE)]
        top, private, shared, regions, aliases = range(_TABLE_GFN, _TABLE_GFN + 5)
        for gfn in (top, private, shared, regions, aliases, *leaves):
            page = self.bench.free_page()
            self.map(gfn, range(page, page + 1))
            if not self.snp:
                continue
            new = NewState(assigned=True, asid=self.asid)
            self.bench.host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), new)
            core = self._without_paging()
            validate_pages(core, gfn << PAGE_SHIFT, 1, True, False)
            for vmpl in range(1, self.machine.product.vmpls):
                adjust_rights(core, gfn << PAGE_SHIFT, 1, vmpl, _TABLE_RIGHTS, False, False)
        number = np.arange(PAGES_PER_LARGE, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
        large = number * np.uint64(PAGES_PER_LARGE) | np.uint64(PTE_LARGE)
        self._fill(top, [private << PAGE_SHIFT, shared << PAGE_SHIFT])
        self._fill(private, [regions << PAGE_SHIFT])
        self._fill(shared, [aliases << PAGE_SHIFT])
        self._fill(aliases, large)
        self._fill(regions, [*(gfn << PAGE_SHIFT for gfn in leaves), *(large[len(leaves) :] | np.uint64(self.c_bit))])
        for index, gfn in enumerate(leaves):
            self._fill(gfn, number + np.uint64(index << PAGE_SHIFT + _INDEX_BITS) | np.uint64(self.c_bit))
        self._leaves = leaves
        return top << PAGE_SHIFT

    def _without_paging(self) -> GuestCore:
        """A core on which every address is physical and private."""
        core = self.core()
        core.registers["cr0"] = CR0_PE
        return core

    def _fill(self, table: int, entries: Sequence[int] | Words) -> None:
        """The guest writes a table of its own: `entries`, and behind them such that are not present."""
        words = np.zeros(PTES_PER_TABLE, np.uint64)
        words[: len(entries)] = np.array(entries, np.uint64) | np.uint64(_RIGHTS)
        self._without_paging().write(table << PAGE_SHIFT, words.tobytes())

    def protect(self, gfn: int, *, clear: int = 0, add: int = 0) -> None:
        """Change bits of the guest's own 4 KB leaf of `gfn`, a page below `SMALL_LEAVES`."""
        table, index = divmod(gfn, PAGES_PER_LARGE)
        place, core = (self._leaves[table] << PAGE_SHIFT) + index * PTE_SIZE, self._without_paging()
        entry = core.read(place, PTE_SIZE)
        assert isinstance(entry, bytes)
        core.write(place, (int.from_bytes(entry, "little") & ~clear | add).to_bytes(PTE_SIZE, "little"))
        core.flush_tlb()
