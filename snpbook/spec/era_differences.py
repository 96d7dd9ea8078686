"""What differs between the kernels that a host can be: one table, a row each, with its sources.

`rfc-v7` is the SNP hypervisor series of December 2022 on UPM v10, `mainline` is Linux 6.12.117. `svsm-host` is mainline
and what an SVSM guest needs of its host beyond it: no such kernel is published, so all of that is unconfirmed (MODEL).
How they come up, and what they log of it, is in `snpbook.spec.bring_up`; whatever else is not in the table is the same
in all three. Sources: RFC v7 and v8 letters and patches, UPM v10, Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from snpbook.spec import ghcb
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.uapi_kvm import MEMORY_FAULT_PRIVATE, MEMORY_FAULT_PRIVATE_V10, Cap, Exit, Ioctl, VmType
from snpbook.spec.uapi_psp import MAINLINE_COMMANDS, V7_COMMANDS
from snpbook.spec.uapi_sev import MAINLINE_OPS, MAINLINE_PAYLOADS, V7_OPS, V7_PAYLOADS, SevOp

NAMES = ("rfc-v7", "mainline", "svsm-host")


class PrivateFile(Enum):
    """The kind of file behind private pages."""

    RESTRICTEDMEM = auto()
    """From the system call memfd_restricted: a tmpfs file that userspace sizes, then can neither read nor map."""
    GUEST_MEMFD = auto()
    """From KVM_CREATE_GUEST_MEMFD: of a fixed size, belongs to one VM."""


class LaunchFailure(Enum):
    """What SNP_LAUNCH_UPDATE leaves behind when a page fails; the digest keeps what it has got in either case."""

    RANGE_SHARED = auto()
    """The page is reclaimed and all pages of the call become shared again; the cause is the errno. A page that was
    assigned before the call is EFAULT at once, with nothing undone."""
    PAGE_RECLAIMED = auto()
    """The page is reclaimed, those before it stay launched and the structure says where to go on: 0 if there was one,
    EIO for whatever befell the first."""


class DirectMap(Enum):
    """What RMPUPDATE to an assigned page does to the kernel's own mapping of all memory."""

    REMOVED = auto()
    """The page is not present there until it is shared again (set_memory_np)."""
    SPLIT = auto()
    """A large mapping becomes 4 KiB ones for a 4 KiB page and stays so; a 2 MiB page changes nothing."""


class Certificates(Enum):
    """What an extended guest request gives the guest beside the report."""

    BLOB = auto()
    """The VM's own blob (KVM_SEV_SNP_SET_CERTS), else the host's (SNP_SET_EXT_CONFIG)."""
    EMPTY_TABLE = auto()
    """A table of one all-zero entry, 24 bytes."""
    USERSPACE = auto()
    """Whatever the VMM fetches on KVM_EXIT_SNP_REQ_CERTS, once the VM has asked for that exit."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One row: an attribute of `Era`, what it means, its value per era, and where that stands."""

    name: str
    meaning: str
    values: Mapping[str, Any]
    cites: tuple[Cite, ...]
    unconfirmed: bool
    """No source states the value of `svsm-host`; those of the other two have sources."""

    def text(self, era: str) -> str:
        """A value as a person reads it."""
        return _text(self.values[era])


