"""What a host looks like from its console: the log, and the registers, flags and files that tell of SNP."""

from html import escape

from snpbook.host.kernel import Kernel
from snpbook.host.pseudo_files import CAPACITY, CMDLINE, CPUINFO, parameter
from snpbook.host.refusal import KernelError
from snpbook.spec.cpuid import ADDRESS_SIZES_LEAF, ENCRYPTED_MEMORY_LEAF, SIGNATURE_LEAF, SevCapability
from snpbook.spec.msr import Msr
from snpbook.views.static import Static
from snpbook.views.tables import table

_MSRS = (Msr.SYSCFG, Msr.HWCR, Msr.TOP_MEM, Msr.TOP_MEM2, Msr.VM_HSAVE_PA)
_RMP_MSRS = (Msr.RMP_BASE, Msr.RMP_END)
_LEAVES = (SIGNATURE_LEAF, ADDRESS_SIZES_LEAF, ENCRYPTED_MEMORY_LEAF)
_PARAMETERS = ("sev", "sev_es", "sev_snp")
_PRE = "white-space:pre-wrap;font-size:13px;line-height:1.35;margin:4px 0"


def dmesg(text: str) -> Static:
    """The kernel's log."""
    return Static(text, f'<pre style="{_PRE}">{escape(text)}</pre>')


def msrs(kernel: Kernel) -> Static:
    """The registers that decide on SNP, as `rdmsr -a` shows them: cores that agree in one row."""
    snp = SevCapability.SEV_SNP in SevCapability(kernel.cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF).eax)
    rows = []
    for msr in (*_MSRS, *(_RMP_MSRS if snp else ())):
        values: dict[int, list[int]] = {}
        for core in kernel.cpu.cores:
            values.setdefault(kernel.cpu.rdmsr(msr, core), []).append(core)
        for value, cores in values.items():
            who = "all cores" if len(cores) == len(kernel.cpu.cores) else f"cores {', '.join(map(str, cores))}"
            rows.append((f"{msr:08X}", msr.name, f"{value:#018x}", who))
    return table("MSRs", ["number", "name", "value", "where"], rows, mono=["number", "value"])


def cpuid(kernel: Kernel) -> Static:
    """The leaves that decide on SNP, as the hardware gives them."""
    rows = [(f"{leaf:08X}", *(f"{value:08x}" for value in kernel.cpu.product.cpuid(leaf))) for leaf in _LEAVES]
    head = ["leaf", "EAX", "EBX", "ECX", "EDX"]
    return table("CPUID", head, rows, mono=head)


def files(kernel: Kernel) -> Static:
    """Flags, parameters and capacities, as the files under /proc and /sys give them."""
    flags = kernel.cat(CPUINFO).split("flags\t\t: ")[1].splitlines()[0]
    rows = [(CMDLINE, kernel.cat(CMDLINE).strip()), (CPUINFO, f"flags: {flags}")]
    paths = [parameter("kvm_amd", name) for name in _PARAMETERS]
    rows += [(path, _text(kernel, path)) for path in (*paths, CAPACITY)]
    return table("Files", [], rows)


def _text(kernel: Kernel, path: str) -> str:
    try:
        return ", ".join(kernel.cat(path).splitlines())
    except KernelError:
        return "no such file"


def state(kernel: Kernel) -> Static:
    """Registers, leaves and files, one table after the other."""
    parts = [msrs(kernel), cpuid(kernel), files(kernel)]
    return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))
