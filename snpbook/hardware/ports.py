"""What the host can do: the one door between host software and the silicon.

Host code holds a `HostCpu` and nothing else of the machine: reads give raw DRAM, writes are checked
against the RMP, RMPUPDATE and its kin and VMRUN are instructions, the mailbox is registers. Sources: APM2 15.36.10.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.cache import Cache
from snpbook.hardware.checks import refused_write
from snpbook.hardware.dram import Bytes, Pages, Words, page_numbers, whole
from snpbook.hardware.exits import Exit, HostPageFault, InvalidOpcode
from snpbook.hardware.hiding import hide, owners
from snpbook.hardware.host_instructions import Codes, NewState, psmash, rmpread, rmpupdate
from snpbook.hardware.machine import Core, Machine, MemoryMap
from snpbook.hardware.rmp import LARGE_MASK
from snpbook.hardware.vmrun import Executor, vmrun
from snpbook.spec.commands import MailboxRegister, PspRegister
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.products import Product
from snpbook.spec.vmcb import PTES_PER_TABLE
from snpbook.trace import CachesWrittenBack, Instruction, Trace

_MAPPINGS = (PAGE_SIZE, LARGE_PAGE_SIZE, LARGE_PAGE_SIZE * PTES_PER_TABLE)


class HostCpu:
    """A host CPU in 64-bit mode at CPL 0, and through it the devices that its software drives."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __repr__(self) -> str:
        return f"HostCpu({self._machine!r})"

    @property
    def product(self) -> Product:
        """What CPUID tells of the chip."""
        return self._machine.product

    @property
    def memory_map(self) -> MemoryMap:
        """What the BIOS tells of memory."""
        return self._machine.map

    @property
    def iommu_features(self) -> int | None:
        """The IOMMU's extended feature register; None where ACPI has no table (IVRS) that tells of an IOMMU."""
        return self._machine.iommu.features

    @property
    def trace(self) -> Trace:
        return self._machine.trace

    @property
    def cores(self) -> range:
        return range(len(self._machine.cores))

    def read(self, spa: int, size: int, *, c_bit: bool = False) -> bytes:
        """Bytes as the host finds them: ciphertext in a private page, or where it is hidden a pattern.

        Reads are never checked. `c_bit` is that of the host's mapping: set, the host's own key decrypts.
        """
        return _shown_bytes(self._machine, spa, self._machine.memory.read(_host_key(c_bit), spa, size))

    def write(self, spa: int, data: bytes | Bytes, *, c_bit: bool = False, mapping: int = PAGE_SIZE) -> None:
        """Store bytes, under the host's key where `c_bit` is set, through pages of `mapping` bytes (4 KB, 2 MB, 1 GB).

        `HostPageFault` where a page is not the hypervisor's, and then nothing is stored. In a larger mapping than 4 KB
        each page of the same 2 MB counts (APM2 15.36.10).
        """
        _check_mapping(mapping)
        source = np.frombuffer(data, np.uint8)
        if whole("spa", spa) < 0:
            raise ValueError(f"spa = {spa}: no address")
        if source.size:
            self._check(range(spa >> PAGE_SHIFT, -(-(spa + source.size) // PAGE_SIZE)), large=mapping > PAGE_SIZE)
        self._machine.memory.write(_host_key(c_bit), spa, source)

    def write_pages(self, pages: Pages, data: Bytes) -> None:
        """Store whole pages (n, 4096), under the same check."""
        self._check(pages)
        self._machine.memory.write_pages(KeyId.UNENCRYPTED, pages, data)

    def zero_pages(self, pages: Pages) -> None:
        """Store zeros in whole pages, under the same check."""
        self._check(pages)
        self._machine.memory.zero_pages(pages)

    def zero(self, spa: int, size: int) -> None:
        """Store zeros in a range of whole pages, under the same check; they do not go through the cache (MODEL)."""
        self._check(range(spa >> PAGE_SHIFT, (spa + size) >> PAGE_SHIFT))
        self._machine.dram.zero(spa, size)

    def read_pages(self, pages: Pages) -> Bytes:
        """Whole pages (n, 4096), as `read` gives them."""
        return _shown(self._machine, pages, self._machine.memory.read_pages(KeyId.UNENCRYPTED, pages))

    def _check(self, pages: Pages, *, large: bool = False) -> None:
        if not self._machine.snp_enabled:
            return
        heads = set(np.unique(page_numbers(pages) & ~LARGE_MASK).tolist()) if large else set()
        busy = sorted(heads & self._machine.in_use)
        if busy:  # an erratum: what is in use there refuses the whole mapping (Linux arch/x86/kvm/svm)
            rule = "the first page of a 2 MB mapping is no VMCB or VMSA in use"
            raise HostPageFault(busy[0] << PAGE_SHIFT, rule, "idle", "in use")
        refused = refused_write(self._machine.rmp, pages, large=large)
        if refused:
            page, owned = refused
            rule = "a host write needs a page of the hypervisor" + ", with all of its 2 MB" * large
            state = self._machine.rmp.state(owned)
            raise HostPageFault(page << PAGE_SHIFT, rule, PageState.HYPERVISOR.name, state.name)

    def rmpupdate(self, pages: Pages, gfns: Pages, new: NewState) -> Codes:
        """Execute RMPUPDATE for each page: return codes, one per page. `InvalidOpcode` as from `require`."""
        before = self._begin("RMPUPDATE", pages)
        codes = rmpupdate(self._machine.rmp, pages, gfns, new, self._machine.in_use)
        self._end("RMPUPDATE", pages, codes, before)
        return codes

    def psmash(self, pages: Pages) -> Codes:
        """Execute PSMASH for each 2 MB page, by its first page: return codes, one per page."""
        before = self._begin("PSMASH", pages)
        codes = psmash(self._machine.rmp, pages, self._machine.in_use)
        self._end("PSMASH", pages, codes, before)
        return codes

    def rmpread(self, pages: Pages) -> tuple[Codes, Bytes]:
        """Execute RMPREAD for each page: return codes, and what it would store, (n, 16) bytes of `RMPUPDATE_STATE`."""
        before = self._begin("RMPREAD", pages)
        codes, state = rmpread(self._machine.rmp, pages)
        self._end("RMPREAD", pages, codes, before)
        return codes, state

    def require(self, name: str) -> None:
        """`InvalidOpcode` where an RMP instruction does not exist: the processor lacks it, or SNP is off."""
        if name not in self.product.instructions:
            raise InvalidOpcode(f"{name} needs a processor that has it", name, self.product.name, "APM2 15.34.1")
        if not self._machine.snp_enabled:
            raise InvalidOpcode(f"{name} needs SYSCFG.SNPEn", 1, 0, "APM2 15.36.3")

    def _begin(self, name: str, pages: Pages) -> Words | None:
        """The entries before an RMP instruction, where somebody wants to know."""
        self.require(name)
        return self._machine.rmp.peek(pages) if self.trace else None

    def _end(self, name: str, pages: Pages, codes: Codes, before: Words | None) -> None:
        if before is not None:
            after = self._machine.rmp.peek(pages)
            self.trace.emit(Instruction(name=name, actor="host", pages=pages, status=codes, before=before, after=after))

    def rmp_entry(self, page: int) -> Record:
        """The entry of a page, read from the table in memory as Linux does."""
        return self._machine.rmp.entry(page)

    def rmp_words(self, pages: Pages) -> Words:
        """Raw entries (n, 2), read from the table in memory."""
        return self._machine.rmp.load(pages)

    def rdmsr(self, msr: Msr, core: int = 0) -> int:
        return self._core(core).rdmsr(whole("msr", msr))

    def wrmsr(self, msr: Msr, value: int, core: int) -> None:
        self._core(core).wrmsr(whole("msr", msr), value)

    def _core(self, number: int) -> Core:
        if whole("core", number) not in self.cores:
            raise ValueError(f"core = {number}: the machine has cores 0 to {len(self.cores) - 1}")
        return self._machine.cores[number]

    def wbinvd(self) -> None:
        """Write back and invalidate the caches of every core."""
        for core in self._machine.cores:
            core.wbinvd_done = True
        if isinstance(self._machine.memory, Cache):
            self._machine.memory.wbinvd()
        if self.trace:
            self.trace.emit(CachesWrittenBack(cores=len(self._machine.cores)))

    def clflush(self, spa: int, size: int, *, c_bit: bool = False) -> None:
        """CLFLUSH for each line of a range: on a part without coherence, the lines of this mapping only."""
        spa, size = whole("spa", spa), whole("size", size)
        if not 0 <= spa <= spa + size <= self._machine.dram.size:
            raise ValueError(f"spa = {spa:#x}, size = {size:#x}: outside DRAM of {self._machine.dram.size:#x} bytes")
        if isinstance(self._machine.memory, Cache):
            self._machine.memory.clflush(_host_key(c_bit), spa, size)

    def invd(self) -> int:
        """INVD: all lines are lost, dirty ones too. How many were dirty."""
        return self._machine.memory.invd() if isinstance(self._machine.memory, Cache) else 0

    def mailbox_read(self, register: MailboxRegister | PspRegister) -> int:
        return self._machine.mailbox.read(register)

    def mailbox_write(self, register: MailboxRegister | PspRegister, value: int) -> None:
        self._machine.mailbox.write(register, value)

    @property
    def mailbox_interrupt(self) -> bool:
        """Whether the secure processor's interrupt is raised (see `Mailbox.interrupt`)."""
        return self._machine.mailbox.interrupt

    def mailbox_repeat(self, command: int, pages: range) -> int:
        """One command for each page of a run: how many succeeded (see `Mailbox.repeat`)."""
        return self._machine.mailbox.repeat(command, pages)

    def vmrun(self, vmcb_spa: int, executor: Executor, vcpu: str, core: int = 0) -> Exit:
        """Execute VMRUN on a core, which it wakes."""
        return vmrun(self._machine, vmcb_spa, executor, vcpu, core)

    def registers(self, core: int = 0) -> dict[str, int]:
        """A core's registers that VMRUN and #VMEXIT do not swap for every guest, to read and to set.

        After the exit of a guest without SEV-ES they are the guest's; breakpoints are so without DebugVirtualization.
        """
        return self._core(core).registers

    def hlt(self, core: int) -> None:
        """Let a core's host thread sleep, until VMRUN runs something on it."""
        self._core(core).idle = True


class Device:
    """A device that reads and writes memory by system addresses; one with the C-bit names the host's key (MODEL)."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __repr__(self) -> str:
        return f"Device({self._machine!r})"

    def dma_read(self, spa: int, size: int) -> bytes:
        """Bytes as they are in memory: ciphertext in a private page, or where it is hidden a pattern."""
        memory, (key_id, spa) = self._machine.memory, self._target(spa)
        data = memory.dma_read(key_id, spa, size) if isinstance(memory, Cache) else memory.read(key_id, spa, size)
        return _shown_bytes(self._machine, spa, data)

    def dma_write(self, spa: int, data: bytes, *, mapping: int = PAGE_SIZE) -> None:
        """Store bytes, by an IOMMU mapping of pages of `mapping` bytes. `DmaBlocked` as the IOMMU has it."""
        _check_mapping(mapping)
        memory, (key_id, spa) = self._machine.memory, self._target(spa)
        self._machine.iommu.check_write(self._machine.rmp, spa, len(data), mapping)
        if isinstance(memory, Cache):
            memory.dma_write(key_id, spa, data)
        else:
            memory.write(key_id, spa, data)

    def _target(self, spa: int) -> tuple[KeyId, int]:
        """The key id and the address without C-bit."""
        if whole("spa", spa) < 0:
            raise ValueError(f"spa = {spa}: no address")
        c_bit = 1 << self._machine.product.c_bit
        return _host_key(bool(spa & c_bit)), spa & ~c_bit


def _shown(machine: Machine, pages: Pages, content: Bytes) -> Bytes:
    """What ciphertext hiding leaves of whole pages."""
    limit = machine.hidden_asids
    return hide(content, owners(machine.rmp, pages), limit) if limit else content


def _shown_bytes(machine: Machine, spa: int, data: bytes) -> bytes:
    """What ciphertext hiding leaves of a range of bytes."""
    if not machine.hidden_asids or not data:
        return data
    pages, start = range(spa >> PAGE_SHIFT, -(-(spa + len(data)) // PAGE_SIZE)), spa % PAGE_SIZE
    content = np.zeros((len(pages), PAGE_SIZE), np.uint8)
    content.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return _shown(machine, pages, content).reshape(-1)[start : start + len(data)].tobytes()


def _check_mapping(size: int) -> None:
    if whole("mapping", size) not in _MAPPINGS:
        raise ValueError(f"mapping = {size:#x}: pages of 4 KB, 2 MB or 1 GB ({', '.join(map(hex, _MAPPINGS))})")


def _host_key(c_bit: bool) -> KeyId:
    """Who decides encryption for the host: the C-bit of its mapping (APM2 table 15-30)."""
    return KeyId.HOST if c_bit else KeyId.UNENCRYPTED
