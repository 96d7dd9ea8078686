"""The machine: cores, memory, the table, the encryption engine and the mailbox on one board.

This file wires the parts and knows the memory map; each part keeps its own rules. The map is the
model's choice: DRAM to 2 GiB, a hole to 4 GiB, DRAM above, the RMP at the top of the highest part that
holds it (MODEL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from snpbook.hardware.bios import SNP_READY, BiosSetup
from snpbook.hardware.cache import Cache
from snpbook.hardware.checks import check_write
from snpbook.hardware.dram import Dram, whole
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.iommu import Iommu
from snpbook.hardware.mailbox import Mailbox
from snpbook.hardware.memory import Memory
from snpbook.hardware.msr import Msrs, bios_settings
from snpbook.hardware.random_source import RandomSource
from snpbook.hardware.rmp import Rmp
from snpbook.hardware.rmp_range import NO_TABLE, RmpRange, RmpSegments
from snpbook.hardware.tlb import Tlb
from snpbook.spec.asids import CORES_PER_CCX
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.memory_map import HT_HOLE, LOW_DRAM_END, TSEG_SIZE
from snpbook.spec.msr import RMP_ALIGNMENT, RMP_CFG, Msr
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.products import Product
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE, RMP_SEGMENTS
from snpbook.spec.vmsa import DEBUG_REGISTERS, UNSAVED_REGISTERS
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
    def of(cls, installed: int, setup: BiosSetup = SNP_READY) -> MemoryMap:
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
        tseg = (low - TSEG_SIZE, low)
        if setup.snp_coverage == 0:
            return cls(tuple(dram), tseg, NO_TABLE)
        covered = top if setup.snp_coverage is None else min(setup.snp_coverage, top)
        size = -(-((covered >> PAGE_SHIFT) * ENTRY_SIZE + BOOKKEEPING_SIZE) // RMP_ALIGNMENT) * RMP_ALIGNMENT
        room = [(0, low - TSEG_SIZE), *dram[1:]]
        base = setup.rmp_base
        if base is None:
            base = next(end for start, end in reversed(room) if end - start >= size) - size
        elif not any(start <= base and base + size <= end for start, end in room):
            raise ValueError(f"rmp_base = {base:#x}: the table of {size:#x} bytes lies in memory that is nobody's")
        return cls(tuple(dram), tseg, RmpRange(base, base + size - 1))


class Core(Msrs):
    """One core: its registers, and whether it wrote back its caches since the firmware last asked.

    Cores 2n and 2n + 1 are the two threads of one physical core (MODEL).
    """

    def __init__(self, machine: Machine, number: int, socket: int) -> None:
        memory = machine.map
        bios = bios_settings(machine.product, memory.dram[0][1], memory.top, memory.tseg, memory.rmp, machine.setup)
        super().__init__(
            machine.product, bios, hypervisor_owns=machine.hypervisor_owns, flush_guest_page=machine.flush_guest_page
        )
        self.machine, self.number, self.socket = machine, number, socket
        self.wbinvd_done = False
        self.long_mode = True
        """Whether its host runs in 64-bit mode."""
        self.idle = False
        """Whether its host has halted it."""
        self.registers = dict.fromkeys([*UNSAVED_REGISTERS, *DEBUG_REGISTERS], 0)
        """Registers that VMRUN does not swap for every guest: what one leaves there, the next and the host find."""
        self.tlb = Tlb(number)

    def __repr__(self) -> str:
        return f"Core({self.number}, SYSCFG {self.rdmsr(Msr.SYSCFG):#x})"

    @property
    def ccx(self) -> int:
        """Its core complex: the cores that share a cache, and an ASID's state."""
        return self.number // CORES_PER_CCX

    def wrmsr(self, msr: int, value: int) -> None:
        """Write a register as `Msrs` has it; the machine's table is where the first core to set SNPEn has it."""
        super().wrmsr(msr, value)
        if self.snp_enabled and not self.machine.rmp_located:
            self.machine.locate_rmp(self)


