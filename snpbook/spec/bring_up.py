"""How Linux brings SNP up: the lines of its log word for word, and what one kernel decides otherwise than another.

A line with braces is a format. `BRING_UP` has a row for each kernel of `snpbook.spec.eras`; what stands outside it is
the same in all. Sources: Linux 6.12 arch/x86/kernel/cpu/amd.c, arch/x86/virt/svm/sev.c, drivers/iommu/amd/init.c,
drivers/crypto/ccp, arch/x86/kvm/svm; RFC v7 patches 14, 25, 36 and Linux 6.1 below them; logs of real hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snpbook.spec.msr import SYSCFG_MFDM, SYSCFG_SNP_EN, SYSCFG_VMPL_EN

FIRST_SNP_FAMILY = 0x19
V7_LAST_MODEL = 0xAF
"""The series knows the RMP's format on family 19h up to this model, later kernels from the family on."""
SNP_ENABLE_BITS = SYSCFG_SNP_EN | SYSCFG_VMPL_EN
SYSCFG_ENFORCING = SYSCFG_MFDM | SNP_ENABLE_BITS
"""What every core has set once the RMP is enforced."""
SNP_API = (1, 51)
"""The oldest firmware that the driver initialises SNP on."""

# arch/x86/kernel/cpu/amd.c, arch/x86/virt/svm/sev.c
RMP_ABSENT = "SEV-SNP: Memory for the RMP table has not been reserved by BIOS"
RMP_INVALID = "SEV-SNP: RMP configuration not valid: base={base:#x}, end={end:#x}"
RMP_SHORT = (
    "SEV-SNP: Memory reserved for the RMP table does not cover full system RAM (expected 0x{need:x} got 0x{size:x})"
)
E820_RESERVED = "SEV-SNP: Reserving start/end of RMP table on a 2MB boundary [0x{block:016x}]"

# init/main.c, kernel/params.c, kernel/module/main.c
COMMAND_LINE = "Kernel command line: {text}"
UNKNOWN_PARAMETERS = 'Unknown kernel command line parameters "{names}", will be passed to user space.'
MALFORMED_OPTION = "Malformed early option '{name}'"
UNKNOWN_MODULE_PARAMETER = "{module}: unknown parameter '{name}' ignored"
BAD_MODULE_PARAMETER = "{module}: `{value}' invalid for parameter `{name}'"

# drivers/iommu
DOMAIN_TYPE = "iommu: Default domain type: {kind}{why}"
TRANSLATED, PASSTHROUGH, BY_COMMAND_LINE = "Translated", "Passthrough", " (set via kernel command line)"
UNKNOWN_AMD_IOMMU = "AMD-Vi: Unknown option - '{option}'"

# drivers/crypto/ccp
PSP_DEVICE = "ccp 0000:22:00.1"
"""The driver and the PCI address of the secure processor, as on one real Milan host; other boards have others."""
SEV_ENABLED, PSP_ENABLED = "sev enabled", "psp enabled"
NO_SEV = "SEV: memory encryption not enabled by BIOS"
SNP_VERSION = "SEV-SNP API:{major}.{minor} build:{build}"
COMMAND_TIMED_OUT = "sev command {command:#x} timed out, disabling PSP"

# arch/x86/kvm/svm/sev.c
NO_CAPACITY = 0xFFFFFFFF
"""What `%u` prints of -1: the last ASID of SEV-ES where KVM stopped before it had read the bounds."""


