"""Evidence as it comes: a report in bytes, hexadecimal or base64 text, with what stands around it.

That is the certificate table of an extended request, the header of the firmware's answer, or the files of Linux'
configfs-tsm. Only the outer form is judged here. Sources: GHCB (extended guest request), SNP ABI (MSG_REPORT_RSP),
Linux (sev-guest driver, configfs-tsm).
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from uuid import UUID

from snpbook.attest.checks import MalformedEvidence
from snpbook.spec import guid
from snpbook.spec.payloads import REPORT_RESPONSE
from snpbook.spec.report import CERT_TABLE_ENTRY, REPORT_SIZE
from snpbook.spec.status import Status

CERTIFICATES = (guid.CERT_VCEK, guid.CERT_VLEK, guid.CERT_ASK, guid.CERT_ARK)
"""The entries of a certificate table that are certificates."""
TSM_PROVIDER = b"sev_guest"
_SPACE = b" \t\r\n"
_HEX = b"0123456789abcdefABCDEF" + _SPACE
_BASE64 = b"GHIJKLMNOPQRSTUVWXYZghijklmnopqrstuvwxyz+/-_=" + _HEX
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_HEX_PREFIXES = (b"0x", b"0X")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TEXT = bytes(range(ord(" "), ord("~") + 1)) + _SPACE
_ANSWER_HEADER = REPORT_RESPONSE.offset("report")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a file of evidence holds: the report's bytes, and the entries of its certificate table by GUID."""

    report: bytes
    table: Mapping[UUID, bytes] = field(default_factory=dict)

    @property
    def certificates(self) -> tuple[bytes, ...]:
        """The certificates of the table (DER)."""
        return tuple(blob for identifier, blob in self.table.items() if identifier in CERTIFICATES)

    @property
    def crls(self) -> tuple[bytes, ...]:
        """The revocation list of the table (DER), if it has one."""
        return tuple(blob for identifier, blob in self.table.items() if identifier == guid.CERT_CRL)

    @classmethod
    def read(cls, data: bytes) -> Evidence:
        """Take a file apart; `MalformedEvidence` where it is none of the forms above."""
        data = _binary(data)
        if len(data) == REPORT_SIZE:
            return cls(data)
        if len(data) > REPORT_SIZE and _is_answer(data):
            return cls._read_answer(data)
        if len(data) < REPORT_SIZE:
            raise MalformedEvidence(f"{len(data)} bytes are no attestation report: it has {REPORT_SIZE}")
        return cls(data[:REPORT_SIZE], read_table(data[REPORT_SIZE:]))

    @classmethod
    def read_tsm(cls, files: Mapping[str, bytes]) -> Evidence:
        """The files of one configfs-tsm report by name: `outblob`, and `auxblob` and `provider` where they exist."""
        provider = files.get("provider", TSM_PROVIDER).strip()
        if provider != TSM_PROVIDER:
            raise MalformedEvidence(f"provider is {provider[:32]!r}, and only {TSM_PROVIDER!r} makes these reports")
        if "outblob" not in files:
            raise MalformedEvidence("there is no outblob: it holds the report")
        report, auxblob = files["outblob"], files.get("auxblob", b"")
        if len(report) != REPORT_SIZE:
            raise MalformedEvidence(f"outblob: {len(report)} bytes are no attestation report: it has {REPORT_SIZE}")
        return cls(report, read_table(auxblob) if auxblob else {})

    @classmethod
    def _read_answer(cls, data: bytes) -> Evidence:
        if len(data) < REPORT_RESPONSE.size:
            size = REPORT_RESPONSE.size
            raise MalformedEvidence(f"the firmware's answer is cut: {len(data)} bytes, and it has {size}")
        answer = REPORT_RESPONSE.unpack(data)
        if answer.status:
            name = f" ({Status(answer.status).name})" if answer.status in Status._value2member_map_ else ""
            raise MalformedEvidence(f"the firmware refused the request with status {answer.status:#04x}{name}")
        if answer.report_size != REPORT_SIZE or REPORT_RESPONSE.reserved_set(data):
            raise MalformedEvidence(f"the header of the firmware's answer is broken: {data[:_ANSWER_HEADER].hex()}")
        rest = data[REPORT_RESPONSE.size :]
        return cls(answer.report, read_table(rest) if any(rest) else {})


def _is_answer(data: bytes) -> bool:
    """Two of three: status 0, a report's size, reserved bytes zero. A report has version, SVN and policy there."""
    header = data[:_ANSWER_HEADER].ljust(REPORT_RESPONSE.size, b"\0")
    answer = REPORT_RESPONSE.unpack(header)
    signs = (answer.status == 0, answer.report_size == REPORT_SIZE, not REPORT_RESPONSE.reserved_set(header))
    return bool(sum(signs) >= len(signs) - 1)


def read_table(table: bytes) -> Mapping[UUID, bytes]:
    """The entries of a certificate table, whatever they are: headers up to one of zeros, then what they point to."""
    bounds: dict[UUID, tuple[int, int]] = {}
    for at in range(0, len(table) - CERT_TABLE_ENTRY.size + 1, CERT_TABLE_ENTRY.size):
        entry = CERT_TABLE_ENTRY.unpack(table, at)
        identifier = UUID(bytes=entry.guid)
        if not identifier.int:
            if entry.offset or entry.length:
                raise MalformedEvidence(f"the certificate table has an entry without a GUID at byte {at}")
            break
        if identifier in bounds:
            raise MalformedEvidence(f"the certificate table has two entries {identifier}")
        bounds[identifier] = entry.offset, entry.offset + entry.length
    else:
        raise MalformedEvidence(f"the {len(table)} bytes around the report's {REPORT_SIZE} are no certificate table")
    if not bounds and any(table):
        raise MalformedEvidence(f"the {len(table)} bytes around the report's {REPORT_SIZE} begin with no table entry")
    pointed = 0
    for identifier, (start, end) in bounds.items():
        if start < at + CERT_TABLE_ENTRY.size or end > len(table):
            raise MalformedEvidence(f"entry {identifier} points out of the certificate table")
        pointed += end - start
    if pointed > len(table):
        raise MalformedEvidence(f"the entries of the certificate table hold {pointed} bytes, and it has {len(table)}")
    return MappingProxyType({identifier: table[start:end] for identifier, (start, end) in bounds.items()})


def _binary(data: bytes) -> bytes:
    """Text decoded; bytes as they are. A file of exactly a report's length is a report whatever it holds.

    Hexadecimal digits may begin with 0x; base64 is of either alphabet, with its padding or without. A byte order mark
    may stand before either.
    """
    if len(data) == REPORT_SIZE:
        return data
    written = data.removeprefix(_BYTE_ORDER_MARK)
    if written.strip(_BASE64):
        if not written.strip(_TEXT):
            raise MalformedEvidence("this is text, and neither hexadecimal nor base64")
        return data
    text = written.translate(_URL_SAFE, _SPACE)
    digits = text[2:] if text.startswith(_HEX_PREFIXES) else text
    is_hex = not digits.strip(_HEX)
    try:
        if is_hex:
            return bytes.fromhex(digits.decode("ascii"))
        body = text.rstrip(b"=")
        return b64decode(text if body != text else body + b"=" * (-len(body) % 4), validate=True)
    except ValueError as error:
        raise MalformedEvidence(f"the {'hexadecimal' if is_hex else 'base64'} text is broken: {error}") from error
