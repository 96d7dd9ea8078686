"""The back ends for private slots: which file each is kept in, how a VMM makes one, and what stands for it in KVM.

A new one is a file of its own that fulfils `PrivateMemory`, one line here, and its test.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snpbook.host.files import File
from snpbook.host.kvm import guest_memfd, null_memory, restricted
from snpbook.host.kvm.guest_memfd import GuestMemfd
from snpbook.host.kvm.memslots import PrivateMemory
from snpbook.host.kvm.null_memory import NullBinding, NullMemory
from snpbook.host.kvm.restricted import RestrictedBinding
from snpbook.host.memory_files import RestrictedMemory
from snpbook.host.refusal import KernelError, check
from snpbook.spec.private_memory import CELLS, Backend

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm
    from snpbook.host.process import Process


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of file: the back ends that it is, how a process makes one for a VM, and how the VM comes to use it."""

    names: tuple[Backend, ...]
    file: type[File]
    create: Callable[[Process, int, int], int]
    """A new descriptor, given the process, the VM's descriptor and a size in bytes."""
    use: Callable[[Vm, Any], PrivateMemory]


BACKENDS: tuple[Row, ...] = (
    Row((Backend.GUEST_MEMFD,), GuestMemfd, guest_memfd.create, guest_memfd.own),
    Row((Backend.LAZY, Backend.RESTRICTED), RestrictedMemory, restricted.create, RestrictedBinding),
    Row((Backend.NULL,), NullMemory, null_memory.create, NullBinding),
)
"""Those with private files; memory that is registered has none."""


def create_file(backend: Backend, process: Process, vm_fd: int, size: int) -> int:
    """A descriptor of a new file for private memory, as the VMM opens it. `KernelError` where the kernel has none."""
    row = next(row for row in BACKENDS if backend in row.names)
    return row.create(process, vm_fd, size)


def private_memory(vm: Vm, file: File) -> PrivateMemory:
    """What stands for a file behind a private slot. EINVAL for another descriptor, and for a guest that never had such.

    What kind a VM without types becomes is not known before it is initialised.
    """
    row = next((row for row in BACKENDS if type(file) is row.file), None)
    if row is None:
        expected = vm.kernel.era.private_file.name
        raise KernelError(errno.EINVAL, "the descriptor is a file for private memory", expected, file.device)
    if vm.sev is not None:
        kind = "snp" if vm.snp else "sev-es" if vm.sev.es else "sev"
        known = any((kind, name) in CELLS for name in row.names)
        check(known, errno.EINVAL, f"a {kind} guest has this kind of private memory", "a cell of the table", row.names)
    return row.use(vm, file)
