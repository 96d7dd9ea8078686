"""Hosts that do not come up with SNP: each has one fault, and one change heals it. The exercise that finds it.

The faults are settings of the BIOS, words of the kernel command line and options of modules, nothing else; the kernel's
own log and registers tell them apart. A remedy is judged by booting with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from snpbook.exercises.host_setup import KVM, MIB
from snpbook.exercises.hosts import HostOptions
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.host.kernel import Kernel
from snpbook.host.pseudo_files import parameter
from snpbook.host.refusal import KernelError
from snpbook.spec.cpuid import ADDRESS_SIZES_LEAF, ENCRYPTED_MEMORY_LEAF, SIGNATURE_LEAF, Registers
from snpbook.spec.msr import Msr
from snpbook.spec.products import snp_product_names

HEALTHY = "sev_snp reads Y, the firmware is up"
_MSRS = (Msr.SYSCFG, Msr.HWCR, Msr.TOP_MEM, Msr.TOP_MEM2, Msr.RMP_BASE, Msr.RMP_END)
_LEAVES = (SIGNATURE_LEAF, ADDRESS_SIZES_LEAF, ENCRYPTED_MEMORY_LEAF)
_INNOCENT = ("quiet", "nokaslr", "mem_encrypt=on", "iommu.strict=1", "splash", "loglevel=4", "amd_iommu=fullflush")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong: the `setting` that does it with its bad `value`, and what tells it (`sign`)."""

    setting: str
    value: object
    sign: str


FAULTS: Mapping[str, Fault] = {
    "encryption off": Fault("bios.smee", False, "SYSCFG bit 23 is clear: no feature is left"),
    "SMM open": Fault(
        "bios.smm_lock", False, "the log blames memory encryption, SYSCFG has it on, and HWCR bit 0 is clear"
    ),
    "no table": Fault("bios.snp_coverage", 0, "RMP_BASE is 0: the BIOS has reserved no memory for the table"),
    "short table": Fault("bios.snp_coverage", 256 * MIB, "the table does not reach the last page of memory"),
    "crooked table": Fault(
        "bios.rmp_base", 64 * MIB + (8 << 10), "INVALID_CONFIG (0x3): the table begins at no multiple of 1 MB"
    ),
    "no ASIDs": Fault("bios.min_sev_asid", 1, "EDX of 8000_001F is 1: plain SEV guests have all ASIDs"),
    "no IOMMU": Fault("bios.iommu", False, "no line of AMD-Vi, and no word on the command line that turns it off"),
    "IOMMU without SNP": Fault(
        "bios.nbio_snp", False, "the IOMMU runs and lacks the SNP feature: that is the NBIO's option, not the IOMMU's"
    ),
    "passthrough": Fault("kernel.iommu", "pt", "the default domain type is Passthrough, by the command line"),
    "IOMMU off": Fault("kernel.iommu", "off", "the command line turns the IOMMU off before it could say anything"),
    "AMD IOMMU off": Fault("kernel.amd_iommu", "off", "the command line turns AMD's IOMMU off, in silence"),
    "V2 tables": Fault("kernel.amd_iommu", "pgtbl_v2", "V2 page tables, by the command line"),
    "no nested paging": Fault("kvm_amd.npt", 0, "nested paging is disabled: KVM stops before it reads the ASIDs"),
    "SEV not wanted": Fault("kvm_amd.sev", 0, "all hardware is right and SEV itself is disabled (ASIDs 0 - 0)"),
    "SEV-ES not wanted": Fault("kvm_amd.sev_es", 0, "SEV is enabled and SEV-ES is not, though it has ASIDs"),
    "SNP not wanted": Fault("kvm_amd.sev_snp", 0, "the RMP is enforced, the firmware up, and SEV-SNP alone disabled"),
    "bad value": Fault("kvm_amd.sev_snp", "auto", "the module did not load: `auto' is no truth value"),
}
"""By name. Each alone keeps SNP off."""


def broken_hosts(seed: str) -> dict[str, HostOptions]:
    """A host for each fault, in an order and with innocent words that `seed` draws."""
    random = Random(seed)
    names = random.sample(list(FAULTS), len(FAULTS))
    hosts = {}
    for name in names:
        innocent = random.sample([word for word in _INNOCENT if word.split("=")[0] not in FAULTS[name].setting], 2)
        host = HostOptions(random.choice(snp_product_names()), cmdline=" ".join(["root=/dev/nvme0n1p2 ro", *innocent]))
        hosts[name] = host.changed(FAULTS[name].setting, FAULTS[name].value)
    return hosts


@dataclass(frozen=True, slots=True)
class Findings:
    """What the reader gets of a host: its log by lines, MSRs by name with a value per core, CPUID leaves."""

    dmesg: tuple[str, ...]
    msrs: Mapping[str, tuple[int, ...]]
    cpuid: Mapping[int, Registers]


def findings(kernel: Kernel) -> Findings:
    """What can be found out about a host that has booted."""
    cpu = kernel.cpu
    msrs = {msr.name: tuple(cpu.rdmsr(msr, core) for core in cpu.cores) for msr in _MSRS}
    return Findings(tuple(kernel.log.lines), msrs, {leaf: cpu.product.cpuid(leaf) for leaf in _LEAVES})


def verdict(kernel: Kernel) -> str:
    """Whether a host makes SNP guests, in a line."""
    try:
        reads = kernel.cat(parameter("kvm_amd", "sev_snp")).strip()
    except KernelError:
        return "kvm_amd is not loaded"
    return f"sev_snp reads {reads}, the firmware is {'up' if kernel.ccp.snp_initialised else 'not up'}"


