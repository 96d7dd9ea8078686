"""Intra-host migration and mirror VMs: a VM takes over the keys of another one of this host, or shares them.

Both VMs are claimed before either is locked; whoever finds one claimed gives up (EBUSY), so that crossing moves cannot
wait for each other. SNP guests are refused: their context does not move in Linux 6.12, which does not look (MODEL).
Source: Linux arch/x86/kvm/svm/sev.c (sev_vm_move_enc_context_from, sev_vm_copy_enc_context_from).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from snpbook.host.kvm import registers
from snpbook.host.process import Process
from snpbook.host.refusal import check
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

_BUSY = (errno.EBUSY, "the VM takes part in no migration", "none in progress", "one in progress")


def copy_context(vm: Vm, process: Process, fd: int) -> Steps[int]:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: the VM becomes a mirror, with the same keys and ASID.

    EBADF for a descriptor of no VM, EBUSY while one of them moves, EINVAL for itself, for a source without SEV or that
    is a mirror, and where the VM has SEV or vCPUs already.
    """
    source = _vm(process, fd)
    with (yield from _both(vm, source)):
        _check_pair(vm, source)
        owner = source.sev
        assert owner is not None
        check(owner.mirror_of is None, errno.EINVAL, "the source is no mirror", "an owner", "a mirror")
        check(not vm.vcpus, errno.EINVAL, "no vCPU has been created", 0, len(vm.vcpus))
        source.hold()
        vm.sev = replace(owner, mirror_of=source, regions=[], certificates=b"")
    return 0


def move_context(vm: Vm, process: Process, fd: int) -> Steps[int]:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: keys, ASID, pins, mirrors and encrypted registers move; the source is dead.

    EBADF and EBUSY as above; EINVAL for itself, for a source without SEV or of another type, where the VM has SEV
    already, for SEV-ES guests with another number of vCPUs or whose registers are not encrypted yet.
    """
    source = _vm(process, fd)
    with (yield from _both(vm, source)):
        check(vm.type is source.type, errno.EINVAL, "both VMs are of one type", vm.type.name, source.type.name)
        _check_pair(vm, source)
        _check_vcpus(vm, source)
        _move(vm, source)
    return 0


def _vm(process: Process, fd: int) -> Vm:
    from snpbook.host.kvm.vm import VmFile

    file = process.file(fd)
    check(isinstance(file, VmFile), errno.EBADF, "the descriptor of a VM", VmFile.device, file.device)
    assert isinstance(file, VmFile)
    return file.vm


def _both(vm: Vm, source: Vm) -> Steps[AbstractContextManager[object]]:
    """Claim both VMs and lock them, the destination first, until the block ends. EINVAL where they are one, EBUSY."""
    check(vm is not source, errno.EINVAL, "two VMs", "another one", "itself")
    check(not vm.migrating, *_BUSY)
    with ExitStack() as held:
        held.enter_context(_claimed(vm))
        yield Step("claim the source")
        busy = source.migrating
        if busy:
            yield Step("let the destination go again")
        check(not busy, *_BUSY)
        held.enter_context(_claimed(source))
        held.enter_context((yield from vm.lock.hold()))
        held.enter_context((yield from source.lock.hold()))
        return held.pop_all()


@contextmanager
def _claimed(vm: Vm) -> Iterator[None]:
    """migration_in_progress of one end."""
    vm.migrating = True
    try:
        yield
    finally:
        vm.migrating = False


def _check_pair(vm: Vm, source: Vm) -> None:
    check(vm.sev is None, errno.EINVAL, "the VM has no keys yet", "not initialised", "a SEV guest")
    known = source.sev is not None and not source.snp
    check(known, errno.EINVAL, "the source is a SEV or a SEV-ES guest", "initialised", repr(source))


def _check_vcpus(vm: Vm, source: Vm) -> None:
    if not source.protected_state:
        return
    check(len(vm.vcpus) == len(source.vcpus), errno.EINVAL, "numbers of vCPUs", len(source.vcpus), len(vm.vcpus))
    encrypted = all(vcpu.encrypted for vcpu in source.vcpus.values())
    check(encrypted, errno.EINVAL, "the source's registers are encrypted", "LAUNCH_UPDATE_VMSA", "not yet")


def _move(vm: Vm, source: Vm) -> None:
    guest = source.sev
    assert guest is not None
    vm.sev, source.sev, source.dead = guest, None, True
    pinned = sum(len(region.frames) for region in guest.regions) << PAGE_SHIFT
    source.process.locked -= pinned
    vm.process.locked += pinned
    for other in vm.kvm.vms:
        if other.sev is not None and other.sev.mirror_of is source:
            other.sev.mirror_of = vm
            vm.hold()
            source.let_go()
    ghcbs = [vcpu.control().ghcb_gpa for vcpu in _in_order(source)] if guest.es else []
    if guest.es:
        for mine, theirs in zip(_in_order(vm), _in_order(source), strict=True):
            _move_registers(mine, theirs)
    for vcpu in _in_order(vm):
        vm.kernel.cpu.write(vcpu.vmcb, registers.control(vcpu))
    for vcpu, ghcb in zip(_in_order(vm), ghcbs, strict=False):
        vcpu.set_control("ghcb_gpa", ghcb)


def _in_order(vm: Vm) -> list[Vcpu]:
    return [vcpu for _, vcpu in sorted(vm.vcpus.items())]


def _move_registers(mine: Vcpu, theirs: Vcpu) -> None:
    """The save area goes along, and with it the code that stands at its RIP."""
    mine.vmsa_page, theirs.vmsa_page = theirs.vmsa_page, mine.vmsa_page
    mine.vmsa, theirs.vmsa = theirs.vmsa, None
    mine.executor, theirs.executor = theirs.executor, mine.executor
    mine.ghcb_registered, theirs.ghcb_registered = theirs.ghcb_registered, -1
    mine.encrypted, theirs.encrypted = True, False
