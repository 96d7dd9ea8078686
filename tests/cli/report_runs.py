"""Runs of `snpbook report`, and a folder of evidence for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from snpbook.cli.main import main
from tests.attest.own_chain import OwnChain
from tests.attest.test_certs import pem
from tests.attest.vectors import NOW

CHAIN = OwnChain()
JUNE = ["--now", NOW.isoformat()]


@dataclass
class Ending:
    """How one run of `snpbook report` ended."""

    code: int
    output: str
    errors: str


Run = Callable[..., Ending]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `snpbook report` with those arguments; whatever it says keeps to the contract's form."""
    monkeypatch.delenv("SNPBOOK_CERTS", raising=False)

    def run(*arguments: str | Path) -> Ending:
        code = main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        assert captured.err.count("\n") <= 2
        assert (captured.err == "") == (code == 0)
        return Ending(code, captured.out, captured.err)

    return run


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A folder with evidence of our own: report.bin, and chain.pem with the root in own.pem."""
    (tmp_path / "report.bin").write_bytes(CHAIN.report())
    (tmp_path / "chain.pem").write_bytes(pem(CHAIN.vek.der) + pem(CHAIN.ask.der))
    (tmp_path / "own.pem").write_bytes(pem(CHAIN.ark.der))
    return tmp_path
