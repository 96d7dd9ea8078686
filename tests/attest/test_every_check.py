"""The table of all checks: complete, and each row's test fails where that check is not made."""

import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest

from snpbook.attest import chain, parse, rules, vek
from snpbook.attest.checks import Checklist, Result
from snpbook.attest.rules import RULES
from snpbook.attest.verify import check_binding, verify
from snpbook.spec.resources import resource
from tests.attest.own_chain import OwnChain, milan_extensions, text
from tests.attest.vectors import NOW, VECTORS
from tests.sampling import sampled

TABLE: dict[str, Any] = tomllib.loads(resource("data", "verifiers.toml").read_text())
ROWS: dict[str, Any] = {row["name"]: row for row in TABLE["check"]}
REMEMBERED = (parse._check_format, chain._judge, chain._check_links, vek.read_vek, check_binding)
"""Whose answers outlive a test."""
NEEDS_VECTORS = {"report.signature"}
"""Rows whose test rests on the public vectors."""


def test_no_row_twice_and_no_verifier_unknown() -> None:
    assert len(ROWS) == len(TABLE["check"])
    assert {verifier for row in ROWS.values() for verifier in row["verifiers"]} == set(TABLE["verifiers"])


def test_the_table_has_every_check() -> None:
    extensions = {**milan_extensions(), "2": text("Milan"), "5": text("CN=cloud.example")}
    del extensions["4"]
    vcek, vlek = OwnChain(), OwnChain(extensions=extensions, vek_name="SEV-VLEK", ask_name="SEV-VLEK-Milan")
    made = set()
    for own, fields in ((vcek, {"version": 3, "cpuid_family": 0x19, "cpuid_model": 1}), (vlek, {"signing_key": 1})):
        verified = verify(own.report(**fields), own.certificates, own.roots, NOW, crls=[own.crl()])
        made |= {check.name for check in verified.checks if check.result is Result.PASSED}
    assert made | {f"policy.{option}" for option in RULES} == set(ROWS)


@pytest.fixture
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One check is not made."""
    name: str = request.param
    require = Checklist.require

    def lenient(checks: Checklist, made: str, met: bool, *told: Any) -> None:
        require(checks, made, met or made == name, *told)

    monkeypatch.setattr(Checklist, "require", lenient)
    if name.startswith("policy."):
        monkeypatch.setitem(rules.RULES, name.removeprefix("policy."), lambda subject, wanted: (True, "", ""))
    yield name
    for remembered in REMEMBERED:
        remembered.cache_clear()


@pytest.mark.parametrize("without", sampled(ROWS, 6), indirect=True)
def test_a_check_that_is_not_made_is_missed(without: str) -> None:
    if without in NEEDS_VECTORS and not VECTORS.is_dir():
        pytest.skip("the public vectors are not beside this repository")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    with redirect_stdout(StringIO()) as told:
        code = pytest.main([*options, "--capture=sys", ROWS[without]["test"]])
    assert code is pytest.ExitCode.TESTS_FAILED, f"{ROWS[without]['test']} does not miss {without}: {told.getvalue()}"
