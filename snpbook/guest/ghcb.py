"""The guest's half of the GHCB: one shared page through which it asks its hypervisor.

Nothing that comes back is trusted beyond what its use can bear. A malformed answer or a refusal ends the
guest with a termination request. Source: GHCB specification; Linux arch/x86/coco/sev.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import GHCB, MsrCode, Nae
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SIZE


class Reason(IntEnum):
    """Reason codes of a termination request, set 1 as Linux uses it (set 0 is the specification's)."""

    REGISTER = 0
    PSC = 1
    PVALIDATE = 2
    NOT_VMPL0 = 3
    CPUID = 4
    CPUID_HV = 5
    SECRETS_PAGE = 6


LINUX_SET = 1


class Terminated(ProgramFailure):
    """The guest gave up; `reason` is what it told the hypervisor. Where that runs it again, it just halts."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name}: {detail}")
        self.reason = reason


async def terminate(cpu: GuestCpu, reason: Reason, detail: str) -> None:
    """Ask to be ended, and never come back."""
    value = spec.TERMINATE.pack(code=MsrCode.TERMINATE, reason_set=LINUX_SET, reason=reason)
    await msr_request(cpu, int.from_bytes(value, "little"))
    raise Terminated(reason, detail)


async def msr_request(cpu: GuestCpu, value: int) -> int:
    """One round of the MSR protocol."""
    await cpu.wrmsr(Msr.GHCB, value)
    await cpu.vmgexit()
    answer: int = await cpu.rdmsr(Msr.GHCB)
    return answer


@dataclass(frozen=True, slots=True)
class Ghcb:
    """The registered GHCB page at guest address `gpa`, mapped shared."""

    cpu: GuestCpu
    gpa: int

    @classmethod
    async def register(cls, cpu: GuestCpu, gpa: int) -> Ghcb:
        """Negotiate the protocol and register the page; terminates where the hypervisor is too old."""
        info = spec.SEV_INFO.unpack((await msr_request(cpu, MsrCode.SEV_INFO_REQUEST)).to_bytes(8, "little"))
        if info.code != MsrCode.SEV_INFO or not info.min_version <= spec.PROTOCOL_VERSION <= info.max_version:
            await terminate(cpu, Reason.REGISTER, f"GHCB versions {info.min_version} to {info.max_version}")
        features = await msr_request(cpu, MsrCode.FEATURES_REQUEST)
        if features & spec.MSR_CODE_MASK != MsrCode.FEATURES or not features >> spec.MSR_DATA_SHIFT & spec.FEATURE_SNP:
            await terminate(cpu, Reason.REGISTER, f"hypervisor features {features:#x} lack SNP")
        answer = await msr_request(cpu, gpa | MsrCode.REGISTER_GPA_REQUEST)
        if answer != gpa | MsrCode.REGISTER_GPA:
            await terminate(cpu, Reason.REGISTER, f"GHCB registration answered {answer:#x}")
        return cls(cpu, gpa)

    async def call(self, event: Nae, info1: int = 0, info2: int = 0, **fields: Any) -> Record:
        """Report an event; the GHCB as the hypervisor left it. Terminates on SW_EXITINFO1 != 0.

        The page is where the guest put it, never where the MSR says: the hypervisor can write the MSR's value.
        """
        filled = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", *(name for name in fields if name in _IN_BITMAP))
        page = GHCB.pack(
            sw_exit_code=event,
            sw_exit_info_1=info1,
            sw_exit_info_2=info2,
            valid_bitmap=spec.valid_bitmap(*filled),
            protocol_version=spec.PROTOCOL_VERSION,
            **fields,
        )
        await self.cpu.write(self.gpa, page)
        await self.cpu.wrmsr(Msr.GHCB, self.gpa)
        await self.cpu.vmgexit()
        answer = GHCB.unpack(await self.cpu.read(self.gpa, PAGE_SIZE))
        if answer.sw_exit_info_1:
            await terminate(self.cpu, Reason.REGISTER, f"{event.name} refused: {answer.sw_exit_info_2:#x}")
        return answer

    async def port_in(self, port: int) -> int:
        """IN AL, port."""
        info = spec.IOIO.pack(port=port, is_in=1, size_8=1)
        answer = await self.call(Nae.IOIO, int.from_bytes(info, "little"), rax=0)
        if not spec.is_valid(answer.valid_bitmap, "rax"):
            await terminate(self.cpu, Reason.REGISTER, f"the answer to a read of port {port:#x} has no RAX")
        value: int = answer.rax & 0xFF
        return value

    async def port_out(self, port: int, value: int) -> None:
        """OUT port, AL."""
        info = spec.IOIO.pack(port=port, size_8=1)
        await self.call(Nae.IOIO, int.from_bytes(info, "little"), rax=value)

    @property
    def shared_buffer(self) -> int:
        """Guest address of the buffer inside the page."""
        return self.gpa + spec.SHARED_BUFFER_OFFSET


_IN_BITMAP = {
    field.name for field in GHCB.fields.values() if field.offset < GHCB.offset("valid_bitmap") and field.size == 8
}
