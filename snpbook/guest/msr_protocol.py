"""The GHCB MSR protocol: requests and answers of one register, for a guest that has no GHCB page yet.

Only these functions give the GHCB MSR a request. An answer is read once; one of another code, or with bits where
there must be none, ends the guest with the reason that Linux gives. Sources: GHCB specification; Linux
asm/sev-common.h, arch/x86/coco/sev/shared.c.
"""

from __future__ import annotations

from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import ghcb as spec
from snpbook.spec.cpuid import Registers
from snpbook.spec.ghcb import MSR_CODE_MASK, MSR_DATA_SHIFT, PSC_ENTRY, MsrCode, PageOperation
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.termination import GeneralReason, Reason

_WORD = 8
_UPPER = 32


async def request(cpu: GuestCpu, value: int) -> int:
    """One round: the value that the hypervisor left in the MSR."""
    await cpu.wrmsr(Msr.GHCB, value)
    await cpu.vmgexit()
    answer: int = await cpu.rdmsr(Msr.GHCB)
    return answer


async def sev_information(cpu: GuestCpu) -> Record:
    """Versions of the protocol and the C-bit's place as the hypervisor tells them; terminates for another answer."""
    info = spec.SEV_INFO.unpack((await request(cpu, MsrCode.SEV_INFO_REQUEST)).to_bytes(_WORD, "little"))
    if info.code != MsrCode.SEV_INFO:
        await terminate(cpu, GeneralReason.PROTOCOL, f"the answer to SEV information has code {info.code:#x}")
    return info


async def negotiate(cpu: GuestCpu) -> int:
    """The highest version of the protocol that both sides know."""
    info = await sev_information(cpu)
    version: int = min(info.max_version, spec.PROTOCOL_VERSION)
    if not max(info.min_version, spec.PROTOCOL_MINIMUM) <= version:
        await terminate(cpu, GeneralReason.PROTOCOL, f"GHCB versions {info.min_version} to {info.max_version}")
    return version


async def features(cpu: GuestCpu) -> int:
    """The bitmap of the hypervisor's features, which version 2 brings; terminates without SNP among them."""
    answer = await request(cpu, MsrCode.FEATURES_REQUEST)
    found = answer >> MSR_DATA_SHIFT
    if answer & MSR_CODE_MASK != MsrCode.FEATURES or not found & spec.FEATURE_SNP:
        await terminate(cpu, GeneralReason.SNP_FEATURES, f"hypervisor features {answer:#x} lack SNP")
    return found


async def preferred_gpa(cpu: GuestCpu) -> int | None:
    """Where the hypervisor would like the GHCB; None where it does not mind."""
    answer = await request(cpu, MsrCode.PREFERRED_GPA_REQUEST)
    if answer & MSR_CODE_MASK != MsrCode.PREFERRED_GPA:
        await terminate(cpu, GeneralReason.GENERAL, f"the answer about a preferred GHCB is {answer:#x}")
    gfn = answer >> MSR_DATA_SHIFT
    return None if gfn == spec.GFN_NONE else gfn << PAGE_SHIFT


async def register(cpu: GuestCpu, gpa: int) -> None:
    """Register the GHCB page; the hypervisor must name the very same."""
    answer = await request(cpu, gpa | MsrCode.REGISTER_GPA_REQUEST)
    if answer != gpa | MsrCode.REGISTER_GPA:
        await terminate(cpu, Reason.REGISTER, f"GHCB registration answered {answer:#x}")


async def cpuid(cpu: GuestCpu, leaf: int) -> Registers:
    """The four registers of a leaf's subleaf 0, one round each."""
    found = []
    for number in range(len(Registers._fields)):
        question = spec.MSR_CPUID.pack(code=MsrCode.CPUID_REQUEST, register=number, value=leaf)
        answer = await request(cpu, int.from_bytes(question, "little"))
        told = spec.MSR_CPUID.unpack(answer.to_bytes(_WORD, "little"))
        between = answer & (1 << spec.MSR_CPUID.fields["register"].lo) - 1
        if between != MsrCode.CPUID or told.register != number:
            await terminate(cpu, Reason.CPUID_HV, f"CPUID {leaf:#x} answered {answer:#x}")
        found.append(told.value)
    return Registers(*found)


async def change_page(cpu: GuestCpu, gfn: int, operation: PageOperation) -> None:
    """Ask for one page of 4 KB to become private or shared."""
    entry = int.from_bytes(PSC_ENTRY.pack(gfn=gfn, operation=operation), "little")
    answer = await request(cpu, entry | MsrCode.PAGE_STATE_REQUEST)
    if answer != MsrCode.PAGE_STATE:
        await terminate(cpu, Reason.PSC, f"page {gfn:#x}: {answer:#x}")


async def ap_reset_hold(cpu: GuestCpu) -> bool:
    """Wait to be started; whether a SIPI came."""
    answer = await request(cpu, MsrCode.AP_RESET_HOLD_REQUEST)
    if answer & MSR_CODE_MASK != MsrCode.AP_RESET_HOLD:
        await terminate(cpu, GeneralReason.GENERAL, f"AP reset hold answered {answer:#x}")
    return answer >> MSR_DATA_SHIFT != 0


async def run_vmpl(cpu: GuestCpu, vmpl: int) -> bool:
    """Have another VMPL run; whether the hypervisor says that it did."""
    question = int.from_bytes(spec.MSR_RUN_VMPL.pack(code=MsrCode.RUN_VMPL_REQUEST, vmpl=vmpl), "little")
    answer = await request(cpu, question)
    return answer & MSR_CODE_MASK == MsrCode.RUN_VMPL and not answer >> _UPPER
