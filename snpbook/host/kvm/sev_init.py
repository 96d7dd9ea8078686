"""A VM becomes an encrypted guest: KVM_SEV_INIT, ES_INIT, INIT2, and SNP_INIT of the v7 series.

Each charges the cgroup, takes an ASID and has the firmware brought up. What fails after the ASID leaves the VM as it
was, but the ASID waits for a flush: every failed try burns one. Sources: Linux arch/x86/kvm/svm/sev.c
(__sev_guest_init), RFC v7 patch 37.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.ccp.mailbox import answered
from snpbook.host.kvm.sev_guest import SevGuest
from snpbook.host.refusal import KernelError, check
from snpbook.spec.ghcb import PROTOCOL_VERSION
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.uapi_kvm import VmType
from snpbook.spec.uapi_sev import SevOp

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel
    from snpbook.host.kvm.device import Kvm
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm

_FIRST_GHCB_VERSION = 1
_BOUNCE_PAGES = 2


def supported_vmsa_features(kvm: Kvm) -> int:
    """SEV_FEATURES that userspace may ask for: those of the era, with DebugSwap only where the module has it."""
    features = kvm.kernel.era.vmsa_features
    return int(features if kvm.debug_swap else features & ~SevFeatures.DEBUG_VIRTUALIZATION)


def init(vm: Vm, call: SevCall) -> None:
    """INIT and ES_INIT: a VM of type 0 becomes a SEV or a SEV-ES guest, of the first GHCB version. EINVAL, ENOTTY."""
    es = call.op is SevOp.ES_INIT
    check(vm.kvm.sev_es or not es, errno.ENOTTY, "this host runs SEV-ES guests", "sev_es Y", "sev_es N")
    check(vm.type is VmType.DEFAULT_VM, errno.EINVAL, "the type of the VM", VmType.DEFAULT_VM.name, vm.type.name)
    _check_unused(vm)
    _make(vm, call, SevGuest(es=es, snp=False, asid=0, ghcb_version=_FIRST_GHCB_VERSION if es else 0))


def snp_init(vm: Vm, call: SevCall) -> None:
    """SNP_INIT of the v7 series. ENOTTY on a host without SNP, EOPNOTSUPP for a flag (unconfirmed).

    The structure comes back with the flags that are supported: none.
    """
    check(vm.kvm.snp, errno.ENOTTY, "this host runs SNP guests", "sev_snp Y", "sev_snp N")
    check(vm.type is VmType.DEFAULT_VM, errno.EINVAL, "the type of the VM", VmType.DEFAULT_VM.name, vm.type.name)
    _check_unused(vm)
    wanted = call.payload()
    call.store(wanted.replace(flags=0))
    check(not wanted.flags, errno.EOPNOTSUPP, "flags of SNP_INIT", 0, hex(wanted.flags))
    features = SevFeatures.SNP_ACTIVE
    _make(vm, call, SevGuest(es=True, snp=True, asid=0, vmsa_features=features, ghcb_version=PROTOCOL_VERSION))


def init2(vm: Vm, call: SevCall) -> None:
    """INIT2: a VM of a SEV type is initialised, once. EINVAL for what the type cannot have."""
    check(vm.type >= VmType.SEV_VM, errno.EINVAL, "the type of the VM", "SEV, SEV-ES or SNP", vm.type.name)
    check(vm.sev is None, errno.EINVAL, "a guest is initialised once", "not yet", "initialised")
    wanted, es = call.payload(), vm.type is not VmType.SEV_VM
    _check_unused(vm)
    check(not wanted.flags, errno.EINVAL, "flags of INIT2", 0, hex(wanted.flags))
    features = supported_vmsa_features(vm.kvm) if es else 0
    good = not wanted.vmsa_features & ~features
    check(good, errno.EINVAL, "vmsa_features", hex(features), hex(wanted.vmsa_features))
    newest = PROTOCOL_VERSION if es else 0
    check(wanted.ghcb_version <= newest, errno.EINVAL, "ghcb_version", f"up to {newest}", wanted.ghcb_version)
    snp = vm.type is VmType.SNP_VM
    chosen = SevFeatures(wanted.vmsa_features | (SevFeatures.SNP_ACTIVE if snp else 0))
    version = wanted.ghcb_version or newest
    _make(vm, call, SevGuest(es=es, snp=snp, asid=0, vmsa_features=chosen, ghcb_version=version))


def _check_unused(vm: Vm) -> None:
    check(not vm.vcpus, errno.EINVAL, "no vCPU has been created", 0, len(vm.vcpus))
    check(vm.sev is None, errno.EINVAL, "a guest is initialised once", "not yet", "initialised")


def _make(vm: Vm, call: SevCall, guest: SevGuest) -> None:
    """ASID, firmware, bounce pages, in this order; `error` is told of a failure alone."""
    asids, kernel = vm.kvm.asids, vm.kernel
    guest.asid = asids.take(es=guest.es)
    try:
        kernel.ccp.platform_init()
        if guest.snp and kernel.era.requests_bounced:
            guest.bounce = _bounce_pages(kernel)
    except KernelError as error:
        call.error = int(answered(error) or 0)
        asids.give_back(guest.asid)
        raise
    vm.sev = guest


def _bounce_pages(kernel: Kernel) -> range:
    """The page of a guest message's request, and that of its response, which is the firmware's. ENOMEM."""
    pages = kernel.memory.allocate(_BOUNCE_PAGES)
    try:
        kernel.ccp.convert(pages[1:])
    except KernelError as error:
        kernel.memory.release(pages)
        raise KernelError(errno.ENOMEM, "a page for the firmware", "a Firmware page", str(error)) from error
    return pages
