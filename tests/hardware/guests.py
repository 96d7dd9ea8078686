"""A machine with SNP on and one guest, put together by hand: tables, entries and keys as a test wants them."""

from typing import Any

import numpy as np

from snpbook.hardware.core import GuestCore
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Exit
from snpbook.hardware.guest_cpu import Program
from snpbook.hardware.host_instructions import NewState, rmpupdate
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.vmrun import vmrun
from snpbook.spec.msr import Msr
from snpbook.spec.products import product
from snpbook.spec.vmcb import VMCB, intercept_bits
from snpbook.spec.vmsa import VMSA
from snpbook.trace import Counts, Recorder, Trace

PAGE = 4096
ASID = 5
NESTED, VMCB_PAGE, VMSA_PAGE = 0x2800, 0x10, 0x11
"""First page for nested tables, and where the VMCB and the VMSA lie."""
RIGHTS = 7
ALL_ON = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25
LONG_MODE = {"cr0": 0x80000011, "cr4": 0x20, "efer": 0x1500}


class Bench:
    """64 MB of memory without a firmware: every page is the hypervisor's until `assign`."""

    def __init__(self, name: str = "milan", *, mapping: bool = True, snp: bool = True) -> None:
        self.log, self.counts, trace = Recorder(), Counts(), Trace()
        trace.subscribe(self.log)
        trace.subscribe(self.counts)
        self.machine = Machine(product(name), 64 << 20, boot_entropy=bytes(32), trace=trace, cores=2, mapping=mapping)
        self.cpu, self.executor = HostCpu(self.machine), CoroutineExecutor()
        if snp:
            for core in self.machine.cores:
                core.wrmsr(Msr.SYSCFG, ALL_ON)
        self.machine.encryption.install(ASID, bytes(range(self.machine.product.memory_key_size)))
        self.machine.runnable[ASID] = frozenset({0})
        self._tables: dict[tuple[int, int], int] = {}
        self.nested_root = self._table(3, 0)
        self.vmcb: dict[str, Any] = {
            "nested_paging": 1, "sev": 1, "sev_es": 1, "asid": ASID, "nested_cr3": self.nested_root,
            "lbr_virtualization": 1, "intercepts": intercept_bits(0x78, 0x7F, 0x80),
        }  # fmt: skip
        self.vmcb["vmsa_pa"] = VMSA_PAGE * PAGE
        self.set_vmcb()
        self.assign(VMSA_PAGE, 0xFFFFFFFFF, vmsa=1)
        self.set_vmsa()

    # The host's side.

    def set_vmcb(self, **fields: Any) -> None:
        self.machine.dram.write(VMCB_PAGE * PAGE, VMCB.pack(**{**self.vmcb, **fields}))

    def read_vmcb(self) -> Any:
        return VMCB.unpack(self.machine.dram.read(VMCB_PAGE * PAGE, PAGE))

    def _table(self, level: int, number: int) -> int:
        if (level, number) not in self._tables:
            self._tables[level, number] = (NESTED + len(self._tables)) * PAGE
            if level < 3:
                self.put(self._table(level + 1, number >> 9) + 8 * (number & 511), self._tables[level, number] | RIGHTS)
        return self._tables[level, number]

    @property
    def table_pages(self) -> list[int]:
        """The system pages of the nested tables."""
        return [address // PAGE for address in self._tables.values()]

    def put(self, spa: int, word: int) -> None:
        self.machine.dram.write(spa, word.to_bytes(8, "little"))

    def map(self, gfn: int, page: int, flags: int = RIGHTS, *, level: int = 0) -> None:
        """A nested leaf of 4 KB, 2 MB (level 1) or 1 GB (level 2)."""
        self.put(self.leaf(gfn, level), page * PAGE | flags | 0x80 * bool(level))

    def leaf(self, gfn: int, level: int = 0) -> int:
        """The address of a guest page's nested leaf."""
        return self._table(level, gfn >> 9 * (level + 1)) + 8 * (gfn >> 9 * level & 511)

    def assign(
        self, page: int, gfn: int, *, asid: int = ASID, vmpl: int = 0x0F, large: bool = False, **bits: int
    ) -> None:
        """Make a page the guest's, validated unless told otherwise: RMPUPDATE, and the rest written into the entry."""
        rmp, pages = self.machine.rmp, range(page, page + 1)
        codes = rmpupdate(rmp, pages, range(gfn, gfn + 1), NewState(assigned=True, asid=asid, large=large))
        assert not codes.any(), codes
        low = int(rmp.load(pages)[0, 0]) & ~(1 << 61 | 1 << 62)
        low |= bits.get("immutable", 0) << 2 | bits.get("vmsa", 0) << 61 | bits.get("validated", 1) << 62
        rmp.store(pages, np.array([[low, vmpl]], np.uint64))

    def give(self, gfn: int, page: int, **bits: Any) -> None:
        """A private page of the guest, mapped and assigned."""
        self.map(gfn, page)
        self.assign(page, gfn, **bits)

    # The guest's side.

    def set_vmsa(self, **registers: int) -> None:
        registers = {"sev_features": 1, "cr0": 0x10, "efer": 0x1000, "rip": 0xFFF0, **registers}
        self.machine.encryption.write(ASID, VMSA_PAGE * PAGE, VMSA.pack(**registers))

    def read_vmsa(self) -> Any:
        return VMSA.unpack(self.machine.encryption.read(ASID, VMSA_PAGE * PAGE, PAGE))

    def core(self, control: dict[str, Any] | None = None, /, **registers: int) -> GuestCore:
        """A core that has entered the guest; `control` are fields of its VMCB."""
        self.set_vmsa(**registers)
        if control:
            self.set_vmcb(**control)
        return GuestCore(self.machine, self.read_vmcb(), dict(self.read_vmsa()), "vcpu0")

    def plain(self, page: int) -> bytes:
        """What the guest sees in a private page."""
        return self.machine.encryption.read(ASID, page * PAGE, PAGE)

    def start(self, program: Program) -> None:
        self.executor.start(program)

    def run(self) -> Exit:
        return vmrun(self.machine, VMCB_PAGE * PAGE, self.executor, "vcpu0")
