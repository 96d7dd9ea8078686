"""A nested page fault whose cause is the RMP: where a 2 MB entry is in the way of a 4 KB access, KVM splits it.

It comes after the fault itself was served. Everything else is only logged, so that a guest may fault for ever. Sources:
Linux arch/x86/kvm/svm/sev.c (sev_handle_rmp_fault), arch/x86/virt/svm/sev.c (psmash); RFC v7 patch 51, whose lines of
log are unconfirmed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.rmp import ASSIGNED, LARGE, RmpCode
from snpbook.spec.vmcb import FaultError

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

SPLIT_LIMIT = 8
"""How often PSMASH is repeated while the entry is in use; Linux would go on for ever (MODEL)."""


def handle(vcpu: Vcpu, gfn: int, error: FaultError) -> Steps[None]:
    """Split the RMP entry behind a guest page and drop 512 mappings from that page on.

    A 4 KB entry has been split by another vCPU meanwhile, which the v7 series does not look at. ELOOP where the entry
    stays in use (MODEL).
    """
    vm, era, gpa = vcpu.vm, vcpu.vm.kernel.era, gfn << PAGE_SHIFT
    if not era.rmp_fault_checks_size and not error & FaultError.SIZE_MISMATCH:
        vm.kernel.log(f"SEV: Unexpected RMP fault, no size mismatch for GPA {gpa:#x}")
    page = _page(vm, gfn)
    if page is None:
        return
    yield Step("RMP fault: entry")
    if not _assigned(vm, page):
        vm.kernel.log(f"SEV: Unexpected RMP fault, no assigned RMP entry found for GPA {gpa:#x} PFN {page:#x} error 0")
        if not era.rmp_fault_checks_size:
            vm.mmu.unmap(range(gfn, gfn + PAGES_PER_LARGE))
        return
    if era.rmp_fault_checks_size and not _is_large(vm, page):
        return
    code = yield from _split(vm, page)
    if code is not RmpCode.SUCCESS:
        if era.rmp_fault_checks_size and _assigned(vm, page) and not _is_large(vm, page):
            return
        vm.kernel.log(f"SEV: Unable to split RMP entry for GPA {gpa:#x} PFN {page:#x} ret {int(code)}")
    yield Step("RMP fault: zap")
    vm.mmu.unmap(range(gfn, gfn + PAGES_PER_LARGE))


def _page(vm: Vm, gfn: int) -> int | None:
    """The frame of a private page, which gets memory now; None, and a line in the log, where it can have none."""
    gpa = gfn << PAGE_SHIFT
    if not vm.is_private(range(gfn, gfn + 1))[0]:
        vm.kernel.log(f"SEV: Unexpected RMP fault for non-private GPA {gpa:#x}")
        return None
    slot = vm.slots.of(gfn)
    if slot is None or slot.private is None:
        vm.kernel.log(f"SEV: Unexpected RMP fault, non-private slot for GPA {gpa:#x}")
        return None
    try:
        return int(slot.private.frames(slot, range(gfn, gfn + 1))[0])
    except KernelError:
        vm.kernel.log(f"SEV: Unexpected RMP fault, no backing page for private GPA {gpa:#x}")
        return None


def _split(vm: Vm, page: int) -> Steps[RmpCode]:
    """PSMASH of the 2 MB that hold a page, repeated while they are in use where the era does that."""
    head = page - page % PAGES_PER_LARGE
    for _ in range(SPLIT_LIMIT):
        yield Step("RMP fault: PSMASH")
        code = RmpCode(int(vm.kernel.cpu.psmash(range(head, head + 1))[0]))
        if code is not RmpCode.FAIL_INUSE or not vm.kernel.era.psmash_retried:
            return code
    check(False, errno.ELOOP, "PSMASH succeeds in the end", "an entry that is not in use", f"page {head:#x}")
    return code


def _assigned(vm: Vm, page: int) -> bool:
    return bool(int(vm.kernel.cpu.rmp_words(range(page, page + 1))[0, 0]) & ASSIGNED)


def _is_large(vm: Vm, page: int) -> bool:
    """The size of a page's entry is that of the first entry of its 2 MB."""
    head = page - page % PAGES_PER_LARGE
    return bool(int(vm.kernel.cpu.rmp_words(range(head, head + 1))[0, 0]) & LARGE)
