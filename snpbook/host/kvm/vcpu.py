"""A virtual CPU: its VMCB and save area in host memory, its registers, and the page that it shares with the VMM.

Until the launch takes them the registers are KVM's to set; of a guest without SEV-ES they always are. VMCB and save
area never begin at a 2 MB boundary: hardware would check such a page as if it were large (an erratum). Sources: Linux
arch/x86/kvm/svm/svm.c, arch/x86/kvm/x86.c; RFC v7 patches 35 and 61.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from snpbook.hardware.dram import Bytes
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.host.files import Argument, Call, File
from snpbook.host.kvm import prefault, registers, run
from snpbook.host.kvm.interrupts import Interrupts
from snpbook.host.memory import PageFile, UserMemory
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import VCPU_MMAP_PAGES, Exit, Ioctl, MpState
from snpbook.spec.uapi_kvm_structs import RUN, RUN_EXIT
from snpbook.spec.vmcb import VMCB, ExitCode
from snpbook.trace import VmExit

if TYPE_CHECKING:
    from snpbook.host.kvm.ap_creation import Parked, Queued
    from snpbook.host.kvm.exchange import Exchange
    from snpbook.host.kvm.vm import Vm


class Vcpu:
    """One vCPU. `executor` stands for the code of the guest: what runs in guest mode."""

    def __init__(self, vm: Vm, number: int) -> None:
        self.vm, self.number = vm, number
        kernel = vm.kernel
        self.executor = CoroutineExecutor()
        self.shared = UserMemory(kernel.cpu, kernel.memory, VCPU_MMAP_PAGES << PAGE_SHIFT)
        """`kvm_run`, the page of port data, the ring of coalesced MMIO."""
        with ExitStack() as undo:
            undo.callback(self.shared.close)
            frames = self.shared.get(range(VCPU_MMAP_PAGES))
            self.vmcb_page = kernel.memory.allocate_small()
            undo.callback(kernel.memory.release, range(self.vmcb_page, self.vmcb_page + 1))
            self.vmsa_page = kernel.memory.allocate_small()
            undo.pop_all()
        self._run, self._data = int(frames[0]) << PAGE_SHIFT, int(frames[1]) << PAGE_SHIFT
        self.state: Record = registers.reset_state(kernel.cpu.product)
        """The registers by VMSA name, while they are KVM's."""
        self.cpuid: tuple[Record, ...] = ()
        self.mp_state = MpState.RUNNABLE if number == 0 else MpState.UNINITIALIZED
        self.encrypted = False
        """Whether the launch has taken the registers: from then on they are out of reach."""
        self.vmsa: int | None = self.vmsa_page << PAGE_SHIFT
        """The save area that VMRUN uses; None for a vCPU whose guest has destroyed it."""
        self.ghcb_registered = -1
        """The GHCB page that the guest registered, or -1."""
        self.exchange: Exchange | None = None
        """The request in its GHCB that is being served."""
        self.vmpl = 0
        self.doorbell: int | None = None
        """The guest address of its #HV doorbell page."""
        self.interrupts = Interrupts()
        self.parked: dict[int, Parked] = {}
        """What the vCPU has at the VMPLs at which it does not run."""
        self.queued: dict[int, Queued] = {}
        """By VMPL: the save area that the guest has chosen, for the next entry or the next INIT."""
        self.flushed = -1
        """Up to which change of the nested tables its translations were flushed."""
        self.completion: Any = None
        """What KVM_RUN does first with the answer of the VMM to the last exit."""
        self.unserved: KernelError | None = None
        """Why a fault of the guest could not be served, where the VMM is not told."""
        kernel.cpu.write(self.vmcb, registers.control(self))

    def __repr__(self) -> str:
        return f"Vcpu({self.number}, {self.mp_state.name})"

    @property
    def vmcb(self) -> int:
        """The VMCB's system address."""
        return self.vmcb_page << PAGE_SHIFT

    @property
    def core(self) -> int:
        """The core that it runs on (MODEL: by number; the kernel's scheduler is not modelled)."""
        cores = self.vm.kernel.cpu.cores
        return self.number % len(cores)

    def control(self) -> Record:
        """The VMCB's control area as it stands in memory."""
        return VMCB.unpack(self.vm.kernel.cpu.read(self.vmcb, PAGE_SIZE))

    def set_control(self, name: str, value: int) -> None:
        """Write one field of the control area."""
        field = VMCB.fields[name]
        self.vm.kernel.cpu.write(self.vmcb + field.offset, value.to_bytes(field.size, "little"))

    # kvm_run.

    def leave(self, reason: Exit, layout: Layout | None = None, **fields: Any) -> None:
        """Tell the VMM in `kvm_run` why KVM_RUN returns."""
        cpu = self.vm.kernel.cpu
        cpu.write(self._run + RUN.offset("exit_reason"), int(reason).to_bytes(4, "little"))
        if layout is not None:
            cpu.write(self._run + RUN_EXIT, layout.pack(**fields))

    def answer(self, layout: Layout) -> Record:
        """The exit's part of `kvm_run` as the VMM left it."""
        return layout.unpack(self.vm.kernel.cpu.read(self._run + RUN_EXIT, layout.size))

    def answered(self, earlier: Bytes) -> None:
        """A VMGEXIT has served several requests: what the shared buffer held when all but the last were done."""
        self.executor.answered(earlier)
        if self.vm.kernel.cpu.trace:
            exits = VmExit(vcpu=self.number, reason=ExitCode.VMGEXIT.name, pages=len(earlier))
            self.vm.kernel.cpu.trace.emit(exits)

    @property
    def immediate_exit(self) -> bool:
        """Whether the VMM wants KVM_RUN to return at once."""
        return self.vm.kernel.cpu.read(self._run + RUN.offset("immediate_exit"), 1) != b"\0"

    def port_data(self, size: int) -> bytes:
        """What the VMM put into the page of port data."""
        return self.vm.kernel.cpu.read(self._data, size)

    def put_port_data(self, data: bytes) -> None:
        self.vm.kernel.cpu.write(self._data, data)

    def free(self) -> None:
        """The VM ends: the save area back to the hypervisor (or it is leaked), then all pages free."""
        kernel = self.vm.kernel
        self.shared.close()
        kernel.memory.release(range(self.vmcb_page, self.vmcb_page + 1))
        page = range(self.vmsa_page, self.vmsa_page + 1)
        if self.encrypted and self.vm.snp and not kernel.ccp.make_shared_or_leak(page):
            self.vm.bug(f"the VMSA page of vCPU {self.number} cannot be made shared")
            return
        kernel.memory.release(page)


