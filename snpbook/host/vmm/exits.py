"""The loop around KVM_RUN: what the VMM does with each exit, and conversions of memory.

A conversion sets the attribute first, then frees the side that the guest has left, unless the VMM keeps both. Sources:
QEMU accel/kvm/kvm-all.c (kvm_cpu_exec, kvm_convert_memory), target/i386/kvm/kvm.c; RFC v7's QEMU for KVM_EXIT_VMGEXIT.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.memory_files import PUNCH
from snpbook.host.refusal import KernelError, check
from snpbook.host.vmm import page_state, ports
from snpbook.host.vmm.launch import set_attributes
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.ghcb import MSR_CODE_MASK
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import Advice
from snpbook.spec.uapi_kvm import EHWPOISON, HC_MAP_GPA_RANGE, Exit, Ioctl, IoDirection, MapGpaRange

if TYPE_CHECKING:
    from snpbook.host.vmm.guest import VcpuHandle, Vmm

FAULT_LIMIT = 8
"""How often one page may be converted to and fro without anything else happening (MODEL: a real guest goes on)."""


def run(vmm: Vmm, handle: VcpuHandle) -> Exit:
    """Run a vCPU until it halts or ends."""
    repeated, last = 0, -1
    while True:
        failed = _enter(vmm, handle)
        reason = Exit(_record(vmm, handle, structs.RUN).exit_reason)
        fault = reason in (Exit.MEMORY_FAULT, Exit.MEMORY_FAULT_V10)
        expected = (errno.EFAULT, EHWPOISON) if fault else (errno.EPERM,) if reason is Exit.VMGEXIT else ()
        if failed is not None and failed.errno not in expected:
            raise failed
        gpa = exit_record(vmm, handle, structs.EXIT_MEMORY_FAULT).gpa if fault else -1
        repeated, last = repeated + 1 if gpa == last >= 0 else 0, gpa
        check(repeated < FAULT_LIMIT, errno.ELOOP, "a conversion gets the guest on", "progress", hex(gpa))
        if failed is not None and failed.errno == EHWPOISON:
            raise failed
        if not _serve(vmm, handle, reason):
            return reason


def _enter(vmm: Vmm, handle: VcpuHandle) -> KernelError | None:
    try:
        vmm.process.ioctl(handle.fd, Ioctl.RUN)
    except KernelError as error:
        return error
    return None


def _serve(vmm: Vmm, handle: VcpuHandle, reason: Exit) -> bool:
    """Serve one exit; False where the guest cannot go on by itself."""
    match reason:
        case Exit.IO:
            _port(vmm, handle)
        case Exit.MEMORY_FAULT | Exit.MEMORY_FAULT_V10:
            fault = exit_record(vmm, handle, structs.EXIT_MEMORY_FAULT)
            private = vmm.kernel.era.memory_fault_private
            unknown = fault.flags & ~private
            check(not unknown, errno.EINVAL, "flags of a memory fault", hex(private), hex(fault.flags))
            convert(vmm, fault.gpa, fault.size, private=bool(fault.flags & private))
        case Exit.HYPERCALL:
            _hypercall(vmm, handle)
        case Exit.VMGEXIT:
            request = exit_record(vmm, handle, structs.EXIT_VMGEXIT).ghcb_msr
            if request & MSR_CODE_MASK:
                page_state.serve_msr(vmm, handle, request)
            else:
                page_state.serve(vmm, vmm.vcpus[handle.number], request)
        case _:
            return False
    return True


def convert(vmm: Vmm, gpa: int, size: int, *, private: bool) -> None:
    """Convert guest memory: the attribute, then what is discarded.

    EINVAL for no whole pages, and for memory to be made private that is none; the other way that is ignored.
    """
    whole = size > 0 and gpa % PAGE_SIZE == 0 == size % PAGE_SIZE
    check(whole, errno.EINVAL, "a conversion of whole pages", PAGE_SIZE, f"{gpa:#x}+{size:#x}")
    done = 0
    while done < size:
        block = vmm.block_of(gpa + done)
        if block is None or block.private_fd < 0:
            check(not private, errno.EINVAL, "memory that can be private", "a private file", hex(gpa + done))
            done += PAGE_SIZE if block is None else min(size - done, block.gpa + block.size - gpa - done)
            continue
        part = min(size - done, block.gpa + block.size - gpa - done)
        set_attributes(vmm, gpa + done, part, private=private)
        if vmm.discard and private:
            vmm.process.madvise(block.user(gpa + done), part, Advice.DONTNEED)
        elif vmm.discard:
            vmm.process.fallocate(block.private_fd, PUNCH, gpa + done - block.gpa, part)
        done += part


def _hypercall(vmm: Vmm, handle: VcpuHandle) -> None:
    """KVM_HC_MAP_GPA_RANGE: a conversion; `ret` tells KVM how it went."""
    call = exit_record(vmm, handle, structs.EXIT_HYPERCALL)
    check(call.nr == HC_MAP_GPA_RANGE, errno.EINVAL, "a hypercall that userspace serves", HC_MAP_GPA_RANGE, call.nr)
    private = bool(call.arg2 & MapGpaRange.ENCRYPTED)
    try:
        convert(vmm, call.arg0, call.arg1 << PAGE_SHIFT, private=private)
        result = 0
    except KernelError as error:
        result = error.errno or errno.EINVAL
    put_exit_record(vmm, handle, call.replace(ret=result))


def _port(vmm: Vmm, handle: VcpuHandle) -> None:
    """KVM_EXIT_IO: the data lies in the page of the vCPU's mapping that the exit names."""
    io = exit_record(vmm, handle, structs.EXIT_IO)
    address, length = handle.run + io.data_offset, io.size * io.count
    if io.direction == IoDirection.OUT:
        data = vmm.process.load(address, length)
        for i in range(io.count):
            vmm.cmos_index = ports.write(io.port, data[i * io.size], vmm.cmos_index)
        return
    value = ports.read(io.port, vmm.cmos_index, vmm.memory).to_bytes(1, "little")
    vmm.process.store(address, (value + b"\xff" * (io.size - 1)) * io.count)


def exit_record(vmm: Vmm, handle: VcpuHandle, layout: Layout) -> Record:
    """The exit's part of `kvm_run`."""
    return layout.unpack(vmm.process.load(handle.run + structs.RUN_EXIT, layout.size))


def put_exit_record(vmm: Vmm, handle: VcpuHandle, record: Record) -> None:
    """Leave an answer there, for KVM to find at the next KVM_RUN."""
    vmm.process.store(handle.run + structs.RUN_EXIT, bytes(record))


def _record(vmm: Vmm, handle: VcpuHandle, layout: Layout) -> Record:
    return layout.unpack(vmm.process.load(handle.run, layout.size))
