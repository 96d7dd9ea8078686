"""Rows M of the benchmark: both sides do the same work, and what is missing is named."""

from pathlib import Path

import pytest

from snpbook.tools.bench import digest
from snpbook.tools.bench.measure import Comparison, NotMeasurableError

needs_ovmf = pytest.mark.skipif(not Path(digest.OVMF).is_file(), reason="OVMF.fd is not on this machine")


def test_gates() -> None:
    assert [(row.name, str(row.gate)) for row in digest.ROWS] == [
        ("M1", "<= 0.75 time"),
        ("M2", "<= 0.6 time"),
        ("M3", "<= 1.5 time"),
    ]


@needs_ovmf
def test_both_sides_compute_the_same_digest() -> None:
    comparison = digest.ROWS[0].prepare()
    assert isinstance(comparison, Comparison)
    assert comparison.candidate() == comparison.reference()


@needs_ovmf
def test_both_commands_run() -> None:
    comparison = digest.ROWS[2].prepare()
    assert isinstance(comparison, Comparison)
    comparison.reference()
    comparison.candidate()


def test_missing_firmware_is_named() -> None:
    with pytest.raises(NotMeasurableError, match="apt install ovmf"):
        digest.digest("/nowhere/OVMF.fd")
