"""The SEV side of a VM: what KVM_SEV_INIT and its kin made, and what a launch has reached.

The firmware's own state of the guest is in its context page or behind its handle; this is what KVM remembers. Source:
Linux arch/x86/kvm/svm/svm.h (struct kvm_sev_info).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snpbook.host.steps import Mutex
from snpbook.spec.sev_features import SevFeatures

if TYPE_CHECKING:
    from snpbook.host.kvm.enc_regions import EncRegion
    from snpbook.host.kvm.vm import Vm


_NONE = SevFeatures(0)


@dataclass(slots=True, eq=False)
class SevGuest:
    """An encrypted guest: `es` for encrypted registers, `snp` for the RMP (which has both)."""

    es: bool
    snp: bool
    asid: int
    vmsa_features: SevFeatures = _NONE
    ghcb_version: int = 0
    """0 for a guest without GHCB."""
    handle: int = 0
    """The firmware's handle of a SEV or SEV-ES guest; 0 before LAUNCH_START."""
    gctx: int | None = None
    """The system address of an SNP guest's context page; None before SNP_LAUNCH_START."""
    fd: int = -1
    """The descriptor of /dev/sev that the launch began with."""
    policy: int = 0
    launched: bool = False
    """Whether the launch is finished."""
    regions: list[EncRegion] = field(default_factory=list)
    """User memory that is registered, and so pinned."""
    mirror_of: Vm | None = None
    """The VM whose keys this one uses."""
    ap_jump_table: int = 0
    """Where a SEV-ES guest keeps the address of its AP jump table with the hypervisor."""
    request_lock: Mutex = field(default_factory=lambda: Mutex("guest_req_mutex"))
    """One guest message at a time."""
    requests: int = 0
    """Guest messages since one was told to wait, where they are throttled."""
    bounce: range = range(0)
    """The host's own pages for guest messages: request and response."""
    asks_certificates: bool = False
    """Whether an extended guest request goes to the VMM for certificates (a later kernel's option)."""
    certificates: bytes = b""
    """The VM's own certificate blob of the v7 series, empty for none."""
