"""The guest's half of the GHCB: one shared page through which it asks its hypervisor.

An event fills in the fields that it needs and marks no others. Nothing that comes back is trusted beyond what its use
can bear: the page is read once, a field counts only where the bitmap marks it, and a malformed answer ends the guest.
Sources: GHCB specification; Linux arch/x86/coco/sev/shared.c (sev_es_ghcb_hv_call, verify_exception_info).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snpbook.guest import msr_protocol
from snpbook.guest.calling_area import CallingArea
from snpbook.guest.termination import Terminated, terminate
from snpbook.hardware.dram import Bytes
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import GHCB, Nae
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.termination import EVENT_REASON_SHIFT, GENERAL_SET, GeneralReason, Reason
from snpbook.spec.vmcb import EVENT, EventKind, Vector

_INJECTABLE = (Vector.GP, Vector.UD)
_ERROR = (1 << 32) - 1
"""The part of SW_EXITINFO1 that tells of an error."""


@dataclass(frozen=True, slots=True)
class Ghcb:
    """The GHCB page at guest address `gpa`, mapped shared; `version` of the protocol is what both sides know.

    `area` is how a guest above VMPL0 asks its SVSM for what its hypervisor cannot do.
    """

    cpu: GuestCpu
    gpa: int
    version: int = spec.PROTOCOL_VERSION
    area: CallingArea | None = None

    @classmethod
    async def register(cls, cpu: GuestCpu, gpa: int, area: CallingArea | None = None) -> Ghcb:
        """Negotiate the protocol and register the page, as an SNP guest must; terminates where that fails.

        A guest with an SVSM needs a hypervisor that runs several VMPLs.
        """
        version = await msr_protocol.negotiate(cpu)
        if version < spec.PROTOCOL_VERSION:
            await terminate(cpu, GeneralReason.PROTOCOL, f"SNP needs GHCB version {spec.PROTOCOL_VERSION}")
        features = await msr_protocol.features(cpu)
        if area and not features & spec.FEATURE_MULTI_VMPL:
            await terminate(cpu, Reason.NOT_VMPL0, f"hypervisor features {features:#x} lack other VMPLs than 0")
        await msr_protocol.register(cpu, gpa)
        return cls(cpu, gpa, version, area)

    async def call(
        self,
        event: Nae,
        info1: int = 0,
        info2: int = 0,
        *,
        needs: tuple[str, ...] = (),
        reason: Reason | GeneralReason = GeneralReason.GENERAL,
        **fields: Any,
    ) -> Record:
        """Report an event; the GHCB as the hypervisor left it.

        Raises the #GP or #UD that the hypervisor has the guest take. Ends the guest, for `reason`, where it refuses
        otherwise or does not mark SW_EXITINFO1 and 2 and the fields that the event `needs`. The page is where the guest
        put it, never where the MSR says: the hypervisor can write the MSR's value.
        """
        await self.cpu.write(self.gpa, self._request(event, info1, info2, fields))
        await self.cpu.wrmsr(Msr.GHCB, self.gpa)
        await self.cpu.vmgexit()
        return await self._answer(event, await self.cpu.read(self.gpa, PAGE_SIZE), needs, reason)

    async def call_each(
        self, event: Nae, requests: Bytes, done: Bytes, *, reason: Reason | GeneralReason
    ) -> tuple[int, Record]:
        """An event for each of `requests` (n, bytes of the shared buffer), as far as one exit leads.

        How many were served, and the GHCB as the last of them left it; the buffers of those before it begin with `done`
        (n, m). Ends the guest as `call` does.
        """
        page = self._request(event, 0, 0, {"sw_scratch": self.shared_buffer})
        served, answer = await self.cpu.request(self.gpa, page, requests, done)
        return served, await self._answer(event, answer, (), reason)

    def _request(self, event: Nae, info1: int, info2: int, fields: dict[str, Any]) -> bytes:
        """The page with an event's fields, and no others marked."""
        filled = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", *(name for name in fields if name in _IN_BITMAP))
        return GHCB.pack(
            sw_exit_code=event,
            sw_exit_info_1=info1,
            sw_exit_info_2=info2,
            valid_bitmap=spec.valid_bitmap(*filled),
            protocol_version=self.version,
            **fields,
        )

    async def _answer(self, event: Nae, page: bytes, needs: tuple[str, ...], reason: Reason | GeneralReason) -> Record:
        """What the hypervisor has left, checked."""
        answer = GHCB.unpack(page)
        marked = [spec.is_valid(answer.valid_bitmap, name) for name in ("sw_exit_info_1", "sw_exit_info_2", *needs)]
        if not all(marked):
            await terminate(self.cpu, reason, f"the answer to {event.name} has no {', '.join(needs) or 'result'}")
        error = answer.sw_exit_info_1 & _ERROR
        if error == spec.INJECT and event in spec.INSTRUCTION_EVENTS:
            raise await self._exception(event, answer.sw_exit_info_2)
        if error:
            await terminate(self.cpu, reason, f"{event.name} refused: {error:#x}, {answer.sw_exit_info_2:#x}")
        return answer

    async def _exception(self, event: Nae, info2: int) -> GuestException:
        """The exception that the hypervisor wants the guest to take: #GP or #UD, and no other."""
        told = EVENT.unpack(info2.to_bytes(EVENT.size, "little"))
        if not told.valid or told.kind != EventKind.EXCEPTION or told.vector not in _INJECTABLE:
            await terminate(self.cpu, GeneralReason.GENERAL, f"{event.name} answered with event {info2:#x}")
        return GuestException(told.vector, told.error if told.has_error else 0, 0)

    async def features(self) -> int:
        """The bitmap of the hypervisor's features, by the page."""
        answer = await self.call(Nae.FEATURES)
        found: int = answer.sw_exit_info_2
        return found

    async def terminate(self, reason: GeneralReason, info: int, detail: str) -> None:
        """The termination event, with a word of what it was about."""
        await self.call(Nae.TERMINATE, GENERAL_SET | reason << EVENT_REASON_SHIFT, info)
        raise Terminated(reason, detail)

    async def run_vmpl(self, vmpl: int) -> None:
        """Have another VMPL of this vCPU run."""
        await self.call(Nae.RUN_VMPL, vmpl)

    async def nmi_complete(self) -> None:
        """The guest has done with an NMI."""
        await self.call(Nae.NMI_COMPLETE)

    async def ap_reset_hold(self) -> bool:
        """Wait to be started; whether a SIPI came."""
        return bool((await self.call(Nae.AP_RESET_HOLD)).sw_exit_info_2)

    async def set_jump_table(self, gpa: int) -> None:
        """Tell where the AP jump table is (guests before SNP)."""
        await self.call(Nae.AP_JUMP_TABLE, 0, gpa)

    async def jump_table(self) -> int:
        """Where the AP jump table is."""
        found: int = (await self.call(Nae.AP_JUMP_TABLE, 1)).sw_exit_info_2
        return found

    @property
    def shared_buffer(self) -> int:
        """Guest address of the buffer inside the page."""
        return self.gpa + spec.SHARED_BUFFER_OFFSET


_IN_BITMAP = {field.name for field in GHCB.fields.values() if field.offset < GHCB.offset("valid_bitmap")}
