"""Outer forms of evidence: bytes, text, the firmware's answer, an extended report with its table, configfs-tsm."""

import struct
from base64 import b64encode
from contextlib import suppress
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.checks import MalformedEvidence
from snpbook.attest.evidence import Evidence
from snpbook.attest.parse import Report
from snpbook.spec import guid
from snpbook.spec.report import REPORT_SIZE
from tests.attest.vectors import needs_vectors, real_report, report_file

REPORT = bytes(range(256)) * 4 + bytes(160)
TABLE = [(guid.CERT_VCEK, b"vcek"), (guid.CERT_CRL, b"list"), (UUID(int=5), b"?"), (guid.CERT_ARK, b"ark")]


def table(entries: list[tuple[UUID, bytes]], end: bytes = bytes(24)) -> bytes:
    """A certificate table in text order of GUIDs, the blobs behind it."""
    header, blobs, offset = b"", b"", 24 * len(entries) + len(end)
    for identifier, blob in entries:
        header += identifier.bytes + struct.pack("<II", offset + len(blobs), len(blob))
        blobs += blob
    return header + end + blobs


def answer(status: int = 0, size: int = REPORT_SIZE, reserved: bytes = bytes(24)) -> bytes:
    """The header of the firmware's answer."""
    return struct.pack("<II", status, size) + reserved


@needs_vectors
def test_text_is_the_same_report() -> None:
    text = report_file("milan").read_bytes()
    report = bytes.fromhex(text.decode())
    armoured = b64encode(report)
    wrapped = b"\r\n".join(armoured[at : at + 64] for at in range(0, len(armoured), 64)) + b"\n"
    for form in (
        text,
        text.lower(),
        text + b"\r\n",
        b" ".join([text[:10], text[10:]]),
        b"0x" + text,
        armoured,
        wrapped,
    ):
        assert Evidence.read(form).report == report
    assert armoured.endswith(b"=")
    assert set(b"+/") & set(armoured)
    for form in (armoured.rstrip(b"="), armoured.translate(bytes.maketrans(b"+/", b"-_"))):
        assert Evidence.read(form).report == report
    parsed = Report.parse(report)
    assert (parsed.fields.version, parsed.fields.current_minor, parsed.product) == (2, 52, None)
    assert Report.parse(real_report("genoa")).product == "genoa"


def test_a_file_of_the_right_length_is_a_report_whatever_it_holds() -> None:
    assert Evidence.read(b"a" * REPORT_SIZE).report == b"a" * REPORT_SIZE


def test_the_table_of_an_extended_request() -> None:
    evidence = Evidence.read(REPORT + table(TABLE) + bytes(100))
    assert evidence.report == REPORT
    assert dict(evidence.table) == dict(TABLE)
    assert (evidence.certificates, evidence.crls) == ((b"vcek", b"ark"), (b"list",))
    assert Evidence.read(REPORT + table([])) == Evidence(REPORT)
    for form in ((REPORT + table(TABLE)).hex().encode(), b64encode(REPORT + table(TABLE))):
        assert Evidence.read(form).certificates == (b"vcek", b"ark")


def test_behind_the_header_of_the_firmwares_answer() -> None:
    whole = answer() + REPORT
    for form in (whole, whole + bytes(4000 - len(whole)), whole.hex().encode(), b64encode(whole)):
        assert Evidence.read(form) == Evidence(REPORT)
    assert Evidence.read(whole + table(TABLE)).certificates == (b"vcek", b"ark")


def test_a_refused_request_has_no_report() -> None:
    for status, named in ((0x16, "0x16 (INVALID_PARAM)"), (0x27, "0x27"), (0x1234, "0x1234")):
        with pytest.raises(MalformedEvidence) as refusal:
            Evidence.read(answer(status) + bytes(REPORT_SIZE))
        assert named in str(refusal.value)


def test_configfs_tsm() -> None:
    files = {"outblob": REPORT, "auxblob": table(TABLE), "provider": b"sev_guest\n"}
    assert Evidence.read_tsm(files).certificates == (b"vcek", b"ark")
    assert Evidence.read_tsm({"outblob": REPORT}) == Evidence(REPORT)
    assert Evidence.read_tsm({"outblob": REPORT, "auxblob": b""}) == Evidence(REPORT)
    for broken, named in (
        ({**files, "provider": b"tdx_guest\n"}, "tdx_guest"),
        ({"auxblob": table(TABLE)}, "no outblob"),
        ({**files, "outblob": answer() + REPORT}, "1216 bytes"),
        ({**files, "auxblob": bytes(10)}, "no certificate table"),
    ):
        with pytest.raises(MalformedEvidence, match=named):
            Evidence.read_tsm(broken)


MALFORMED = {
    "nothing": b"",
    "text": b"short",
    "cut": REPORT[:-1],
    "a byte too many": REPORT + b"\0",
    "half an entry": REPORT + bytes(23),
    "odd digits": REPORT.hex().encode()[:-1],
    "a prefix twice": b"0x0x" + REPORT.hex().encode(),
    "padding twice": b64encode(REPORT) + b"=",
    "cut base64": b64encode(REPORT)[:-2],
    "short base64": b64encode(REPORT[:-3]),
    "a text file": b"A text file.\n" * 200,
    "digits with colons": REPORT.hex(":").encode(),
    "a table without entries": REPORT + bytes(48) + b"something else",
    "no end": REPORT + table([(guid.CERT_ARK, b"ark")], end=b""),
    "a blob cut": REPORT + table([(guid.CERT_ARK, b"ark")])[:-1],
    "twice": REPORT + table([(guid.CERT_ARK, b"ark"), (guid.CERT_ARK, b"ark")]),
    "no GUID": REPORT + bytes(16) + struct.pack("<II", 48, 0) + bytes(24),
    "into the header": REPORT + guid.CERT_ARK.bytes + struct.pack("<II", 0, 24) + bytes(24),
    "far away": REPORT + guid.CERT_ARK.bytes + struct.pack("<II", 48, 0xFFFFFFFF) + bytes(24),
    "one blob for two": REPORT
    + guid.CERT_ARK.bytes + struct.pack("<II", 72, 99) + guid.CERT_ASK.bytes + struct.pack("<II", 72, 99) + bytes(123),
    "an answer of another size": answer(size=0x4A1) + REPORT,
    "an answer with reserved bytes": answer(reserved=bytes(23) + b"\1") + REPORT,
    "an answer cut": answer() + REPORT[:-1],
}  # fmt: skip


def test_text_that_is_no_encoding_is_called_so() -> None:
    for text in (REPORT.hex(":").encode(), b"A text file.\n" * 200):
        with pytest.raises(MalformedEvidence, match="neither hexadecimal nor base64"):
            Evidence.read(text)
    assert Evidence.read(b"\xef\xbb\xbf" + REPORT.hex().encode()).report == REPORT


@pytest.mark.parametrize("name", MALFORMED)
def test_a_broken_outer_form_is_malformed(name: str) -> None:
    with pytest.raises(MalformedEvidence):
        Report.parse(Evidence.read(MALFORMED[name]).report)


@given(st.binary(max_size=4000), st.booleans())
def test_no_input_raises_anything_else(data: bytes, behind_a_report: bool) -> None:
    with suppress(MalformedEvidence):
        assert len(Evidence.read(REPORT + data if behind_a_report else data).report) == REPORT_SIZE