@dataclass(frozen=True, slots=True)
class BringUp:
    """One kernel. An empty line is a failure that it does not mention."""

    rmp_first: bool
    """It looks for the table before the IOMMU, when the boot CPU is identified, and refuses an end below the base."""
    rmp_range: str
    rmp_not_mapped: str
    covers_addresses: bool
    """The table must reach the last address of RAM; otherwise it counts pages of RAM, whatever holes lie between."""
    aligns_e820: bool
    """It says that the 2 MB around an end of the table that is not aligned are reserved."""
    iommu_off: str
    """`iommu=off`."""
    iommu_absent: str
    """No IVRS table, or `amd_iommu=off`."""
    iommu_passthrough: str
    iommu_v2: str
    v2_refused: bool
    """V2 page tables rule SNP out; otherwise they become V1."""
    iommu_no_snp: str
    iommu_on: str
    rmp_failed: str
    panic_notifier: bool
    """A panic shuts SNP down before kdump: crash_kexec_post_notifiers is set."""
    feature_kept: bool
    """The flag of /proc/cpuinfo stays set where SNP fails after the boot CPU was identified."""
    sme_active: str
    psp_at_probe: bool
    """The ccp module initialises the secure processor, and kvm_amd does not ask how that went."""
    versions_apart: bool
    """The driver prints the API once for SNP and once for SEV; otherwise once, under the name of the higher."""
    snp_too_old: str
    snp_failed: str
    sev_without_snp: bool
    """SEV and SEV-ES are initialised also where SNP failed; otherwise that ends it."""
    sev_failed: str
    nested_paging: str
    lbr_virtualisation: str
    sev_ranges: bool
    """kvm_amd prints the ranges of ASIDs, also of what is disabled; otherwise numbers of what is supported."""


_MAINLINE = BringUp(
    rmp_first=True,
    rmp_range="SEV-SNP: RMP table physical range [0x{base:016x} - 0x{end:016x}]",
    rmp_not_mapped="SEV-SNP: Failed to map RMP table",
    covers_addresses=True,
    aligns_e820=True,
    iommu_off="",
    iommu_absent="",
    iommu_passthrough="AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.",
    iommu_v2="AMD-Vi: SNP: IOMMU is configured with V2 page table mode, SNP cannot be supported.",
    v2_refused=True,
    iommu_no_snp="AMD-Vi: SNP: IOMMU SNP feature not enabled, SNP cannot be supported.",
    iommu_on="AMD-Vi: IOMMU SNP support enabled.",
    rmp_failed="AMD-Vi: SNP: RMP initialization failed, SNP cannot be supported.",
    panic_notifier=True,
    feature_kept=True,
    sme_active="Memory Encryption Features active: AMD SME",
    psp_at_probe=False,
    versions_apart=True,
    snp_too_old="",
    snp_failed="SEV-SNP: {command} failed rc {rc}, error {error:#x}",
    sev_without_snp=False,
    sev_failed="SEV: {command} failed {error:#x}, rc {rc}",
    nested_paging="kvm_amd: Nested Paging {state}",
    lbr_virtualisation="kvm_amd: LBR virtualization supported",
    sev_ranges=True,
)
_V7_NO_TRANSLATION = "AMD-Vi: SNP: IOMMU is disabled or configured in passthrough mode, SNP cannot be supported"
BRING_UP: Mapping[str, BringUp] = {
    "rfc-v7": BringUp(
        rmp_first=False,
        rmp_range="SEV-SNP: RMP table physical address [0x{base:016x} - 0x{end:016x}]",
        rmp_not_mapped="SEV-SNP: Failed to map RMP table addr 0x{base:x} size 0x{size:x}",
        covers_addresses=False,
        aligns_e820=False,
        iommu_off=_V7_NO_TRANSLATION,
        iommu_absent="AMD-Vi: SNP: Too late to enable SNP for IOMMU.",
        iommu_passthrough=_V7_NO_TRANSLATION,
        iommu_v2="AMD-Vi: Force to using AMD IOMMU v1 page table due to SNP",
        v2_refused=False,
        iommu_no_snp="",
        iommu_on="AMD-Vi: SNP enabled",
        rmp_failed="",
        panic_notifier=False,
        feature_kept=False,
        sme_active="AMD Memory Encryption Features active: SME",
        psp_at_probe=True,
        versions_apart=False,
        snp_too_old="SEV-SNP support requires firmware version >= 1:51",
        snp_failed="SEV-SNP: failed to INIT error {error:#x}",
        sev_without_snp=True,
        sev_failed="SEV: failed to INIT error {error:#x}, rc {rc}",
        nested_paging="SVM: kvm: Nested Paging {state}",
        lbr_virtualisation="SVM: LBR virtualization supported",
        sev_ranges=False,
    ),
    "mainline": _MAINLINE,
    "svsm-host": _MAINLINE,
}
"""By the names of the eras. Unconfirmed: `Too late` where v7 finds no IOMMU, and the two lines of its kvm_amd."""
