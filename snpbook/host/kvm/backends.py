"""The back ends for private slots: which kinds of files a slot may bind, and what then stands for the file in KVM.

A new one is a file of its own that fulfils `PrivateMemory`, one line here, and its test.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from snpbook.host.files import File
from snpbook.host.kvm import guest_memfd
from snpbook.host.kvm.guest_memfd import GuestMemfd
from snpbook.host.kvm.memslots import PrivateMemory
from snpbook.host.kvm.null_memory import NullBinding, NullMemory
from snpbook.host.kvm.restricted import RestrictedBinding
from snpbook.host.memory_files import RestrictedMemory
from snpbook.host.refusal import KernelError
from snpbook.spec.private_memory import Backend

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm

BACKENDS: Mapping[type[File], tuple[tuple[Backend, ...], Callable[[Vm, Any], PrivateMemory]]] = {
    GuestMemfd: ((Backend.GUEST_MEMFD,), guest_memfd.own),
    RestrictedMemory: ((Backend.LAZY, Backend.RESTRICTED), RestrictedBinding),
    NullMemory: ((Backend.NULL,), NullBinding),
}
"""By the kind of file: the back ends that it is, and how a VM comes to use it."""


def private_memory(vm: Vm, file: File) -> PrivateMemory:
    """What stands for a file behind a private slot. EINVAL for a descriptor of another kind."""
    found = BACKENDS.get(type(file))
    if found is None:
        expected = vm.kernel.era.private_file.name
        raise KernelError(errno.EINVAL, "the descriptor is a file for private memory", expected, file.device)
    return found[1](vm, file)
