"""The launch of an SNP guest from its context to its end: SNP_LAUNCH_START, the VMSAs, SNP_LAUNCH_FINISH.

What is added in between stands in `snp_update`. Sources: Linux arch/x86/kvm/svm/sev.c (snp_launch_start,
snp_launch_update_vmsa, snp_launch_finish, snp_decommission_context); RFC v7 patches 38 and 40.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words, page_numbers
from snpbook.hardware.host_instructions import NewState
from snpbook.host.kvm import save_area
from snpbook.host.memory import runs
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, rmpupdate
from snpbook.host.steps import Step, Steps
from snpbook.spec.launch import ID_AUTH, ID_BLOCK
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, LaunchPage
from snpbook.spec.policy import guest_policy
from snpbook.spec.rmp import IMMUTABLE
from snpbook.spec.uapi_sev import SNP_POLICY_VALID
from snpbook.spec.vmsa import INITIAL_VMSA_GPA

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.sev_guest import SevGuest
    from snpbook.host.kvm.vm import Vm


def snp_guest(vm: Vm, number: int = errno.ENOTTY) -> SevGuest:
    """The SEV side of an SNP guest. ENOTTY for another."""
    check(vm.snp, number, "the VM is an SNP guest", "initialised for SNP", vm.type.name)
    assert vm.sev is not None
    return vm.sev


def context(vm: Vm, number: int = errno.ENOTTY) -> tuple[SevGuest, int]:
    """The SEV side and the context page of a launched guest. ENOTTY for one without SNP, EINVAL before the launch."""
    guest = snp_guest(vm, number)
    check(guest.gctx is not None, errno.EINVAL, "the launch has started", "a context", "none")
    assert guest.gctx is not None
    return guest, guest.gctx


def start(vm: Vm, call: SevCall) -> None:
    """SNP_LAUNCH_START: a context, the launch, the ASID. ENOTTY without a context, EIO where the firmware refuses.

    After a refusal the context goes again; where it does not, every further try is EINVAL.
    """
    guest, ccp, wanted = snp_guest(vm), vm.kernel.ccp, call.payload()
    if vm.kernel.era.launch_start_checked:
        check(guest.gctx is None, errno.EINVAL, "a guest is launched once", "no context", "a context")
        _check_policy(wanted)
    elif guest.gctx is not None:
        _forget_context(vm, guest.gctx)
    try:
        call.check_fd(call.fd)
        with call.told():
            gctx = ccp.create_context()
    except KernelError as error:
        rule = "a guest context is created"
        raise KernelError(errno.ENOTTY, rule, "a context", str(error), error.cite, error.firmware) from error
    guest.gctx, guest.policy = gctx, wanted.policy
    try:
        with call.told():
            ccp.launch_start(gctx, wanted.policy, wanted.gosvw)
            guest.fd = call.fd
            ccp.activate(gctx, guest.asid)
    except KernelError:
        decommission(vm)
        raise


def _check_policy(wanted: Record) -> None:
    check(not wanted.flags, errno.EINVAL, "flags of SNP_LAUNCH_START", 0, hex(wanted.flags))
    stray, policy = wanted.policy & ~SNP_POLICY_VALID, guest_policy(wanted.policy)
    check(not stray, errno.EINVAL, "bits of the policy", hex(SNP_POLICY_VALID), hex(wanted.policy))
    must = bool(policy.smt and policy.one)
    check(must, errno.EINVAL, "the policy allows SMT, and its bit 17 is set", "both set", hex(wanted.policy))
    check(not policy.single_socket, errno.EINVAL, "the policy demands no single socket", 0, hex(wanted.policy))


def _forget_context(vm: Vm, gctx: int) -> None:
    """Nobody holds the context any more: its page and, in the firmware, its guest are lost."""
    page = gctx >> PAGE_SHIFT
    vm.kernel.ccp.leaks.forget(range(page, page + 1))


def decommission(vm: Vm) -> bool:
    """SNP_DECOMMISSION, which unbinds the ASID, too; False where the firmware keeps the guest."""
    guest = vm.sev
    assert guest is not None
    assert guest.gctx is not None
    try:
        vm.kernel.ccp.decommission(guest.gctx)
    except KernelError as error:
        vm.kernel.log(f"Failed to release guest context, ret -{error.errno}")
        return False
    guest.gctx = None
    return True


def end(vm: Vm) -> bool:
    """The VM ends. False where the firmware keeps the guest: then its context page and its ASID are lost."""
    guest = vm.sev
    assert guest is not None
    if guest.bounce:
        with suppress(KernelError):  # the leak list names what does not come back
            vm.kernel.ccp.reclaim(guest.bounce[1:])
        vm.kernel.memory.release(guest.bounce)
    if guest.gctx is None or decommission(vm):
        return True
    _forget_context(vm, guest.gctx)
    return False


def finish(vm: Vm, call: SevCall) -> Steps[None]:
    """SNP_LAUNCH_FINISH: each vCPU's VMSA in the order of their numbers, the ID block, the end of the launch.

    One shot: what fails behind the first VMSA makes every further try EINVAL.
    """
    guest, gctx = context(vm)
    wanted = call.payload()
    era, names = vm.kernel.era, wanted.layout.fields
    check(not ("flags" in names and wanted.flags), errno.EINVAL, "flags of SNP_LAUNCH_FINISH", 0, repr(wanted))
    for _, vcpu in sorted(vm.vcpus.items()):
        yield Step(f"VMSA of vCPU {vcpu.number}")
        page = save_area.fill(vcpu)
        gfn = np.array([INITIAL_VMSA_GPA >> PAGE_SHIFT], np.uint64)
        with call.told():
            _, failure = add_pages(vm, call, page_numbers(page), gfn, LaunchPage.VMSA)
            if failure is not None:
                raise failure
        vcpu.encrypted = True
    yield Step("finish the launch")
    block = auth = b""
    if wanted.id_block_en:
        block = call.user_blob(wanted.id_block_uaddr, ID_BLOCK.size)
        auth = call.user_blob(wanted.id_auth_uaddr, ID_AUTH.size)
    call.check_fd(guest.fd)
    with call.told():
        vm.kernel.ccp.launch_finish(
            gctx,
            wanted.host_data if era.host_data_passed else bytes(len(wanted.host_data)),
            id_block=block,
            id_auth=auth,
            auth_key=bool(wanted.auth_key_en),
            vcek_disabled=bool("vcek_disabled" in names and wanted.vcek_disabled),
        )
    guest.launched = True


def add_pages(vm: Vm, call: SevCall, frames: Words, gfns: Words, kind: LaunchPage) -> tuple[int, KernelError | None]:
    """Give a run of pages to the guest and have the firmware add them: how many it took, and what befell the next.

    That one is the hypervisor's again; where it cannot be taken back it is leaked, and the VM bugged. Pages behind it
    had their RMPUPDATE, too, and go the same way (MODEL: Linux goes page by page).
    """
    guest, gctx = context(vm)
    cpu, ccp, failure = vm.kernel.cpu, vm.kernel.ccp, None
    try:
        rmpupdate(cpu, as_pages(frames), gfns, NewState(assigned=True, asid=guest.asid, immutable=True))
        ready = frames
    except KernelError as error:
        failure, ready = error, frames[: int(np.argmin(_waiting(vm, frames)))]
    try:
        call.check_fd(call.fd)
        for _, pages in runs(ready):
            ccp.launch_update(gctx, pages, kind)
        done = len(ready)
    except KernelError as error:
        failure, done = error, int(np.argmax(_waiting(vm, ready)))
    behind = frames[done:]
    for _, pages in runs(behind[_waiting(vm, behind)]):
        _take_back(vm, pages)
    return done, failure


def _waiting(vm: Vm, frames: Words) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which pages have been handed over and not been added: immutable in the RMP."""
    return np.asarray(vm.kernel.cpu.rmp_words(frames)[:, 0] & np.uint64(IMMUTABLE) != 0)


def _take_back(vm: Vm, pages: range) -> None:
    """snp_page_reclaim: a page that the firmware or the RMP keeps is leaked, and the VM bugged."""
    try:
        vm.kernel.ccp.reclaim(pages)
    except KernelError as error:
        vm.bug(f"Failed to reclaim PFN {pages.start:#x}, rc -{error.errno} fw_err {int(error.firmware or 0)}")