def _broken_cases() -> list[Case]:
    def case(number: int, name: str, host: HostOptions) -> Case:
        found = findings(host.boot())

        def run(answer: Answer) -> object:
            change = answer(found.dmesg, found.msrs, found.cpuid)
            if change is None:
                return None
            try:
                setting, value = change
                return verdict(host.changed(setting, value).boot())
            except (TypeError, ValueError) as error:
                return f"{change!r}: {error}"

        return Case(f"host {number}", run, HEALTHY, FAULTS[name].sign, KVM)

    hosts = broken_hosts("host_setup.4")
    return [case(number, name, host) for number, (name, host) in enumerate(hosts.items(), 1)]


DIAGNOSE_STUB = '''\
def diagnose(dmesg, msrs, cpuid):
    """What to change on this host, and to what: ("bios.smee", True), ("kernel.iommu", None), ..."""
    ...
'''


def diagnose(
    dmesg: tuple[str, ...], msrs: Mapping[str, tuple[int, ...]], cpuid: Mapping[int, tuple[int, ...]]
) -> tuple[str, object]:
    """What to change on this host, and to what: ("bios.smee", True), ("kernel.iommu", None), ..."""
    log = "\n".join(dmesg)
    words = next((line for line in dmesg if line.startswith("Kernel command line")), "").split()
    signs: list[tuple[bool, str, object]] = [
        (not msrs["SYSCFG"][0] >> 23 & 1, "bios.smee", True),
        (not msrs["HWCR"][0] & 1, "bios.smm_lock", True),
        ("not been reserved" in log or "does not cover" in log, "bios.snp_coverage", None),
        ("error 0x3" in log, "bios.rmp_base", None),
        ("invalid for parameter" in log, "kvm_amd.sev_snp", 1),
        ("feature not enabled" in log, "bios.nbio_snp", True),
        ("iommu=pt" in words or "iommu=off" in words, "kernel.iommu", None),
        ("amd_iommu=off" in words or "amd_iommu=pgtbl_v2" in words, "kernel.amd_iommu", None),
        ("IOMMU SNP support enabled" not in log, "bios.iommu", True),
        (cpuid[0x8000001F][3] <= 1, "bios.min_sev_asid", 100),
        ("Nested Paging disabled" in log, "kvm_amd.npt", 1),
        ("SEV disabled" in log, "kvm_amd.sev", 1),
        ("SEV-ES disabled" in log, "kvm_amd.sev_es", 1),
    ]
    return next(((setting, value) for there, setting, value in signs if there), ("kvm_amd.sev_snp", 1))


def _by_the_words(
    dmesg: tuple[str, ...], msrs: Mapping[str, tuple[int, ...]], cpuid: Mapping[int, tuple[int, ...]]
) -> tuple[str, object]:
    if any("IOMMU SNP feature not enabled" in line for line in dmesg):
        return "bios.iommu", True
    return diagnose(dmesg, msrs, cpuid)


def _log_alone(
    dmesg: tuple[str, ...], msrs: Mapping[str, tuple[int, ...]], cpuid: Mapping[int, tuple[int, ...]]
) -> tuple[str, object]:
    return diagnose(dmesg, {**msrs, "HWCR": (1,)}, cpuid)


def _end_of_the_log(
    dmesg: tuple[str, ...], msrs: Mapping[str, tuple[int, ...]], cpuid: Mapping[int, tuple[int, ...]]
) -> tuple[str, object]:
    if any("SEV-ES disabled" in line for line in dmesg):
        return "kvm_amd.sev_es", 1
    return diagnose(dmesg, msrs, cpuid)


DIAGNOSE = register(
    Exercise(
        id="host_setup.4",
        title="A broken host",
        minutes=30,
        difficulty=3,
        prerequisites=("host_setup.1", "host_setup.2"),
        task=(
            f"{len(FAULTS)} hosts do not come up with SNP, each for one reason. You get the log (`dmesg`, lines), "
            "`msrs` (a value per core, by name) and `cpuid` (EAX, EBX, ECX, EDX, by leaf). Return what to change and "
            "to what: bios.* with a field of BiosSetup, kernel.* with a word of the command line, kvm_amd.* with a "
            "parameter of the module; None takes a word away or leaves a place to the BIOS. The host is started with "
            "your change, and must run SNP guests."
        ),
        stub=DIAGNOSE_STUB,
        reference=diagnose,
        wrong=(
            Wrong(_by_the_words, "the NBIO's option, not the IOMMU's"),
            Wrong(_log_alone, "HWCR bit 0 is clear"),
            Wrong(_end_of_the_log, "no multiple of 1 MB"),
        ),
        hints=(
            "Go through the bring-up in its order; the first step that failed explains all later ones. Some failures "
            "leave no line: there the absence of the next line tells.",
            "SMEE and an open SMM leave the same line of ccp: SYSCFG and HWCR tell them apart. An IOMMU that is off "
            "leaves none: look whether the command line did it.",
            "After `IOMMU SNP support enabled.` the platform is fine: what is left are ASIDs (EDX of 8000_001F), the "
            "firmware (error 0x3), and options of kvm_amd, from npt to sev_snp.",
        ),
        solution=(
            "The checklist of this chapter is the same order written as rows. The two traps: the message on the "
            "IOMMU's SNP feature means the NBIO's option, and what the last lines report is mostly a consequence."
        ),
        cases=_broken_cases,
    )
)
