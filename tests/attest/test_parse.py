"""Outer forms of evidence: bytes, hexadecimal text, an extended report with its certificate table."""

import struct
from contextlib import suppress
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.checks import MalformedEvidence
from snpbook.attest.parse import Evidence, Report
from snpbook.spec import guid
from snpbook.spec.report import REPORT_SIZE
from tests.attest.vectors import needs_vectors, real_report, report_file

REPORT = bytes(range(256)) * 4 + bytes(160)


def table(entries: list[tuple[UUID, bytes]], end: bytes = bytes(24)) -> bytes:
    """A certificate table in text order of GUIDs, the blobs behind it."""
    header, blobs, offset = b"", b"", 24 * len(entries) + len(end)
    for identifier, blob in entries:
        header += identifier.bytes + struct.pack("<II", offset + len(blobs), len(blob))
        blobs += blob
    return header + end + blobs


@needs_vectors
def test_hexadecimal_text_is_the_same_report() -> None:
    text = report_file("milan").read_bytes()
    for form in (text, text.lower(), text + b"\r\n", b" ".join([text[:10], text[10:]])):
        assert Evidence.read(form).report == bytes.fromhex(text.decode())
    report = Report.parse(real_report("milan"))
    assert (report.fields.version, report.fields.current_minor, report.product) == (2, 52, None)
    assert Report.parse(real_report("genoa")).product == "genoa"


def test_a_file_of_the_right_length_is_a_report_whatever_it_holds() -> None:
    assert Evidence.read(b"a" * REPORT_SIZE).report == b"a" * REPORT_SIZE


def test_the_table_of_an_extended_request() -> None:
    entries = [(guid.CERT_VCEK, b"vcek"), (guid.CERT_CRL, b"list"), (UUID(int=5), b"?"), (guid.CERT_ARK, b"ark")]
    evidence = Evidence.read(REPORT + table(entries) + bytes(100))
    assert evidence == Evidence(REPORT, (b"vcek", b"ark"))
    assert Evidence.read(REPORT + table([])) == Evidence(REPORT)
    assert Evidence.read((REPORT + table(entries)).hex().encode()).certificates == (b"vcek", b"ark")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        REPORT[:-1],
        REPORT + b"\0",
        REPORT + bytes(23),
        REPORT.hex().encode()[:-1],
        b"0x" + REPORT.hex().encode(),
        b"A text file.\n" * 200,
        REPORT + table([(guid.CERT_ARK, b"ark")], end=b""),
        REPORT + table([(guid.CERT_ARK, b"ark")])[:-1],
        REPORT + table([(guid.CERT_ARK, b"ark"), (guid.CERT_ARK, b"ark")]),
        REPORT + guid.CERT_ARK.bytes + struct.pack("<II", 0, 24) + bytes(24),
        REPORT + guid.CERT_ARK.bytes + struct.pack("<II", 48, 0xFFFFFFFF) + bytes(24),
    ],
)
def test_a_broken_outer_form_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        Report.parse(Evidence.read(data).report)


@given(st.binary(max_size=4000), st.booleans())
def test_no_input_raises_anything_else(data: bytes, behind_a_report: bool) -> None:
    with suppress(MalformedEvidence):
        assert len(Evidence.read(REPORT + data if behind_a_report else data).report) == REPORT_SIZE
