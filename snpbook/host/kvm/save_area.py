"""The save area of a vCPU with encrypted registers, as KVM fills it before the launch takes it.

Not every register that KVM keeps gets into it: the measurement shows which. Source: Linux arch/x86/kvm/svm/sev.c
(sev_es_sync_vmsa); RFC v7 patch 40.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.refusal import check
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.uapi_kvm import VmType
from snpbook.spec.vmsa import DR7_RESET, SAVE_AREA, SYNCED_REGISTERS, VMSA, X87_STATE

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu


def fill(vcpu: Vcpu) -> range:
    """Write the registers into the save area: its page. EINVAL where they are taken already, or breakpoints are set.

    The state of x87, SSE and AVX goes along except for SEV-ES guests of VM type 0, whose measurements are older than
    that. That SNP guests of the v7 series, also of type 0, have it is inferred: both eras give one digest.
    """
    vm, state = vcpu.vm, vcpu.state
    check(not vcpu.encrypted, errno.EINVAL, "registers are taken once", "not yet", f"vCPU {vcpu.number}: encrypted")
    check(state.dr7 == DR7_RESET, errno.EINVAL, "no breakpoints are set", hex(DR7_RESET), hex(state.dr7))
    assert vm.sev is not None
    names = [*SAVE_AREA.fields, *SYNCED_REGISTERS]
    if vm.type is not VmType.DEFAULT_VM or vm.snp:
        names += X87_STATE
    area = VMSA.pack(**{name: getattr(state, name) for name in names}, sev_features=int(vm.sev.vmsa_features))
    vm.kernel.cpu.write(vcpu.vmsa_page << PAGE_SHIFT, area)
    return range(vcpu.vmsa_page, vcpu.vmsa_page + 1)