class Machine:
    """One board of a product, as the BIOS leaves it: SNP possible, not yet on.

    `cores` are those of all `sockets` together. `boot_entropy` seeds what silicon draws at reset (tweak constants of
    the encryption engine). `cache` puts a write-back cache in front of memory; without it memory is always coherent.
    `tsme` is the BIOS option that encrypts all of memory with the host's key; the table itself stays in the clear
    (MODEL). `bios` are the options of its set-up menu.
    """

    def __init__(
        self,
        product: Product,
        installed: int,
        *,
        boot_entropy: bytes,
        trace: Trace,
        cores: int = 8,
        sockets: int = 1,
        mapping: bool = True,
        cache: bool = False,
        tsme: bool = False,
        bios: BiosSetup = SNP_READY,
    ) -> None:
        if whole("cores", cores) < 1 or whole("sockets", sockets) < 1 or cores % sockets:
            raise ValueError(f"cores = {cores}, sockets = {sockets}: as many cores on each socket, at least one")
        if bios.min_sev_asid is not None:
            product = replace(product, min_sev_asid=bios.min_sev_asid)
        self.product, self.trace, self.sockets, self.tsme, self.setup = product, trace, sockets, tsme, bios
        self.map = MemoryMap.of(installed, bios)
        if self.map.top > 1 << product.encrypted_physical_bits:
            reach = f"{product.encrypted_physical_bits} bits of physical address with encryption on"
            raise ValueError(f"installed = {installed:#x}: {product.title} has {reach}")
        self.dram = Dram(self.map.top, mapping=mapping)
        self.rmp = Rmp(self.dram, self.map.rmp)
        self.rmp_located = False
        """Whether SNPEn has fixed where the table lies."""
        self.encryption = MemoryEncryption(self.dram, product.encryption, boot_entropy, tsme=tsme)
        self.memory: Memory = self.encryption
        """What cores, page walks, devices and the secure processor access."""
        if cache:
            self.memory = Cache(self.encryption, coherent=product.coherent)
        self.cores = [Core(self, number, number * sockets // cores) for number in range(cores)]
        self.iommu = Iommu(present=bios.iommu, snp=bios.nbio_snp)
        self.mailbox = Mailbox()
        self.runnable: dict[int, frozenset[int]] = {}
        """ASIDs that the firmware lets VMRUN use (in use, not merely allocated), each on some core complexes."""
        self.tsc = 0
        """The time-stamp counter, the same on all cores: it advances with what guests do, in steps of the model."""
        self.random = RandomSource(boot_entropy)
        self.vmsa_checksums: dict[int, int] = {}
        """Of SEV-ES guests, by VMSA page: kept where no software reaches (see `save_area`)."""
        self.hidden_asids = 0
        """Ciphertext hiding: guests with ASIDs from 1 to this one; 0 where it is off."""
        self.in_use: set[int] = set()
        """Pages of running vCPUs' VMCBs, VMSAs and AVIC backing: RMP entries that nobody may change (APM2 15.36.12)."""

    def __repr__(self) -> str:
        state = "on" if self.snp_enabled else "off"
        return f"Machine({self.product.name}, {self.map.top >> 30} GiB of addresses, SNP {state})"

    @property
    def snp_enabled(self) -> bool:
        """Whether every core enforces the RMP."""
        return all(core.snp_enabled for core in self.cores)

    def sibling(self, core: Core) -> Core | None:
        """The other thread of a core's physical core; None for the last of an odd number."""
        number = core.number ^ 1
        return self.cores[number] if number < len(self.cores) else None

    def hypervisor_owns(self, spa: int) -> bool:
        """Whether the RMP lets the host write the page at `spa`."""
        page = spa >> PAGE_SHIFT
        return not check_write(self.rmp, range(page, page + 1)).any()

    def locate_rmp(self, core: Core) -> None:
        """Take the table's place from a core's registers. A place that is none leaves every page uncovered (MODEL)."""
        base, end = core.rdmsr(Msr.RMP_BASE), core.rdmsr(Msr.RMP_END)
        where: RmpRange | RmpSegments = RmpRange(base, end)
        if SevCapability.SEGMENTED_RMP in self.product.capabilities:
            config = RMP_CFG.unpack(core.rdmsr(Msr.RMP_CFG).to_bytes(RMP_CFG.size, "little"))
            bounds = self.product.rmp_segments
            assert bounds is not None
            if config.seg_rmp_en:
                possible = bounds.min_segment_size <= config.seg_size <= bounds.max_segment_size
                most = bounds.cached_segments if bounds.cached_only else RMP_SEGMENTS
                where = RmpSegments.read(self.dram, base, config.seg_size, most) if possible else NO_TABLE
        if where != self.rmp.where:
            changes = self.rmp.changes + 1
            self.rmp = Rmp(self.dram, where if where.fits(self.dram.size) else NO_TABLE)
            self.rmp.changes = changes  # another table is a change of every entry
        self.rmp_located = True

    def flush_guest_page(self, address: int, asid: int) -> bool:
        """VMPAGE_FLUSH of one page; host virtual addresses are physical ones here (MODEL)."""
        page = address >> PAGE_SHIFT
        if self.is_dram(page) and isinstance(self.memory, Cache) and self.encryption.has_key(asid):
            self.memory.vmpage_flush(asid, page)
        return self.is_dram(page)

    def is_dram(self, page: int) -> bool:
        """Whether a page number lies in DRAM, not in a hole or beyond the top."""
        spa = page << PAGE_SHIFT
        return any(start <= spa and spa + PAGE_SIZE <= end for start, end in self.map.dram)
