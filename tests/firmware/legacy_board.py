"""A board of which SEV and SEV-ES are used, and the steps of a driver and a hypervisor on it."""

from __future__ import annotations

from typing import Any

from snpbook.firmware.keys import Chip
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.status import Status
from tests.machines import BUFFER, MIB, Board, counting_rng

PAGE, CERT = 4096, 2084
A, B, C, D = (MIB * at for at in (18, 20, 22, 24))
"""Free memory."""
TMR, NV = 40 * MIB, 38 * MIB
PLAIN_ASID, ES_ASID = 110, 2


class LegacyBoard(Board):
    """A board whose kernel turned memory encryption on; `seed` makes it another chip with other randomness."""

    def __init__(self, name: str = "milan", seed: str = "tests", *, sockets: int = 1) -> None:
        super().__init__(name, sockets=sockets)
        self.psp.chip, self.psp.rng = Chip.from_seed(seed, name), counting_rng(seed.encode())
        for core in self.machine.cores:
            core.wrmsr(Msr.SYSCFG, 1 << 23)

    @property
    def api(self) -> tuple[int, int, int]:
        """Version and build as PLATFORM_STATUS tells them."""
        status = self.call(Command.PLATFORM_STATUS)
        return status.api_major, status.api_minor, status.build

    def try_(self, command: Command, **fields: Any) -> tuple[Status, Record]:
        """Issue a command: its status, and its buffer afterwards."""
        layout = BUFFERS[command]
        assert layout is not None
        status = self.send(command, self.put(layout, **fields))
        return status, layout.unpack(self.machine.dram.read(BUFFER, layout.size))

    def call(self, command: Command, **fields: Any) -> Record:
        """Issue a command that must succeed: its buffer afterwards."""
        status, buffer = self.try_(command, **fields)
        assert status is Status.SUCCESS, self.log.events[-1]
        return buffer

    def start(self, **nv: Any) -> LegacyBoard:
        """What a driver does: INIT with SEV-ES, WBINVD, DF_FLUSH."""
        if nv:
            self.ok(Command.INIT_EX, length=0x24, es=1, tmr_paddr=TMR, tmr_len=MIB, **nv)
        else:
            self.ok(Command.INIT, es=1, tmr_paddr=TMR, tmr_len=MIB)
        self.cpu.wbinvd()
        self.ok(Command.DF_FLUSH)
        return self

    def certificates(self) -> tuple[bytes, bytes, bytes, bytes]:
        """PDH, PEK, OCA, CEK."""
        self.ok(
            Command.PDH_CERT_EXPORT, pdh_cert_paddr=A, pdh_cert_len=CERT, cert_chain_paddr=B, cert_chain_len=3 * CERT
        )
        chain = self.machine.dram.read(B, 3 * CERT)
        return self.machine.dram.read(A, CERT), chain[:CERT], chain[CERT : 2 * CERT], chain[2 * CERT :]

    def write(self, address: int, data: bytes) -> int:
        """Put something into memory in the clear: its address."""
        self.machine.dram.write(address, data)
        return address

    def launch(self, policy: int = 0, asid: int = PLAIN_ASID, session: tuple[bytes, bytes] | None = None) -> int:
        """A guest in LUPDATE with an ASID, for an owner's certificate and session or for nobody: its handle."""
        fields: dict[str, Any] = {"policy": policy}
        if session:
            fields |= {"dh_cert_paddr": self.write(A, session[0]), "dh_cert_len": CERT}
            fields |= {"session_paddr": self.write(B, session[1]), "session_len": 0x80}
        handle: int = self.call(Command.LAUNCH_START, **fields).handle
        self.ok(Command.ACTIVATE, handle=handle, asid=asid)
        return handle

    def finish_launch(self, handle: int) -> None:
        """Measure, for nobody to read, and finish."""
        self.ok(Command.LAUNCH_MEASURE, handle=handle, paddr=D, len=0x30)
        self.ok(Command.LAUNCH_FINISH, handle=handle)

    def plain(self, address: int, size: int, asid: int = PLAIN_ASID) -> bytes:
        """What the guest sees, behind everybody's back."""
        return self.machine.encryption.read(asid, address, size)
