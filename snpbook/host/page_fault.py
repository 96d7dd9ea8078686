"""A #PF of the host with the RMP bit: what the kernel does for a process that writes where a guest's page is.

A write through a mapping of 2 MB is refused where any page of the 2 MB is a guest's, so a fault may be the mapping's
fault alone. The kernel's own writes go through its direct map of all memory. Sources: RFC v7 patches 17 to 23 (the same
in v8, with the direct map of Linux); Linux 6.12 arch/x86/mm/fault.c, arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

import errno
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.exits import HostPageFault
from snpbook.host.address_space import AddressSpace
from snpbook.host.refusal import KernelError
from snpbook.host.rmp import is_assigned
from snpbook.spec.eras import DirectMap
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel
    from snpbook.host.process import Process

RETRY_LIMIT = 8
"""How often an access that makes no progress is repeated; a process would fault for ever (MODEL)."""


class Served(Enum):
    """What becomes of an RMP #PF on a user address."""

    RETRY = auto()
    SPLIT_AND_RETRY = auto()
    SIGBUS = auto()


class Sigbus(KernelError):
    """The process is sent SIGBUS, which ends it unless it has a handler."""


class Oops(KernelError):
    """The kernel itself faulted where it cannot: the task is killed, and the log says why."""


def serve(space: AddressSpace, page: int) -> Served:
    """A fault on a user page, in the order of the v7 series.

    Page table entry absent: retry. RMP entry of the 4 KB page assigned: SIGBUS. Mapped by 4 KB: retry. By 2 MB: split.
    """
    pages = range(page, page + 1)
    if not space.mapped(pages):
        return Served.RETRY
    ((file, offsets),) = space.files(pages)
    frame = file.peek(offsets)
    if not frame[0]:
        return Served.RETRY
    if is_assigned(space.cpu, frame)[0]:
        return Served.SIGBUS
    if not space.is_large(pages)[0]:
        return Served.RETRY
    space.split.add(page // PAGES_PER_LARGE)
    return Served.SPLIT_AND_RETRY


def store(process: Process, address: int, data: bytes) -> None:
    """A write of the process itself. `Sigbus` as the kernel decides; EFAULT stands for SIGSEGV.

    Linux 6.12 has no handler: the access would fault for ever (inferred), which is EFAULT here (MODEL).
    """
    space, era = process.space, process.kernel.era
    for _ in range(RETRY_LIMIT):
        try:
            space.put(address, data)
            return
        except HostPageFault as fault:
            if not era.host_rmp_fault_handled:
                raise KernelError(errno.EFAULT, fault.rule, fault.expected, fault.found, fault.cite) from fault
            page = space.page_of(fault.spa >> PAGE_SHIFT, address, len(data))
            if serve(space, page) is Served.SIGBUS:
                where = hex(page << PAGE_SHIFT)
                raise Sigbus(errno.EFAULT, f"SIGBUS at {where}: {fault.rule}", fault.expected, fault.found) from fault
    raise KernelError(errno.ELOOP, "the write gets on after a fault", "progress", hex(address))


def store_as_kernel(kernel: Kernel, spa: int, data: bytes) -> None:
    """A write of the kernel through its direct map, such as clearing a page; `Oops` where it faults."""
    try:
        kernel.cpu.write(spa, data)
    except HostPageFault as fault:
        page = fault.spa >> PAGE_SHIFT
        # The direct map begins where the kernel's random base says: the line tells the system address (MODEL).
        kernel.log(f"BUG: unable to handle page fault for address: {fault.spa:#x}")
        kernel.log("#PF: supervisor write access in kernel mode")
        if kernel.era.direct_map is DirectMap.REMOVED:
            kernel.log("#PF: error_code(0x0002) - not-present page")
            rule = "the page is in the kernel's direct map"
        else:
            kernel.log(f"#PF: error_code({int(fault.error):#x}) - RMP violation")
            low, high = kernel.cpu.rmp_words(np.array([page], np.uint64))[0].tolist()
            kernel.log(f"SEV-SNP: PFN {page:#x}, RMP entry: [0x{low:016x} - 0x{high:016x}]")
            rule = fault.rule
        raise Oops(errno.EFAULT, f"oops: {rule}", fault.expected, fault.found, fault.cite) from fault
