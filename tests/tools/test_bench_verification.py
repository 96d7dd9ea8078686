"""Rows A of the benchmark: both sides work on good evidence, and the first report finds nothing remembered."""

from snpbook.attest.chain import _check_links
from snpbook.tools.bench import verification
from snpbook.tools.bench.measure import Comparison


def test_gates() -> None:
    assert [(row.name, str(row.gate)) for row in verification.ROWS] == [("A1", "<= 1.1 time"), ("A2", "<= 1.25 time")]


def test_both_sides_verify() -> None:
    for row, misses in zip(verification.ROWS, (0, 1), strict=True):
        comparison = row.prepare()
        assert isinstance(comparison, Comparison)
        comparison.reference()
        comparison.candidate()
        before = _check_links.cache_info().misses
        comparison.candidate()
        assert _check_links.cache_info().misses - (0 if misses else before) == misses