class VcpuFile(File):
    """The descriptor of a vCPU."""

    device = "kvm-vcpu"

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__()
        self.vcpu = vcpu
        vcpu.vm.hold()

    def __repr__(self) -> str:
        return f"VcpuFile({self.vcpu!r})"

    def admit(self, process: Process) -> None:
        self.vcpu.vm.admit(process)

    def calls(self) -> Mapping[int, Call]:
        absent = self.vcpu.vm.kernel.era.absent_ioctls
        return {number: call for number, call in _CALLS.items() if number not in absent}

    def unknown(self) -> int:
        return errno.EINVAL

    def mapping(self, offset: int, size: int) -> PageFile:
        """`kvm_run` and what follows it; EINVAL beyond (the SIGBUS of a touch there, told when it is mapped: MODEL)."""
        end = self.vcpu.shared.size
        check(offset + size <= end, errno.EINVAL, "the vCPU's mapping", f"{end} bytes", offset + size)
        return self.vcpu.shared

    def release(self) -> None:
        self.vcpu.vm.let_go()


def _run(file: VcpuFile, process: Process, argument: Argument) -> Any:
    return run.run(file.vcpu, argument)


_CALLS: Mapping[int, Call] = {
    Ioctl.RUN: Call("KVM_RUN", _run),
    Ioctl.GET_REGS: Call("KVM_GET_REGS", registers.get_regs),
    Ioctl.SET_REGS: Call("KVM_SET_REGS", registers.set_regs),
    Ioctl.GET_SREGS: Call("KVM_GET_SREGS", registers.get_sregs),
    Ioctl.SET_SREGS: Call("KVM_SET_SREGS", registers.set_sregs),
    Ioctl.GET_MSRS: Call("KVM_GET_MSRS", registers.get_msrs),
    Ioctl.SET_MSRS: Call("KVM_SET_MSRS", registers.set_msrs),
    Ioctl.GET_XCRS: Call("KVM_GET_XCRS", registers.get_xcrs),
    Ioctl.SET_XCRS: Call("KVM_SET_XCRS", registers.set_xcrs),
    Ioctl.GET_XSAVE: Call("KVM_GET_XSAVE", registers.get_xsave),
    Ioctl.SET_XSAVE: Call("KVM_SET_XSAVE", registers.set_xsave),
    Ioctl.GET_DEBUGREGS: Call("KVM_GET_DEBUGREGS", registers.get_debugregs),
    Ioctl.SET_DEBUGREGS: Call("KVM_SET_DEBUGREGS", registers.set_debugregs),
    Ioctl.GET_CPUID2: Call("KVM_GET_CPUID2", registers.get_cpuid2),
    Ioctl.SET_CPUID2: Call("KVM_SET_CPUID2", registers.set_cpuid2),
    Ioctl.GET_MP_STATE: Call("KVM_GET_MP_STATE", registers.get_mp_state),
    Ioctl.SET_MP_STATE: Call("KVM_SET_MP_STATE", registers.set_mp_state),
    Ioctl.PRE_FAULT_MEMORY: Call("KVM_PRE_FAULT_MEMORY", prefault.pre_fault_memory),
}
