"""KVM_MEMORY_ENCRYPT_REG_REGION: user memory of a SEV guest that stays where it is.

Every page of the region gets memory and is pinned for long, against RLIMIT_MEMLOCK; it is let go, after WBINVD, when
the region is taken back or the VM ends. Source: Linux arch/x86/kvm/svm/sev.c (sev_mem_enc_register_region).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snpbook.hardware.dram import Words
from snpbook.host.files import Argument
from snpbook.host.kvm import registered
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import Capability
from snpbook.spec.uapi_kvm_structs import ENC_REGION
from snpbook.trace import PagesPinned

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_guest import SevGuest
    from snpbook.host.kvm.vm import Vm, VmFile


@dataclass(frozen=True, slots=True, eq=False)
class EncRegion:
    """A registered region: its user addresses, and the frames that it pins."""

    address: int
    size: int
    frames: Words


def register(file: VmFile, process: Process, argument: Argument) -> int:
    """Pin a region. ENOTTY without SEV, EINVAL for a mirror or no range, ENOMEM beyond the limit or without memory.

    A region may be registered again, and then counts again.
    """
    vm, region = file.vm, argument.record(ENC_REGION)
    sev = _sev(vm)
    check(sev.mirror_of is None, errno.EINVAL, "a mirror VM pins nothing", "the VM that it mirrors", "a mirror")
    good = 0 < region.size <= (1 << 64) - region.addr
    check(good, errno.EINVAL, "a region", "at least a byte", f"{region.addr:#x}+{region.size:#x}")
    sev.regions.append(EncRegion(region.addr, region.size, pin(vm, region.addr, region.size)))
    return 0


def unregister(file: VmFile, process: Process, argument: Argument) -> int:
    """Let a region go, named exactly as it was registered (EINVAL)."""
    vm, wanted = file.vm, argument.record(ENC_REGION)
    sev = _sev(vm)
    check(sev.mirror_of is None, errno.EINVAL, "a mirror VM pins nothing", "the VM that it mirrors", "a mirror")
    found = next((r for r in sev.regions if (r.address, r.size) == (wanted.addr, wanted.size)), None)
    if found is None:
        named = f"{wanted.addr:#x}+{wanted.size:#x}"
        raise KernelError(errno.EINVAL, "the region is registered", "its exact address and size", named)
    vm.kernel.cpu.wbinvd()
    unpin(vm, found)
    sev.regions.remove(found)
    return 0


def pin(vm: Vm, address: int, size: int, *, write: bool = True) -> Words:
    """Long-term pins on a range of user memory: its frames. ENOMEM beyond the limit, or where a page cannot be had."""
    process = vm.process
    pages = range(address >> PAGE_SHIFT, -(-(address + size) // PAGE_SIZE))
    locked = process.locked + (len(pages) << PAGE_SHIFT)
    free = locked <= process.memlock or Capability.IPC_LOCK in process.capabilities
    check(free, errno.ENOMEM, "RLIMIT_MEMLOCK, or CAP_IPC_LOCK", hex(process.memlock), hex(locked))
    try:
        frames = process.space.frames(pages, write=write).copy()
    except KernelError as error:
        raise KernelError(errno.ENOMEM, "every page can be pinned", error.expected, error.found, error.cite) from error
    vm.kernel.memory.pin(frames)
    _tell(vm, frames, pinned=True)
    process.locked = locked
    return frames


def unpin(vm: Vm, region: EncRegion) -> None:
    """Take the region's pins off its pages."""
    if vm.in_place:
        registered.release(vm, region.frames)
    vm.kernel.memory.unpin(region.frames)
    _tell(vm, region.frames, pinned=False)
    vm.process.locked -= len(region.frames) << PAGE_SHIFT


def _tell(vm: Vm, frames: Words, *, pinned: bool) -> None:
    if vm.kernel.cpu.trace:
        vm.kernel.cpu.trace.emit(PagesPinned(owner=vm, frames=frames, pinned=pinned))


def unpin_all(vm: Vm) -> None:
    """The VM ends; its caches were written back."""
    if vm.sev is not None:
        for region in vm.sev.regions:
            unpin(vm, region)
        vm.sev.regions.clear()


def _sev(vm: Vm) -> SevGuest:
    check(vm.sev is not None, errno.ENOTTY, "the VM has SEV", "KVM_SEV_INIT", vm.type.name)
    assert vm.sev is not None
    return vm.sev
