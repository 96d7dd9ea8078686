"""KVM: virtual machines on restricted memslots, as the v7 series has them.

A memslot has ordinary memory for shared pages and a restricted file for private ones; a page's
attribute says which of them the guest gets. Private pages are assigned in the RMP when the attribute is
set or at launch, and are pinned by being allocated. Sources: RFC v7 of the SNP series, UPM v10.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from snpbook.hardware.dram import page_numbers
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.ports import HostCpu
from snpbook.host.asids import AsidPool
from snpbook.host.attributes import Flags, PrivatePages
from snpbook.host.ccp import Ccp
from snpbook.host.memory import PageAllocator, RestrictedFile, UserMemory, runs
from snpbook.host.npt import GFN_LIMIT, NestedTables
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, is_assigned, make_shared, printk, rmpupdate
from snpbook.spec.kvm import KvmExit, MemoryAttribute, SevCommand
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.vmcb import VMCB, ExitCode, intercept_bits
from snpbook.spec.vmsa import INITIAL_VMSA_GPA
from snpbook.trace import Ioctl

INTERCEPTS = intercept_bits(
    ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT, ExitCode.RDPMC, ExitCode.CPUID, ExitCode.INVD,
    ExitCode.HLT, ExitCode.IOIO, ExitCode.SHUTDOWN, ExitCode.VMRUN, ExitCode.VMMCALL, ExitCode.WBINVD,
    ExitCode.MONITOR, ExitCode.MWAIT, ExitCode.MC_EXCEPTION,
)  # fmt: skip
"""What KVM intercepts of an SNP guest, without MSRs (it has no permission map here) and without write traps (MODEL)."""


@dataclass(frozen=True, slots=True)
class Memslot:
    """Guest pages `gfn` .. `gfn + count - 1`, backed twice at the same offsets."""

    gfn: int
    count: int
    shared: UserMemory
    restricted: RestrictedFile

    def __contains__(self, gfn: object) -> bool:
        return isinstance(gfn, int) and self.gfn <= gfn < self.gfn + self.count


@dataclass(frozen=True, slots=True)
class RunExit:
    """What KVM_RUN returns to the VMM: the exit reason and its part of `struct kvm_run`."""

    reason: KvmExit
    detail: dict[str, int]


class Vcpu:
    """A virtual CPU: its VMCB in host memory, its registers until they are encrypted."""

    def __init__(self, vm: Vm, number: int, vmcb: int, vmsa: range) -> None:
        self.vm, self.number, self.vmcb, self.vmsa = vm, number, vmcb, vmsa
        self.registers: Record | None = None
        self.encrypted = False
        """Whether the launch has taken the registers: from then on they are out of reach."""
        self.executor = CoroutineExecutor()
        self.flushed = 0
        """Up to which change of the nested tables its translations were flushed."""
        self.ghcb_registered = -1
        """The GHCB page that the guest registered, or -1."""

    def __repr__(self) -> str:
        return f"Vcpu({self.number})"

    def set_registers(self, registers: Record) -> None:
        """KVM_SET_SREGS and its kin, in the form of the save area; EINVAL once encrypted."""
        with self.vm.ioctl("KVM_SET_SREGS", vcpu=self.number):
            check(not self.encrypted, errno.EINVAL, "registers of an encrypted vCPU are out of reach")
            self.registers = registers


class Vm:
    """One SNP guest, as KVM keeps it."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, ccp: Ccp, asids: AsidPool) -> None:
        self.cpu, self._memory, self.ccp, self._asids = cpu, memory, ccp, asids
        self.tables = NestedTables(cpu, memory)
        try:
            self.asid = asids.take()
        except KernelError:
            self.tables.free()
            raise
        self.slots: dict[int, Memslot] = {}
        self.vcpus: list[Vcpu] = []
        self.gctx: int | None = None
        self.launched = False
        self._private = PrivatePages()

    def __repr__(self) -> str:
        return f"Vm(ASID {self.asid}, {len(self.slots)} slots, {len(self.vcpus)} vCPUs)"

    @contextmanager
    def ioctl(self, name: str, **arguments: Any) -> Iterator[None]:
        """Every system call is traced with its errno."""
        number = 0
        try:
            yield
        except KernelError as error:
            number = error.errno or errno.EIO
            raise
        finally:
            if self.cpu.trace:
                self.cpu.trace.emit(Ioctl(device="kvm", name=name, errno=number, arguments=arguments))

    # Memory.

    def set_memory_region(self, number: int, gfn: int, shared: UserMemory, restricted: RestrictedFile) -> None:
        """KVM_SET_USER_MEMORY_REGION with KVM_MEM_PRIVATE: a new slot."""
        count = shared.size >> PAGE_SHIFT
        with self.ioctl("KVM_SET_USER_MEMORY_REGION", slot=number, gfn=gfn, pages=count):
            check(
                restricted.size >= shared.size, errno.EINVAL, "the file covers the slot", shared.size, restricted.size
            )
            check(number not in self.slots, errno.EINVAL, "a private slot does not change", "a new slot", number)
            check(gfn + count <= GFN_LIMIT, errno.EINVAL, "the slot is in the guest's address space", GFN_LIMIT, gfn)
            clash = [n for n, s in self.slots.items() if s.gfn < gfn + count and gfn < s.gfn + s.count]
            check(not clash, errno.EEXIST, "slots do not overlap", [], clash)
            self.slots[number] = Memslot(gfn, count, shared, restricted)

    def slot_of(self, gfn: int) -> Memslot | None:
        """The slot that holds a guest page."""
        return next((slot for slot in self.slots.values() if gfn in slot), None)

    def is_private(self, gfns: range) -> Flags:
        """The private attribute of a run of guest pages."""
        return self._private.of(gfns)

    def set_memory_attributes(self, gpa: int, size: int, attributes: MemoryAttribute) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: shared or private; private pages are assigned in the RMP at once.

        A refused RMPUPDATE and a lack of memory are only logged, as in v7: the call still succeeds.
        """
        with self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", gpa=gpa, size=size, attributes=int(attributes)):
            check(not attributes & ~MemoryAttribute.PRIVATE, errno.EINVAL, "attributes", "PRIVATE", attributes)
            aligned = size > 0 and gpa % PAGE_SIZE == 0 and size % PAGE_SIZE == 0
            check(aligned, errno.EINVAL, "gpa and size", "whole pages", f"{gpa:#x}+{size:#x}")
            gfns = range(gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT)
            self.tables.zap(gfns.start, len(gfns))
            self._private.mark(gfns, bool(attributes))
            for slot in self.slots.values():
                part = range(max(gfns.start, slot.gfn), min(gfns.stop, slot.gfn + slot.count))
                if len(part):
                    self._update_attributes(slot, part, bool(attributes))

    def _update_attributes(self, slot: Memslot, gfns: range, private: bool) -> None:
        """The SNP hook of v7: pages of the restricted file become the guest's, or the hypervisor's."""
        frames = slot.restricted.get_prefix(range(gfns.start - slot.gfn, gfns.stop - slot.gfn))
        if len(frames) < len(gfns):
            printk(self.cpu, f"kvm: no memory for private pages from gfn {gfns.start + len(frames):#x}")
        try:
            if private:
                rmpupdate(self.cpu, as_pages(frames), gfns[: len(frames)], NewState(assigned=True, asid=self.asid))
            else:
                make_shared(self.cpu, frames)
        except KernelError as error:
            printk(self.cpu, f"kvm: failed to update memory attributes: {error}")

    # Launch.

    def create_vcpu(self, number: int) -> Vcpu:
        """KVM_CREATE_VCPU."""
        with self.ioctl("KVM_CREATE_VCPU", vcpu=number):
            known = [vcpu.number for vcpu in self.vcpus]
            check(number not in known, errno.EEXIST, "a vCPU is created once", "a new number", number)
            pages = self._memory.allocate(2)
            vmcb, vmsa = pages[0] << PAGE_SHIFT, pages[1:]
            control = VMCB.pack(
                intercepts=INTERCEPTS,
                asid=self.asid,
                nested_paging=1,
                sev=1,
                sev_es=1,
                lbr_virtualization=1,
                nested_cr3=self.tables.root,
                vmsa_pa=vmsa[0] << PAGE_SHIFT,
            )
            self.cpu.write(vmcb, control)
            vcpu = Vcpu(self, number, vmcb, vmsa)
            self.vcpus.append(vcpu)
            return vcpu

    def snp_launch_start(self, policy: int, gosvw: bytes = bytes(16)) -> None:
        """KVM_SEV_SNP_LAUNCH_START: a context, the launch, the ASID; undone where one of them fails."""
        with self.ioctl(SevCommand.SNP_LAUNCH_START.name, policy=policy):
            check(self.gctx is None, errno.EINVAL, "a guest is launched once", "no context", "a context")
            try:
                gctx = self.ccp.create_context()
            except KernelError as error:
                rule = "a guest context is created"
                raise KernelError(errno.ENOTTY, rule, "a context", str(error), "SNP", error.firmware) from error
            try:
                self.ccp.launch_start(gctx, policy, gosvw)
                self.ccp.activate(gctx, self.asid)
            except KernelError:
                self.ccp.decommission(gctx)
                raise
            self.gctx = gctx

    def snp_launch_update(self, gpa: int, size: int, kind: LaunchPage) -> None:
        """KVM_SEV_SNP_LAUNCH_UPDATE: pages copied from shared memory, assigned, measured, encrypted.

        On a failure the pages of the call go back to the hypervisor, although the digest has moved on.
        """
        with self.ioctl(SevCommand.SNP_LAUNCH_UPDATE.name, gpa=gpa, size=size, type=kind.name):
            check(self.gctx is not None, errno.EINVAL, "the launch has started", "a context", "none")
            assert self.gctx is not None
            whole = size >= 0 and gpa % PAGE_SIZE == 0 and size % PAGE_SIZE == 0
            check(whole, errno.EINVAL, "gpa and size", "whole pages", f"{gpa:#x}+{size:#x}")
            gfns = range(gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT)
            if not gfns:
                return
            slot = self.slot_of(gfns.start)
            check(slot is not None and gfns[-1] in slot, errno.EINVAL, "the range is in one private slot", "", gpa)
            assert slot is not None
            offsets = range(gfns.start - slot.gfn, gfns.stop - slot.gfn)
            frames = slot.restricted.get(offsets)
            taken = is_assigned(self.cpu, frames)
            check(not taken.any(), errno.EFAULT, "pages are not yet assigned", 0, int(taken.sum()))
            self.cpu.write_pages(as_pages(frames), self.cpu.read_pages(as_pages(slot.shared.get(offsets))))
            self._add_pages(frames, gfns, kind)
            self.tables.zap(gfns.start, len(gfns))
            self._private.mark(gfns, True)

    def _add_pages(self, frames: np.ndarray[Any, np.dtype[np.uint64]], gfns: range, kind: LaunchPage) -> None:
        assert self.gctx is not None
        pre_guest = NewState(assigned=True, asid=self.asid, immutable=True)
        try:
            rmpupdate(self.cpu, as_pages(frames), gfns, pre_guest)
            for _, pages in runs(frames):
                self.ccp.launch_update(self.gctx, pages, kind)
        except KernelError:
            for _, pages in runs(frames[is_assigned(self.cpu, frames)]):
                self.ccp.reclaim(pages)
            raise

    def snp_launch_finish(self, host_data: bytes = bytes(32)) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH: every vCPU's VMSA, then the firmware's own finish.

        One shot: after a failure past the first VMSA it can only answer EINVAL.
        """
        with self.ioctl(SevCommand.SNP_LAUNCH_FINISH.name, vcpus=len(self.vcpus)):
            check(self.gctx is not None, errno.EINVAL, "the launch has started", "a context", "none")
            assert self.gctx is not None
            for vcpu in self.vcpus:
                self._launch_vmsa(self.gctx, vcpu)
            self.ccp.launch_finish(self.gctx, host_data)
            self.launched = True

    def _launch_vmsa(self, gctx: int, vcpu: Vcpu) -> None:
        """Hand a vCPU's registers to the firmware: from then on its save area is an encrypted page."""
        check(not vcpu.encrypted, errno.EINVAL, "a vCPU's registers are taken once", "not yet", "encrypted")
        check(vcpu.registers is not None, errno.EINVAL, "each vCPU has registers", vcpu.number, "none")
        self.cpu.write(vcpu.vmsa[0] << PAGE_SHIFT, bytes(vcpu.registers or b""))
        gfn = np.array([INITIAL_VMSA_GPA >> PAGE_SHIFT], np.uint64)
        rmpupdate(self.cpu, vcpu.vmsa, gfn, NewState(assigned=True, asid=self.asid, immutable=True))
        try:
            self.ccp.launch_update(gctx, vcpu.vmsa, LaunchPage.VMSA)
        except KernelError:
            self.ccp.reclaim(vcpu.vmsa)
            raise
        vcpu.encrypted = True

    def destroy(self) -> None:
        """Close the VM: decommission the guest, make its pages the hypervisor's, free everything."""
        with self.ioctl("close", asid=self.asid):
            if self.gctx is not None:
                self.ccp.decommission(self.gctx)
                self.gctx = None
            for slot in self.slots.values():
                slot.restricted.close()
                slot.shared.close()
            for vcpu in self.vcpus:
                make_shared(self.cpu, page_numbers(vcpu.vmsa))
                self._memory.release(vcpu.vmsa)
                page = vcpu.vmcb >> PAGE_SHIFT
                self._memory.release(range(page, page + 1))
            self.vcpus.clear()
            self.slots.clear()
            self.tables.free()
            self._asids.give_back(self.asid)