def _text(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ", ".join(f"{_text(key)} {_text(each)}" for key, each in value.items())
        case frozenset():
            return ", ".join(_text(each) for each in sorted(value)) or "none"
        case SevFeatures():
            return " | ".join(each.name or "" for each in value) or "none"
        case Ioctl() | Exit() | Cap():
            return f"{value.name} {value:#x}" if isinstance(value, Ioctl) else f"{value.name} {value:d}"
        case Enum() | Layout():
            return str(value.name)
        case _:
            return str(value)


def _row(
    name: str,
    meaning: str,
    v7: Any,
    mainline: Any,
    *cites: Cite,
    svsm: Any = None,
) -> Difference:
    """A row of the table; without `svsm` the third column is as mainline, with it that column is unconfirmed."""
    third, unconfirmed = (mainline, False) if svsm is None else (svsm, True)
    return Difference(name, meaning, dict(zip(NAMES, (v7, mainline, third), strict=True)), cites, unconfirmed)


def _v7(patches: str) -> Cite:
    return Cite("V7", f"patch {patches}")


_KVM_H = Cite("LINUX", "include/uapi/linux/kvm.h")
_SEV_C = Cite("LINUX", "arch/x86/kvm/svm/sev.c")
_VIRT_SEV_C = Cite("LINUX", "arch/x86/virt/svm/sev.c")
_GMEM_C = Cite("LINUX", "virt/kvm/guest_memfd.c")
_KVM_MAIN_C = Cite("LINUX", "virt/kvm/kvm_main.c")
_UPM = Cite("UPM", "KVM_MEM_PRIVATE and memory attributes")
_FILE = Cite("UPM", "memfd_restricted")

DIFFERENCES: tuple[Difference, ...] = (
    # Numbers and structures.
    _row(
        "private_file", "the file behind private pages",
        PrivateFile.RESTRICTEDMEM, PrivateFile.GUEST_MEMFD, _FILE, _GMEM_C,
    ),
    _row(
        "vm_types", "what KVM_CREATE_VM takes; where there is one type, a capability makes its private memory",
        frozenset({VmType.DEFAULT_VM}), frozenset(VmType), _v7("2"), _KVM_H,
    ),
    _row(
        "capabilities", "capabilities that not every era has",
        frozenset({Cap.MEMORY_ATTRIBUTES_V10, Cap.UNMAPPED_PRIVATE_MEM}),
        frozenset({
            Cap.USER_MEMORY2, Cap.MEMORY_FAULT_INFO, Cap.MEMORY_ATTRIBUTES, Cap.GUEST_MEMFD, Cap.VM_TYPES,
            Cap.PRE_FAULT_MEMORY,
        }),
        _UPM, _v7("2"), _KVM_H,
    ),
    _row(
        "absent_ioctls", "ioctls that another era has and this one does not know",
        frozenset({
            Ioctl.SET_USER_MEMORY_REGION2, Ioctl.SET_MEMORY_ATTRIBUTES, Ioctl.CREATE_GUEST_MEMFD,
            Ioctl.PRE_FAULT_MEMORY,
        }),
        frozenset({Ioctl.GET_SUPPORTED_MEMORY_ATTRIBUTES_V10, Ioctl.SET_MEMORY_ATTRIBUTES_V10}),
        _UPM, _KVM_H,
    ),
    _row(
        "set_private_region", "the ioctl that sets a slot with a private file behind it",
        Ioctl.SET_USER_MEMORY_REGION, Ioctl.SET_USER_MEMORY_REGION2, _UPM, _KVM_H,
    ),
    _row(
        "private_region", "its structure; the two agree in the place of each field",
        structs.USERSPACE_MEMORY_REGION_EXT, structs.USERSPACE_MEMORY_REGION2, _UPM, _KVM_H,
    ),
    _row(
        "set_attributes", "the ioctl that makes pages private or shared",
        Ioctl.SET_MEMORY_ATTRIBUTES_V10, Ioctl.SET_MEMORY_ATTRIBUTES, _UPM, _KVM_H,
    ),
    _row(
        "attributes_partial",
        "setting attributes may stop half-way: it returns 0 and writes back where; otherwise all pages or none",
        True, False, _UPM, _KVM_MAIN_C,
    ),
    _row(
        "memory_fault_exit", "exit reason of an access that the page's attribute forbids",
        Exit.MEMORY_FAULT_V10, Exit.MEMORY_FAULT, _UPM, _KVM_H,
    ),
    _row(
        "memory_fault_private", "flag of that exit for a private access",
        MEMORY_FAULT_PRIVATE_V10, MEMORY_FAULT_PRIVATE, _UPM, _KVM_H,
    ),
    _row(
        "memory_fault_fails", "KVM_RUN fails with EFAULT or EHWPOISON on that exit; otherwise it returns 0",
        False, True, _UPM, _KVM_MAIN_C,
    ),
    _row(
        "psc_exit",
        "exit of a page state change: with the GHCB as it is, for the VMM to parse, or one hypercall per run of pages",
        Exit.VMGEXIT, Exit.HYPERCALL, _v7("46 to 48"), _SEV_C,
    ),
    _row(
        "init_op", "the sub-command that makes a VM an SNP guest",
        SevOp.SNP_INIT, SevOp.INIT2, _v7("37"), _SEV_C,
    ),
    _row(
        "snp_ops", "numbers of the sub-commands beyond those of SEV and SEV-ES",
        V7_OPS, MAINLINE_OPS, _v7("37 to 40, 62"), _KVM_H,
    ),
    _row(
        "snp_payloads", "their structures",
        V7_PAYLOADS, MAINLINE_PAYLOADS, _v7("37 to 40, 62"), _KVM_H,
    ),
    _row(
        "snp_psp_commands", "commands of /dev/sev from number 10 on",
        V7_COMMANDS, MAINLINE_COMMANDS, _v7("31"), Cite("LINUX", "include/uapi/linux/psp-sev.h"),
    ),
    # Private memory and the RMP.
    _row(
        "sev_private_memory", "SEV and SEV-ES guests have private slots as well, pinned page by page on first use",
        True, False, _v7("7 to 12"), _SEV_C,
    ),
    _row(
        "private_pages_zeroed", "a private page is zeroed before a guest gets it",
        False, True, _FILE, _GMEM_C,
    ),
    _row(
        "rmp_at_attributes", "RMP entries change when the attribute is set; otherwise when the page is first used",
        True, False, _v7("5, 55"), _SEV_C,
    ),
    _row(
        "rmp_2m", "private pages may have 2 MiB RMP entries, where the file has huge pages",
        True, False, _v7("55"), _GMEM_C,
    ),
    _row(
        "psmash_retried", "an RMP #NPF repeats PSMASH while the entry is in use",
        False, True, _v7("51"), _SEV_C,
    ),
    _row(
        "rmp_fault_checks_size",
        "an RMP #NPF on a 4 KiB entry counts as spurious; otherwise PSMASH is tried and 2 MiB are unmapped",
        False, True, _v7("51"), _SEV_C,
    ),
    _row(
        "direct_map", "the kernel's own mapping of a page that becomes assigned",
        DirectMap.REMOVED, DirectMap.SPLIT, _v7("17, 18"), _VIRT_SEV_C,
    ),
    _row(
        "host_rmp_fault_handled",
        "an RMP #PF of host userspace splits the mapping, or is SIGBUS; otherwise nothing handles it",
        True, False, _v7("20"), Cite("LINUX", "arch/x86/mm/fault.c"),
    ),
    _row(
        "ghcb_pinned",
        "while the GHCB is mapped nothing is converted, and a GHCB that is an assigned page is refused (EBUSY)",
        True, False, _v7("49"), _SEV_C,
    ),
    _row(
        "private_fault_errors",
        "a private page that cannot be had ends KVM_RUN with its errno; otherwise the guest faults again",
        False, True, _UPM, Cite("LINUX", "arch/x86/kvm/mmu/mmu.c"),
    ),
    # Launch.
    _row(
        "snp_only_snp_ops", "an SNP VM refuses the sub-commands of SEV and SEV-ES (EPERM)",
        False, True, _v7("37, 38"), _SEV_C,
    ),
    _row(
        "launch_start_checked",
        "KVM judges the policy and refuses a second SNP_LAUNCH_START (EINVAL); otherwise the firmware judges, and the"
        " second one forgets the first context",
        False, True, _v7("38"), _SEV_C,
    ),
    _row(
        "launch_by_hva",
        "SNP_LAUNCH_UPDATE takes its pages from the address in the slot's shared memory; otherwise from gfn_start",
        True, False, _v7("39"), _SEV_C,
    ),
    _row(
        "launch_type_checked",
        "KVM refuses page types that userspace may not add (EINVAL); otherwise the firmware judges",
        False, True, _v7("39"), _SEV_C,
    ),
    _row(
        "launch_sets_attribute", "KVM itself makes launched pages private; otherwise they must be so before",
        True, False, _v7("39"), _SEV_C,
    ),
    _row(
        "launch_failure", "what is left when a page of SNP_LAUNCH_UPDATE fails",
        LaunchFailure.RANGE_SHARED, LaunchFailure.PAGE_RECLAIMED, _v7("39"), _SEV_C,
    ),
    _row(
        "cpuid_page_returned", "a CPUID page that the firmware refused goes back to userspace as the firmware wants it",
        False, True, _v7("39"), _SEV_C,
    ),
    _row(
        "host_data_passed", "SNP_LAUNCH_FINISH gives HOST_DATA to the firmware; otherwise it is forgotten",
        False, True, _v7("40"), _SEV_C,
    ),
    # What the guest asks for.
    _row(
        "map_gpa_needs_private",
        "KVM_HC_MAP_GPA_RANGE reaches the VMM for slots with a private file alone, else it is done; otherwise always",
        True, False, _v7("7"), Cite("LINUX", "arch/x86/kvm/x86.c"),
    ),
    _row(
        "ghcb_must_map", "a GHCB that cannot be mapped ends KVM_RUN with EFAULT; otherwise the guest goes on",
        True, False, _v7("44"), _SEV_C,
    ),
    _row(
        "snp_requests_guarded", "other guests are refused what the GHCB protocol has for SNP guests alone",
        False, True, _v7("45, 47, 48"), _SEV_C,
    ),
    _row(
        "psc_msr_run_fails", "for a page state change by MSR, KVM_RUN fails with EPERM beside the exit",
        True, False, _v7("47"), _SEV_C,
    ),
    _row(
        "psc_result_told", "the guest hears how its page state change went; otherwise success, whatever the VMM did",
        False, True, _v7("47, 48"), _SEV_C,
    ),
    _row(
        "requests_bounced",
        "guest requests go through pages of KVM's own; otherwise the guest's response page is the firmware's meanwhile",
        False, True, _v7("52"), _SEV_C,
    ),
    _row(
        "request_errors_are_status",
        "bad addresses of a guest request are told as the firmware's INVALID_PARAM (alignment) and INVALID_ADDRESS;"
        " otherwise as errors of the GHCB",
        True, False, _v7("52"), _SEV_C,
    ),
    _row(
        "certificates", "what an extended guest request brings beside the answer",
        Certificates.BLOB, Certificates.EMPTY_TABLE, _v7("31, 52, 62"), _SEV_C,
    ),
    _row(
        "certificates_always", "it brings that with any message; otherwise with MSG_REPORT_REQ alone",
        True, False, _v7("52"), _SEV_C,
    ),
    _row(
        "requests_throttled", "guest requests that come too fast are answered BUSY",
        False, False, _v7("52"), _SEV_C,
    ),
    _row(
        "hypervisor_features", "features that the GHCB protocol tells the guest",
        ghcb.FEATURE_SNP | ghcb.FEATURE_AP_CREATION, ghcb.FEATURE_SNP | ghcb.FEATURE_AP_CREATION,
        _v7("34, 58"), _SEV_C, Cite("GHCB", "hypervisor features"),
        svsm=ghcb.FEATURE_SNP | ghcb.FEATURE_AP_CREATION | ghcb.FEATURE_RESTRICTED_INJECTION | ghcb.FEATURE_MULTI_VMPL,
    ),
    _row(
        "vmsa_features", "SEV_FEATURES that userspace may ask for",
        SevFeatures(0), SevFeatures.DEBUG_VIRTUALIZATION, _v7("37"), _SEV_C,
        svsm=SevFeatures.DEBUG_VIRTUALIZATION | SevFeatures.RESTRICTED_INJECTION | SevFeatures.ALTERNATE_INJECTION,
    ),
    _row(
        "run_vmpl", "a guest switches VMPL: MSR protocol 0x016 and NAE 0x80000018",
        False, False, _SEV_C, Cite("GHCB", "run VMPL"), svsm=True,
    ),
    _row(
        "ap_creation_error_gp",
        "a refused AP creation stops its target and is a #GP for the caller; otherwise the target is untouched and the"
        " answer an error of the GHCB",
        True, False, _v7("54"), _SEV_C,
    ),
    _row(
        "ap_destroy_needs_rax", "AP creation asks for RAX also where it destroys",
        True, False, _v7("54"), _SEV_C,
    ),
    _row(
        "ap_creation_vmpl", "AP creation takes a VMPL; otherwise one other than 0 is an unknown request",
        False, False, _SEV_C, Cite("GHCB", "SNP AP creation"), svsm=True,
    ),
    _row(
        "vmsa_per_vmpl", "a vCPU has a VMSA for each VMPL; otherwise one",
        False, False, _SEV_C, Cite("GHCB", "run VMPL"), svsm=True,
    ),
    _row(
        "hv_doorbell", "a guest registers a page through which it is interrupted: NAE 0x80000014",
        False, False, _SEV_C, Cite("GHCB", "#HV doorbell page"), svsm=True,
    ),
)  # fmt: skip
