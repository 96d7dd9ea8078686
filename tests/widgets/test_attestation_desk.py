"""The verifier's desk: each switch is caught by its step, several by the first, and a reader's own files are judged."""

from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import pytest

from snpbook.evidence.maker import Maker, Recipe
from snpbook.spec import guid
from snpbook.views.report_map import report_map
from snpbook.views.verifier_steps import STEPS, step_of
from snpbook.widgets.attestation_desk import TAMPERS, AttestationDesk
from tests.attest.test_evidence import table
from tests.attest.vectors import VECTORS

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
CAUGHT = {
    "bit": ("signature", "report.signature"),
    "tcb": ("binding", "binding.tcb"),
    "certificate": ("chain", "chain.vek.signature"),
    "nonce": ("nonce", "nonce"),
    "time": ("chain", "chain.vek.dates"),
}


@pytest.fixture
def desk() -> AttestationDesk:
    return AttestationDesk(NOW, lambda: NOW)


def lights(text: str) -> dict[str, str]:
    """The words of each step's light."""
    return {
        step: line.removeprefix(step) for line in text.splitlines() for step in STEPS if line.startswith(step + " ")
    }


def test_good_evidence_passes_every_step(desk: AttestationDesk) -> None:
    assert all("passed" in light for light in lights(desk.describe()).values())
    assert desk.describe().endswith("Verdict: accepted")
    assert set(lights(desk.describe())) == set(STEPS)


@pytest.mark.parametrize("name", TAMPERS)
def test_each_switch_is_caught_by_its_step(desk: AttestationDesk, name: str) -> None:
    desk.switches[name].value = True
    step, check = CAUGHT[name]
    assert step_of(check) == step
    shown = lights(desk.describe())
    assert [each for each, light in shown.items() if "failed" in light] == [step]
    assert check in shown[step]
    desk.switches[name].value = False
    assert desk.describe().endswith("accepted")


def test_of_several_the_first_shows(desk: AttestationDesk) -> None:
    text = desk.tamper(bit=True, tcb=True).text
    assert text.endswith("report.signature")
    assert "not reached" in lights(text)["binding"]


def test_other_roots_refuse_the_toys(desk: AttestationDesk) -> None:
    desk.roots.value = "amd"
    assert desk.describe().endswith("chain.root")


def test_a_readers_own_report(desk: AttestationDesk) -> None:
    if not VECTORS.is_dir():
        pytest.skip("the public vectors are not beside this repository")
    files = {
        "report": (VECTORS / "reports" / "genoa_v3.bin").read_bytes(),
        "vcek": (VECTORS / "reports" / "genoa_v3_vcek.pem").read_bytes(),
        "chain": (VECTORS / "chains" / "genoa.pem").read_bytes(),
    }
    desk.files = SimpleNamespace(
        value=tuple({"name": name, "content": memoryview(data)} for name, data in files.items())
    )
    desk._uploaded(None)
    assert desk.roots.value == "amd"
    assert desk.describe().endswith("accepted")
    assert all(control.disabled for control in desk.switches.values())
    desk.load({})
    assert not any(control.disabled for control in desk.switches.values())
    assert (desk.roots.value, desk.describe().splitlines()[-1]) == ("toy", "Verdict: accepted")


def test_a_readers_own_report_is_judged_today_with_its_table_and_list() -> None:
    maker = Maker(Recipe(NOW, "genoa"))
    vcek, *above = maker.kit().certificates.values()
    report = maker.report() + table([(guid.CERT_VCEK, vcek)])
    files = {"report": report, "above": b"".join(above), "list": maker.crl(maker.ca.ask.facts.serial)}
    for today, without, verdict in (
        (NOW, "list", "accepted"),
        (NOW, "", "chain.revocation.serial"),
        (NOW + timedelta(days=4000), "list", "chain.vek.dates"),
    ):
        desk = AttestationDesk(NOW, partial(datetime.fromtimestamp, today.timestamp(), UTC))
        desk.load({name: data for name, data in files.items() if name != without}, "toy")
        assert desk.describe().endswith(verdict)


def test_files_that_cannot_be_judged_are_told(desk: AttestationDesk) -> None:
    certificate = memoryview(desk.kit.certificates["vcek.der"])
    desk.files = SimpleNamespace(value=({"name": "vcek", "content": certificate},))
    desk._uploaded(None)
    assert "0 of these files may be a report" in desk.describe().splitlines()[-1]


def test_files_without_a_report_are_named(desk: AttestationDesk) -> None:
    with pytest.raises(ValueError, match="0 of these files"):
        desk.load(dict(desk.kit.certificates))


def test_a_malformed_report_reaches_no_step(desk: AttestationDesk) -> None:
    assert desk.load({"short": b"no report"}).text.endswith("Verdict: malformed")


def test_the_map_has_every_field_of_the_version(desk: AttestationDesk) -> None:
    shown = report_map(desk.kit.report)
    assert "cpuid_family" in shown.text
    assert "launch_mit_vector" not in shown.text
    assert 'alt="Byte map of an attestation report of version 3' in shown.html
