"""Evidence made to order: the list of defects is complete, and every verdict is the one that is declared.

The plain-arithmetic verifier of tests/reference, which shares nothing with the library, judges the same evidence.
"""

import json
import tomllib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snpbook.attest.roots import named_roots
from snpbook.cli.main import main
from snpbook.evidence.kit import Kit, Stage, Verdict
from snpbook.evidence.make import DEFECTS, make
from snpbook.evidence.maker import Recipe
from snpbook.spec.policy import Tcb
from snpbook.spec.resources import resource
from tests.reference import attestation
from tests.sampling import sampled

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOY = named_roots("toy")
PRODUCTS, SIGNERS = ("milan", "genoa", "turin"), ("vcek", "vlek")
GOOD = Verdict(Stage.ACCEPTED)
OF_PINNED_ROOTS = {"chain.root.authority", "chain.root.signature"}
"""A root of another shape has another fingerprint, so no evidence under a pinned root can fail these."""
NOT_ASKED_BY_THE_REFERENCE = {
    "crl-signature", "crl-critical", "revoked", "crl-stale", "crl-cut-short", "intermediate-no-ca",
    "wrong-key-identifier", "critical-extension", "report-too-long", "no-root", "no-intermediate", "no-vek",
    "product-name-type",
}  # fmt: skip
CASES = [(product, signer, name) for product in PRODUCTS for signer in SIGNERS for name in DEFECTS]


def test_the_defects_cover_every_check() -> None:
    rows = tomllib.loads(resource("data", "verifiers.toml").read_text())["check"]
    covered = {defect.verdict.check for defect in DEFECTS.values()}
    assert {row["name"] for row in rows} - covered == OF_PINNED_ROOTS
    assert {defect.name for defect in DEFECTS.values()} == set(DEFECTS)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("signer", SIGNERS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_good_evidence_of_every_version(product: str, signer: str, version: int) -> None:
    kit, verdict = make(Recipe(NOW, product, signer, version))
    assert verdict == kit.judge(TOY) == GOOD
    assert kit.report[0] == version


@pytest.mark.parametrize(("product", "signer", "name"), sampled(CASES, 40))
def test_a_defect_meets_the_verdict_that_is_declared(product: str, signer: str, name: str) -> None:
    defect = DEFECTS[name]
    if signer not in defect.signers:
        with pytest.raises(ValueError, match="not of a vlek"):
            make(Recipe(NOW, product, signer), name)
        return
    kit, verdict = make(Recipe(NOW, product, signer), name)
    assert kit.judge(TOY) == verdict == defect.verdict


def reference(kit: Kit) -> str:
    vek, intermediate, root = kit.certificates.values()
    return attestation.check(kit.report, vek, intermediate, root, set(TOY.fingerprints), kit.now)


@pytest.mark.parametrize("signer", SIGNERS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_plain_arithmetic_accepts_what_is_genuine(product: str, signer: str) -> None:
    assert reference(make(Recipe(NOW, product, signer))[0]) == product


def _judged_alike() -> Iterable[tuple[str, str, str]]:
    for product, signer, name in CASES:
        if signer in DEFECTS[name].signers and name not in NOT_ASKED_BY_THE_REFERENCE:
            yield product, signer, name


@pytest.mark.parametrize(("product", "signer", "name"), sampled(_judged_alike(), 12))
def test_plain_arithmetic_refuses_what_is_not_genuine(product: str, signer: str, name: str) -> None:
    kit, verdict = make(Recipe(NOW, product, signer), name)
    if verdict.stage is Stage.REFUSED:
        assert reference(kit) == product
    else:
        with pytest.raises((attestation.Bad, KeyError, ValueError, IndexError)):
            reference(kit)


def test_the_same_recipe_gives_the_same_bytes() -> None:
    first, second = (make(Recipe(NOW, seed="twice"))[0] for _ in range(2))
    assert first == second != make(Recipe(NOW, seed="other"))[0]


def test_fields_and_tcb_are_free() -> None:
    recipe = Recipe(NOW, tcb=Tcb(3, 0, 9, 200), guest_policy=0x20000, fields={"vmpl": 2, "guest_svn": 7})
    kit, verdict = make(recipe)
    assert verdict == GOOD
    assert (kit.report[0x30], kit.report[4], kit.report[0x180:0x188]) == (2, 7, bytes([3, 0, 0, 0, 0, 0, 9, 200]))
    assert make(Recipe(NOW, guest_policy=0xB0000))[1] == Verdict(Stage.REFUSED, "policy.allow_debug")


def test_a_defect_that_other_values_hide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not show: the verdict is report"):
        make(Recipe(NOW, guest_policy=0), "wrong-tcb")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"signer": "ark"}, "signer"),
        ({"version": 6}, "version"),
        ({"fields": {"colour": 1}}, "fields"),
        ({"now": NOW.replace(tzinfo=None)}, "now"),
        ({"product": "rome"}, "rome"),
    ],
)
def test_bad_recipes_name_the_argument(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Recipe(**{"now": NOW, **recipe}))  # type: ignore[arg-type]


def test_an_ark_inside_evidence_is_no_root() -> None:
    kit, _ = make(Recipe(NOW), "foreign-root")
    assert kit.judge(TOY) == Verdict(Stage.NOT_GENUINE, "chain.root")
    good, _ = make(Recipe(NOW))
    assert good.judge(named_roots("amd")) == Verdict(Stage.NOT_GENUINE, "chain.root")


@pytest.mark.parametrize("name", ["good", *sampled(DEFECTS, 8)])
def test_the_command_writes_what_report_verify_confirms(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SNPBOOK_CERTS", raising=False)
    options = ["--defect", name] if name != "good" else []
    assert main(["evidence", "make", ".", "--now", NOW.isoformat(), *options]) == 0
    expected = json.loads(Path("expected.json").read_text())
    capsys.readouterr()
    assert main(["report", "verify", *expected["arguments"], "--json"]) == expected["exit"]
    told = json.loads(capsys.readouterr().out)
    failed = [check["name"] for check in told["checks"] if check["result"] == "failed"]
    assert failed[:1] == ([expected["failing_check"]] if expected["failing_check"] else [])


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["evidence", "make", "--list-defects"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(DEFECTS)
    for options in (
        [],
        ["d", "--defect", "nope"],
        ["d", "--field", "vmpl"],
        ["d", "--tcb", "snp"],
        ["d", "--all", "--defect", "revoked"],
    ):
        assert main(["evidence", "make", *options]) == 64
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    for options in (["--defect", "vmpl-3"], ["--defect", "no-vek"]):
        assert main(["evidence", "make", str(tmp_path), "--now", NOW.isoformat(), *options]) == 0
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"report.bin", "certs/ask.der", "certs/ark.der", "crl.der", "expected.json"}