class Kvm:
    """/dev/kvm with the SVM module: creates SNP guests and hands out ASIDs."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, ccp: Ccp) -> None:
        self._cpu, self._memory, self._ccp = cpu, memory, ccp
        self._asids = AsidPool(cpu.product.min_sev_asid, ccp.flush)
        self._loaded = False

    def __repr__(self) -> str:
        return f"Kvm({self._asids!r})"

    def load(self) -> None:
        """Load the module: SNP guests are possible once the firmware is up."""
        check(self._ccp.snp_initialised, errno.ENODEV, "SNP is initialised", "SNP_INIT_EX", "not yet")
        self._loaded = True

    def restricted_file(self, size: int) -> RestrictedFile:
        """memfd_restricted and ftruncate."""
        return RestrictedFile(self._cpu, self._memory, size)

    def user_memory(self, size: int) -> UserMemory:
        """mmap of anonymous memory."""
        return UserMemory(self._cpu, self._memory, size)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM and KVM_SEV_SNP_INIT: a VM with the lowest free SNP ASID.

        EBUSY where every ASID belongs to a living guest.
        """
        check(self._loaded, errno.ENOTTY, "kvm_amd has SNP", "a booted host", "not booted")
        vm = Vm(self._cpu, self._memory, self._ccp, self._asids)
        for name in ("KVM_CREATE_VM", SevCommand.SNP_INIT.name):
            with vm.ioctl(name, asid=vm.asid):
                pass
        return vm
