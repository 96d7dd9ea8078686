"""The machine: cores, memory, the table, the encryption engine and the mailbox on one board.

This file wires the parts and knows the memory map; each part keeps its own rules. The map is the
model's choice: DRAM to 2 GiB, a hole to 4 GiB, DRAM above, the RMP at the top of the highest part that
holds it (MODEL).
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.hardware.dram import Dram, whole
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.exits import GeneralProtection
from snpbook.hardware.mailbox import Mailbox
from snpbook.hardware.rmp import Rmp, RmpRange
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.memory_map import HT_HOLE, LOW_DRAM_END, TSEG_SIZE
from snpbook.spec.msr import (
    HWCR_SMM_LOCK,
    RMP_ALIGNMENT,
    SYSCFG_MEM_ENCRYPT,
    SYSCFG_SNP_EN,
    Msr,
)
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.products import Product
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE
from snpbook.trace import Trace


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Where DRAM lies (first byte, end) and what the BIOS keeps of it."""

    dram: tuple[tuple[int, int], ...]
    tseg: tuple[int, int]
    rmp: RmpRange

    @property
    def top(self) -> int:
        return self.dram[-1][1]

    @classmethod
    def of(cls, installed: int) -> MemoryMap:
        """The map of a machine with `installed` bytes of memory, a multiple of 2 MB of at least 64 MB."""
        if whole("installed", installed) % LARGE_PAGE_SIZE or installed < 4 * TSEG_SIZE:
            raise ValueError(f"installed = {installed:#x}: a machine has a multiple of 2 MB, at least 64 MB, of memory")
        low = min(installed, LOW_DRAM_END)
        dram = [(0, low)]
        if installed > low:
            dram.append((FOUR_GIB, FOUR_GIB + installed - low))
            if dram[1][1] > HT_HOLE[0]:
                dram[1:] = [(FOUR_GIB, HT_HOLE[0]), (HT_HOLE[1], dram[1][1] + HT_HOLE[1] - HT_HOLE[0])]
        top = dram[-1][1]
        size = -(-((top >> PAGE_SHIFT) * ENTRY_SIZE + BOOKKEEPING_SIZE) // RMP_ALIGNMENT) * RMP_ALIGNMENT
        room = [(0, low - TSEG_SIZE), *dram[1:]]
        above = next(end for start, end in reversed(room) if end - start >= size)
        return cls(tuple(dram), (low - TSEG_SIZE, low), RmpRange(above - size, above - 1))


class Core:
    """One core's model-specific registers."""

    def __init__(self, number: int, rmp: RmpRange) -> None:
        self.number = number
        self._msrs = {
            Msr.SYSCFG: SYSCFG_MEM_ENCRYPT,
            Msr.HWCR: HWCR_SMM_LOCK,
            Msr.VM_HSAVE_PA: 0,
            Msr.RMP_BASE: rmp.base,
            Msr.RMP_END: rmp.end,
            Msr.SEV_STATUS: 0,
        }
        self.wbinvd_done = False
        """Whether this core wrote back its caches since the firmware last asked."""

    def __repr__(self) -> str:
        return f"Core({self.number}, SYSCFG {self._msrs[Msr.SYSCFG]:#x})"

    def rdmsr(self, msr: Msr) -> int:
        """Read a register; `GeneralProtection` for one that the host does not have."""
        if msr not in self._msrs:
            raise GeneralProtection(f"RDMSR {Msr(msr).name} on the host", "a register of the host", msr, "APM2 15.36")
        return self._msrs[msr]

    def wrmsr(self, msr: Msr, value: int) -> None:
        """Write a register; with SNP on, SYSCFG and the RMP's bounds keep what they hold.

        `GeneralProtection` for a register that the host may not write. Source: APM2 15.36.2 (SYSCFG); for RMP_BASE and
        RMP_END unconfirmed.
        """
        if not 0 <= whole("value", value) < 2**64:
            raise ValueError(f"value = {value:#x}: a register holds 64 bits")
        if msr not in self._msrs or msr is Msr.SEV_STATUS:
            raise GeneralProtection(f"WRMSR {Msr(msr).name} on the host", "a writable register", msr, "APM2 15.36")
        if self.snp_enabled and msr in (Msr.SYSCFG, Msr.RMP_BASE, Msr.RMP_END):
            return
        self._msrs[msr] = value

    @property
    def snp_enabled(self) -> bool:
        return bool(self._msrs[Msr.SYSCFG] & SYSCFG_SNP_EN)


class Machine:
    """One board of a product, as the BIOS leaves it: SNP possible, not yet on.

    `boot_entropy` seeds what silicon draws at reset (tweak constants of the encryption engine).
    """

    def __init__(
        self,
        product: Product,
        installed: int,
        *,
        boot_entropy: bytes,
        trace: Trace,
        cores: int = 8,
        mapping: bool = True,
    ) -> None:
        self.product, self.trace = product, trace
        self.map = MemoryMap.of(installed)
        self.dram = Dram(self.map.top, mapping=mapping)
        self.rmp = Rmp(self.dram, self.map.rmp)
        self.encryption = MemoryEncryption(self.dram, product.encryption, boot_entropy)
        self.cores = [Core(number, self.map.rmp) for number in range(cores)]
        self.mailbox = Mailbox()
        self.runnable: set[int] = set()
        """ASIDs that the firmware lets VMRUN use: in use, not merely allocated."""

    def __repr__(self) -> str:
        state = "on" if self.snp_enabled else "off"
        return f"Machine({self.product.name}, {self.map.top >> 30} GiB of addresses, SNP {state})"

    @property
    def snp_enabled(self) -> bool:
        """Whether every core enforces the RMP."""
        return all(core.snp_enabled for core in self.cores)

    def is_dram(self, page: int) -> bool:
        """Whether a page number lies in DRAM, not in a hole or beyond the top."""
        spa = page << PAGE_SHIFT
        return any(start <= spa and spa + PAGE_SIZE <= end for start, end in self.map.dram)
