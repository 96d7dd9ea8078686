"""The host kernel: from what the BIOS left to a machine on which SNP is enforced.

Order and messages are Linux's (arch/x86/kernel/cpu/amd.c, arch/x86/virt/svm/sev.c); each failing step
leaves SNP off and says why. Everything is done through one `HostCpu`.
"""

from __future__ import annotations

import errno

from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp import Ccp
from snpbook.host.kvm import Kvm
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import printk
from snpbook.spec.msr import RMP_ADDRESS_MASK, SYSCFG_MEM_ENCRYPT, SYSCFG_MFDM, SYSCFG_SNP_EN, SYSCFG_VMPL_EN, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE

ERAS = ("rfc-v7",)
"""The kernels that the host can be; `mainline` and `svsm-host` are not modelled yet (LIMITATIONS.md)."""
FIRST_FREE = 0x100_0000
"""Below 16 MiB lies the kernel itself."""


class Kernel:
    """A host that runs one kernel; `ccp` and `kvm` are its drivers once `boot` has loaded them."""

    def __init__(self, cpu: HostCpu) -> None:
        self.cpu = cpu
        self.memory = PageAllocator(_free_memory(cpu))
        self.ccp = Ccp(cpu, self.memory)
        self.kvm = Kvm(cpu, self.memory, self.ccp)
        self.booted = False

    def __repr__(self) -> str:
        return f"Kernel({'booted' if self.booted else 'not booted'}, {self.memory.allocated} pages in use)"

    def boot(self, era: str = "rfc-v7") -> None:
        """Bring SNP up: the RMP probed and zeroed, SNPEn on every core, the firmware initialised.

        `KernelError` ENODEV or ENOSYS where the machine is not fit for SNP; `ValueError` for an
        unknown era.
        """
        if era not in ERAS:
            raise ValueError(f"era {era!r} is not modelled: one of {', '.join(ERAS)}")
        if self.booted:
            raise KernelError(errno.EBUSY, "the host boots once", "not booted", "booted")
        self._probe_rmp()
        self._enable_snp()
        self.ccp.initialise()
        status = self.ccp.platform_status()
        printk(self.cpu, f"ccp: SEV-SNP API:{status.api_major}.{status.api_minor} build:{status.build}")
        self.kvm.load()
        printk(self.cpu, f"kvm_amd: SEV-SNP enabled (ASIDs 1 - {self.cpu.product.min_sev_asid - 1})")
        self.booted = True

    def _probe_rmp(self) -> None:
        cpu = self.cpu
        on = cpu.rdmsr(Msr.SYSCFG) & SYSCFG_MEM_ENCRYPT
        check(bool(on), errno.ENODEV, "SYSCFG.MemEncryptionModEn, a BIOS setting", 1, 0)
        base, end = cpu.rdmsr(Msr.RMP_BASE) & RMP_ADDRESS_MASK, cpu.rdmsr(Msr.RMP_END)
        rule = "Memory for the RMP table has not been reserved by BIOS"
        check(0 < base <= end, errno.ENODEV, rule, "RMP_BASE and RMP_END", base)
        size, need = end + 1 - base, (cpu.memory_map.top >> PAGE_SHIFT) * ENTRY_SIZE + BOOKKEEPING_SIZE
        rule = "Memory reserved for the RMP table does not cover full system RAM"
        check(need <= size, errno.ENOSYS, rule, need, size)
        printk(self.cpu, f"SEV-SNP: RMP table physical range [{base:#018x} - {end:#018x}]")

    def _enable_snp(self) -> None:
        cpu = self.cpu
        cpu.wbinvd()
        for bits in (SYSCFG_MFDM, SYSCFG_SNP_EN | SYSCFG_VMPL_EN):
            for core in cpu.cores:
                cpu.wrmsr(Msr.SYSCFG, cpu.rdmsr(Msr.SYSCFG, core) | bits, core)


def _free_memory(cpu: HostCpu) -> list[range]:
    """Page frames that the kernel may give out: DRAM without its own image, TSEG and the RMP."""
    memory = cpu.memory_map
    taken = sorted([(0, FIRST_FREE), memory.tseg, (memory.rmp.base, memory.rmp.end + 1)])
    free = []
    for start, end in memory.dram:
        for first, stop in taken:
            if start < stop and first < end:
                if start < first:
                    free.append((start, first))
                start = max(start, stop)
        if start < end:
            free.append((start, end))
    return [range(-(-start // PAGE_SIZE), end // PAGE_SIZE) for start, end in free]
