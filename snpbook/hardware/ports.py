"""What the host can do: the one door between host software and the silicon.

Host code holds a `HostCpu` and nothing else of the machine: reads give raw DRAM, writes are checked
against the RMP, RMPUPDATE and VMRUN are instructions, the mailbox is registers. Sources: APM2 15.36.10.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.cache import Cache
from snpbook.hardware.checks import Access, check_write
from snpbook.hardware.dram import Bytes, Pages, Words, whole
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Exit, HostPageFault, InvalidOpcode
from snpbook.hardware.instructions import Codes, NewState, rmpupdate
from snpbook.hardware.hiding import hide, owners
from snpbook.hardware.machine import Core, Machine, MemoryMap
from snpbook.hardware.vmrun import vmrun
from snpbook.spec.commands import MailboxRegister
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.products import Product
from snpbook.trace import Instruction, Trace


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
    def trace(self) -> Trace:
        return self._machine.trace

    @property
    def cores(self) -> range:
        return range(len(self._machine.cores))

    def read(self, spa: int, size: int, *, c_bit: bool = False) -> bytes:
        """Bytes as the host finds them: ciphertext in a private page, or where it is hidden a pattern.

        Reads are never checked. `c_bit` is that of the host's mapping: set, the host's own key decrypts.
        """
        data = self._machine.memory.read(_host_key(c_bit), spa, size)
        if not self._machine.hidden_asids or not size:
            return data
        pages, start = range(spa >> PAGE_SHIFT, -(-(spa + size) // PAGE_SIZE)), spa % PAGE_SIZE
        content = np.zeros((len(pages), PAGE_SIZE), np.uint8)
        content.reshape(-1)[start : start + size] = np.frombuffer(data, np.uint8)
        return self._shown(pages, content).reshape(-1)[start : start + size].tobytes()

    def write(self, spa: int, data: bytes | Bytes, *, c_bit: bool = False) -> None:
        """Store bytes, under the host's key where `c_bit` is set.

        `HostPageFault` where a page is not the hypervisor's, and then nothing is stored.
        """
        source = np.frombuffer(data, np.uint8)
        if whole("spa", spa) < 0:
            raise ValueError(f"spa = {spa}: no address")
        if source.size:
            self._check(range(spa >> PAGE_SHIFT, -(-(spa + source.size) // PAGE_SIZE)))
        self._machine.memory.write(_host_key(c_bit), spa, source)

    def write_pages(self, pages: Pages, data: Bytes) -> None:
        """Store whole pages (n, 4096), under the same check."""
        self._check(pages)
        self._machine.memory.write_pages(KeyId.UNENCRYPTED, pages, data)

    def read_pages(self, pages: Pages) -> Bytes:
        """Whole pages (n, 4096), as `read` gives them."""
        return self._shown(pages, self._machine.memory.read_pages(KeyId.UNENCRYPTED, pages))

    def _shown(self, pages: Pages, content: Bytes) -> Bytes:
        """What ciphertext hiding leaves of whole pages."""
        limit = self._machine.hidden_asids
        return hide(content, owners(self._machine.rmp, pages), limit) if limit else content

    def _check(self, pages: Pages) -> None:
        if not self._machine.snp_enabled:
            return
        found = check_write(self._machine.rmp, pages)
        if found.any():
            page = int(pages[int(np.argmax(found != Access.GRANTED))])
            state = PageState(int(self._machine.rmp.states(range(page, page + 1))[0]))
            rule = "a host write needs a page of the hypervisor"
            raise HostPageFault(page << PAGE_SHIFT, rule, PageState.HYPERVISOR.name, state.name)

    def rmpupdate(self, pages: Pages, gfns: Pages, new: NewState) -> Codes:
        """Execute RMPUPDATE for each page: return codes, one per page. `InvalidOpcode` before SNP is on."""
        if not self._machine.snp_enabled:
            raise InvalidOpcode("RMPUPDATE needs SYSCFG.SNPEn", 1, 0, "APM2 15.36.3")
        trace, rmp = self._machine.trace, self._machine.rmp
        before = rmp.peek(pages) if trace else None
        codes = rmpupdate(rmp, pages, gfns, new)
        if before is not None:
            after = rmp.peek(pages)
            trace.emit(
                Instruction(name="RMPUPDATE", actor="host", pages=pages, status=codes, before=before, after=after)
            )
        return codes

    def rmp_entry(self, page: int) -> Record:
        """The entry of a page, read from the table in memory as Linux does."""
        return self._machine.rmp.entry(page)

    def rmp_words(self, pages: Pages) -> Words:
        """Raw entries (n, 2), read from the table in memory."""
        return self._machine.rmp.load(pages)

    def rdmsr(self, msr: Msr, core: int = 0) -> int:
        return self._core(core).rdmsr(msr)

    def wrmsr(self, msr: Msr, value: int, core: int) -> None:
        self._core(core).wrmsr(msr, value)

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

    def clflush(self, spa: int, size: int, *, c_bit: bool = False) -> None:
        """CLFLUSH for each line of a range: on a part without coherence, the lines of this mapping only."""
        if isinstance(self._machine.memory, Cache):
            self._machine.memory.clflush(_host_key(c_bit), spa, size)

    def invd(self) -> int:
        """INVD: all lines are lost, dirty ones too. How many were dirty."""
        return self._machine.memory.invd() if isinstance(self._machine.memory, Cache) else 0

    def mailbox_read(self, register: MailboxRegister) -> int:
        return self._machine.mailbox.read(register)

    def mailbox_write(self, register: MailboxRegister, value: int) -> None:
        self._machine.mailbox.write(register, value)

    def mailbox_repeat(self, command: int, pages: range) -> int:
        """One command for each page of a run: how many succeeded (see `Mailbox.repeat`)."""
        return self._machine.mailbox.repeat(command, pages)

    def vmrun(self, vmcb_spa: int, executor: CoroutineExecutor, vcpu: str) -> Exit:
        """Execute VMRUN."""
        return vmrun(self._machine, vmcb_spa, executor, vcpu)


def _host_key(c_bit: bool) -> KeyId:
    """Who decides encryption for the host: the C-bit of its mapping (APM2 table 15-30)."""
    return KeyId.HOST if c_bit else KeyId.UNENCRYPTED
