"""Many reports as columns: every column is what the single report says."""

import numpy as np
import pytest

from snpbook.attest.columns import report_columns
from snpbook.attest.parse import Report
from snpbook.spec.report import ATTESTATION_REPORT
from tests.attest.own_chain import CHIP_ID
from tests.attest.vectors import needs_vectors, real_report

PRODUCTS = {
    "milan": (0x19, 0x01), "genoa": (0x19, 0x11), "bergamo": (0x19, 0xA0), "turin": (0x1A, 0x02),
    "unknown": (0x1A, 0x50),
}  # fmt: skip


def reports(count: int) -> list[bytes]:
    """Noise in every named field."""
    source = np.random.default_rng(8)
    made = []
    for index in range(count):
        family, model = list(PRODUCTS.values())[index % len(PRODUCTS)]
        raw = bytearray(source.bytes(ATTESTATION_REPORT.size))
        raw[:4] = (2 + index % 5).to_bytes(4, "little")
        raw[0x188:0x18A] = bytes([family, model])
        made.append(bytes(raw))
    return made


def test_columns_are_what_each_report_says() -> None:
    raws = reports(200)
    columns = report_columns(raws)
    for index, report in enumerate(map(Report.parse, raws)):
        for name, value in report.fields:
            expected = value if name in report.named else 0
            found = columns[name][index]
            assert (found.tobytes() if isinstance(value, bytes) else int(found)) == expected, name
        for word, record in (("policy", report.policy), ("platform_info", report.platform_info)):
            for name, value in record:
                assert columns[f"{word}.{name}"][index] == value
        assert columns["product"][index] == (report.product or "")
        for name in ("current_tcb", "committed_tcb", "reported_tcb", "launch_tcb"):
            tcb = report.tcb(name, report.product)
            for component in ("bootloader", "tee", "snp", "microcode", "fmc"):
                assert columns[f"{name}.{component}"][index] == (getattr(tcb, component) or 0)


@needs_vectors
def test_real_reports() -> None:
    columns = report_columns([real_report("milan"), real_report("genoa"), real_report("milan-debug")])
    assert columns["version"].tolist() == [2, 3, 2]
    assert columns["product"].tolist() == ["", "genoa", ""]
    assert columns["policy.debug"].tolist() == [0, 0, 1]
    assert columns["reported_tcb.microcode"].tolist() == [0x73, 0x54, 0x44]
    assert columns["chip_id"].shape == (3, len(CHIP_ID))


def test_lengths() -> None:
    assert {name: len(column) for name, column in report_columns([]).items() if len(column)} == {}
    with pytest.raises(ValueError, match="report 1 has 3 bytes"):
        report_columns([bytes(ATTESTATION_REPORT.size), b"abc"])
