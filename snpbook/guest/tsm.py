"""The attestation directory: reports by reading and writing files, the same for every kind of confidential guest.

An entry keeps its last report until something is written to it. Each write counts; a reader who compares `generation`
before and after knows that nobody else wrote in between. Source: Linux drivers/virt/coco/tsm.c (6.12).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from uuid import UUID

from snpbook.guest.messages import RequestFailed
from snpbook.guest.process import SystemCallFailed
from snpbook.guest.sev_guest import SevGuest
from snpbook.guest.svsm_report import attest
from snpbook.spec import uapi_sev_guest as spec
from snpbook.spec.messages import MessageType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.payloads import REPORT_REQUEST, REPORT_RESPONSE
from snpbook.spec.status import Status

_GENERATIONS = 1 << 64
_SERVICE_PROVIDER = "svsm"
_VERSIONS = (1 << 32) - 1
_REFUSED = (Status.INVALID_PARAM, Status.INVALID_KEY)
"""Statuses that are the user's fault."""


@dataclass(slots=True)
class ReportEntry:
    """One directory: its attributes are the methods. `driver` is None while no provider is registered."""

    driver: SevGuest | None
    _inblob: bytes = b""
    _privlevel: int = 0
    _written: int = 0
    _read: int = 0
    _outblob: bytes = b""
    _auxblob: bytes = b""
    _service_provider: str = ""
    _service_guid: UUID | None = None
    _manifest_version: int = 0
    _manifestblob: bytes = b""

    def write_inblob(self, data: bytes) -> None:
        """What the report is about: at most 64 bytes; EINVAL for more, or none."""
        self._check(0 < len(data) <= spec.TSM_INBLOB_LIMIT, "inblob", f"1 to {spec.TSM_INBLOB_LIMIT} bytes", len(data))
        self._advance()
        self._inblob = bytes(data)

    def write_privlevel(self, level: int) -> None:
        """The VMPL in the report; EINVAL below the floor and above 3."""
        floor = self.privlevel_floor
        self._check(floor <= level < spec.VMPL_LIMIT, "privlevel", f"{floor} to {spec.VMPL_LIMIT - 1}", level)
        self._advance()
        self._privlevel = level

    def write_service_provider(self, name: str) -> None:
        """Who attests: an SVSM, or nobody else (EINVAL)."""
        self._check(name == _SERVICE_PROVIDER, "service_provider", _SERVICE_PROVIDER, name)
        self._advance()
        self._service_provider = name

    def write_service_guid(self, guid: str) -> None:
        """Which of its services, by GUID: the null one for all; EINVAL for what is no GUID."""
        try:
            service = UUID(guid)
        except ValueError:
            raise SystemCallFailed(errno.EINVAL, "service_guid", "a GUID", guid) from None
        self._advance()
        self._service_guid = service if service.int else None

    def write_service_manifest_version(self, version: int) -> None:
        """Which form of the manifest of one service."""
        self._check(0 <= version <= _VERSIONS, "service_manifest_version", f"up to {_VERSIONS}", version)
        self._advance()
        self._manifest_version = version

    @property
    def provider(self) -> str:
        self._provider()
        return spec.TSM_PROVIDER

    @property
    def generation(self) -> int:
        """How often the entry was written to."""
        return self._written

    @property
    def privlevel_floor(self) -> int:
        return self._provider().vmpl

    async def outblob(self) -> bytes:
        """The report. EINVAL before an inblob of 64 bytes, ENXIO without a provider; else the driver's errno."""
        await self._refresh()
        return self._outblob

    async def auxblob(self) -> bytes:
        """The certificate table, empty where the hypervisor gave none."""
        await self._refresh()
        return self._auxblob

    async def manifestblob(self) -> bytes:
        """What an SVSM says of its services, which the report binds; empty without one."""
        await self._refresh()
        return self._manifestblob

    async def _refresh(self) -> None:
        """A new report, unless the last is of this generation."""
        driver = self._provider()
        self._check(bool(self._inblob), "an inblob is written before", "an inblob", "none")
        if self._outblob and self._read == self._written:
            return
        wanted = spec.TSM_INBLOB_SNP
        self._check(len(self._inblob) == wanted, "inblob for SNP", f"{wanted} bytes", len(self._inblob))
        generation = self._written
        if self._service_provider:
            await self._ask_svsm(driver)
            self._read = generation
            return
        pages = spec.CERTIFICATES_LIMIT >> PAGE_SHIFT
        await driver.certificates(pages)
        body = REPORT_REQUEST.pack(report_data=self._inblob, vmpl=self._privlevel)
        answer = await driver.channel.exchange(MessageType.REPORT_REQ, body, certificate_pages=pages)
        told = REPORT_RESPONSE.unpack(answer.ljust(REPORT_RESPONSE.size, b"\0"))
        if told.status != Status.SUCCESS:
            number = errno.EINVAL if told.status in _REFUSED else errno.ENXIO
            raise RequestFailed(number, "MSG_REPORT_REQ is answered", Status.SUCCESS, f"status {told.status:#x}")
        table = await driver.kernel.cpu.read(driver.kernel.place.certificates, pages * PAGE_SIZE)
        self._outblob, self._auxblob, self._read = told.report, table if any(table) else b"", generation

    async def _ask_svsm(self, driver: SevGuest) -> None:
        """A report by the SVSM; EINVAL for a guest without one."""
        area = driver.kernel.channel.area
        if area is None:
            raise SystemCallFailed(errno.EINVAL, "the guest has an SVSM", "VMPL1 to 3", f"VMPL{driver.vmpl}")
        found = await attest(area, driver.buffers, self._inblob, self._service_guid, self._manifest_version)
        self._outblob, self._manifestblob, self._auxblob = found.report, found.manifest, found.certificates

    def _advance(self) -> None:
        """Count a write; EBUSY where the counter would come round to what was last read."""
        if (self._written + 1) % _GENERATIONS == self._read and self._outblob:
            raise SystemCallFailed(errno.EBUSY, "writes since the last read", f"fewer than {_GENERATIONS - 1}")
        self._written = (self._written + 1) % _GENERATIONS

    def _provider(self) -> SevGuest:
        if self.driver is None:
            raise SystemCallFailed(errno.ENXIO, "a provider is registered", spec.TSM_PROVIDER, "none")
        return self.driver

    def _check(self, condition: bool, rule: str, expected: object, found: object) -> None:
        if not condition:
            raise SystemCallFailed(errno.EINVAL, rule, expected, found)
