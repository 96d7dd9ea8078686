"""What a person reads of the kernel under /proc and /sys: made when it is read, from what the kernel is now.

Paths and forms are Linux's; only what concerns memory encryption is there. Sources: Linux fs/proc, kernel/params.c,
kernel/cgroup/misc.c, drivers/iommu/amd/init.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.host.modules import shown
from snpbook.spec.cpuid import SevCapability

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel

CMDLINE, CPUINFO, CAPACITY = "/proc/cmdline", "/proc/cpuinfo", "/sys/fs/cgroup/misc.capacity"
IOMMU_FEATURES = "/sys/class/iommu/ivhd0/amd-iommu/features"
POST_NOTIFIERS = "/sys/module/kernel/parameters/crash_kexec_post_notifiers"
FLAGS = {
    SevCapability.SME: "sme",
    SevCapability.SEV: "sev",
    SevCapability.SEV_ES: "sev_es",
    SevCapability.SEV_SNP: "sev_snp",
}
"""The names of features in /proc/cpuinfo."""


def parameter(module: str, name: str) -> str:
    """The path of a module's parameter."""
    return f"/sys/module/{module}/parameters/{name}"


def pseudo_files(kernel: Kernel) -> dict[str, str]:
    """Every file there is, by its path."""
    platform = kernel.platform
    flags = " ".join(["svm", *(name for feature, name in FLAGS.items() if feature in platform.features)])
    files = {
        CMDLINE: f"{kernel.cmdline.text}\n",
        CPUINFO: "".join(f"processor\t: {number}\nflags\t\t: {flags}\n\n" for number in kernel.cpu.cores),
        POST_NOTIFIERS: f"{shown(platform.snp and kernel.rows.panic_notifier)}\n",
    }
    for module, values in kernel.modules.items():
        files |= {parameter(module, name): f"{shown(value)}\n" for name, value in values.items()}
    if kernel.sev.capacity is not None:
        files[CAPACITY] = "".join(f"{key} {count}\n" for key, count in kernel.sev.capacity.items())
    if platform.iommu_running:
        files[IOMMU_FEATURES] = f"{kernel.cpu.iommu_features:x}\n"
    return files
