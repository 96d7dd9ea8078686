"""Parameters of the kernel and of its modules, as far as they decide on memory encryption or stand on most hosts.

Sources: Linux 6.12 Documentation/admin-guide/kernel-parameters.txt, arch/x86/kvm/svm, drivers/crypto/ccp,
drivers/iommu; the option lists of `iommu` and `amd_iommu` are those that their parsers know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KERNEL_PARAMETERS = frozenset([
    "amd_iommu", "console", "crashkernel", "init", "iommu", "iommu.passthrough", "iommu.strict", "loglevel",
    "mem_encrypt", "nokaslr", "panic", "quiet", "ro", "root", "rootflags", "rw",
])  # fmt: skip
"""Those that this kernel knows; a real one knows hundreds more."""
AMD_IOMMU_OPTIONS = (
    "fullflush", "force_enable", "off", "force_isolation", "pgtbl_v1", "pgtbl_v2", "irtcachedis", "nohugepages",
    "v2_pgsizes_only",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModuleParameter:
    """One parameter: its default tells its type (bool, int or text), `absent` the kernels without it."""

    default: bool | int | str
    meaning: str
    absent: frozenset[str] = frozenset()


MODULES: Mapping[str, Mapping[str, ModuleParameter]] = {
    "kvm": {
        "mmio_caching": ModuleParameter(True, "MMIO is cached in the nested tables; SEV-ES needs it"),
    },
    "kvm_amd": {
        "npt": ModuleParameter(True, "nested paging; SEV needs it"),
        "nrips": ModuleParameter(1, "next RIP saved on an exit; SEV needs it"),
        "lbrv": ModuleParameter(1, "LBR virtualisation; SEV-ES needs it"),
        "sev": ModuleParameter(True, "SEV guests"),
        "sev_es": ModuleParameter(True, "SEV-ES guests"),
        "sev_snp": ModuleParameter(True, "SEV-SNP guests"),
        "debug_swap": ModuleParameter(True, "debug registers of SEV-ES guests are swapped", frozenset(["rfc-v7"])),
    },
    "ccp": {
        "psp_cmd_timeout": ModuleParameter(100, "seconds for a command"),
        "psp_probe_timeout": ModuleParameter(5, "seconds for a command until the first has succeeded"),
        "init_ex_path": ModuleParameter("", "file with the persistent data of SEV, for INIT_EX"),
        "psp_init_on_probe": ModuleParameter(True, "SEV and SEV-ES are initialised at once, not on first use"),
    },
}
"""By module and name. What a parameter reads after the module has loaded is what it decided, not what was asked for."""
