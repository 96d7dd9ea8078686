"""The kernel that a host boots, as an object from which code reads what its kernel does.

An `Era` is a column of `snpbook.spec.era_differences.DIFFERENCES`, with types; code that depends on the kernel asks
`era.psc_exit` or `era.rmp_at_attributes` and never for the name. Later kernels' features are options of an era.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from snpbook.spec.era_differences import DIFFERENCES, NAMES, Certificates, DirectMap, LaunchFailure, PrivateFile
from snpbook.spec.layout import Layout
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.uapi_kvm import Cap, Exit, Ioctl, VmType
from snpbook.spec.uapi_psp import COMMANDS, PspCommand
from snpbook.spec.uapi_sev import LEGACY_OPS, LEGACY_PAYLOADS, REQ_CERTS_OPS, SevOp

__all__ = [
    "DIFFERENCES", "NAMES", "OPTIONS", "Certificates", "DirectMap", "Era", "LaunchFailure", "PrivateFile", "era",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Era:
    """One kernel: each attribute is a row of `DIFFERENCES`, which says what it means."""

    name: str

    # Numbers and structures.
    private_file: PrivateFile
    vm_types: frozenset[VmType]
    capabilities: frozenset[Cap]
    absent_ioctls: frozenset[Ioctl]
    set_private_region: Ioctl
    private_region: Layout
    set_attributes: Ioctl
    attributes_partial: bool
    memory_fault_exit: Exit
    memory_fault_private: int
    memory_fault_fails: bool
    psc_exit: Exit
    init_op: SevOp
    snp_ops: Mapping[int, SevOp]
    snp_payloads: Mapping[SevOp, Layout]
    snp_psp_commands: Mapping[int, PspCommand]

    # Private memory and the RMP.
    sev_private_memory: bool
    private_pages_zeroed: bool
    rmp_at_attributes: bool
    rmp_2m: bool
    psmash_retried: bool
    rmp_fault_checks_size: bool
    direct_map: DirectMap
    host_rmp_fault_handled: bool
    ghcb_pinned: bool
    private_fault_errors: bool

    # Launch.
    snp_only_snp_ops: bool
    launch_start_checked: bool
    launch_by_hva: bool
    launch_type_checked: bool
    launch_sets_attribute: bool
    launch_failure: LaunchFailure
    cpuid_page_returned: bool
    host_data_passed: bool

    # What the guest asks for.
    map_gpa_needs_private: bool
    ghcb_must_map: bool
    snp_requests_guarded: bool
    psc_msr_run_fails: bool
    psc_result_told: bool
    requests_bounced: bool
    request_errors_are_status: bool
    certificates: Certificates
    certificates_always: bool
    requests_throttled: bool
    hypervisor_features: int
    vmsa_features: SevFeatures
    run_vmpl: bool
    ap_creation_error_gp: bool
    ap_destroy_needs_rax: bool
    ap_creation_vmpl: bool
    vmsa_per_vmpl: bool
    hv_doorbell: bool

    def __repr__(self) -> str:
        return f"Era({self.name!r})"

    @property
    def ops(self) -> Mapping[int, SevOp]:
        """The sub-commands of KVM_MEMORY_ENCRYPT_OP by number."""
        return {**LEGACY_OPS, **self.snp_ops}

    def op_id(self, op: SevOp) -> int:
        """The number of a sub-command; `KeyError` where this era lacks it."""
        return {each: number for number, each in self.ops.items()}[op]

    @property
    def payloads(self) -> Mapping[SevOp, Layout]:
        """The structure of each sub-command that takes one."""
        return {**LEGACY_PAYLOADS, **self.snp_payloads}

    @property
    def psp_commands(self) -> Mapping[int, PspCommand]:
        """The sub-commands of SEV_ISSUE_CMD by number."""
        return {**COMMANDS, **self.snp_psp_commands}


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "guest-request-throttling": {"requests_throttled": True},
    "certificate-exit": {"certificates": Certificates.USERSPACE, "snp_ops": REQ_CERTS_OPS},
}
"""What kernels after 6.12 brought (throttling: unconfirmed), by name: attributes that it changes."""


@cache
def era(name: str, *options: str) -> Era:
    """The kernel of that name, with later options. `ValueError` names what there is."""
    if name not in NAMES:
        raise ValueError(f"era {name!r} is not modelled: one of {', '.join(NAMES)}")
    result = Era(name, **{row.name: row.values[name] for row in DIFFERENCES})
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"no option {option!r}: one of {', '.join(OPTIONS)}")
        if name == "rfc-v7":
            raise ValueError(f"option {option!r} came after mainline: {name} does not have it")
        result = replace(result, **OPTIONS[option])
    return result
