"""The lab on private memory, driven from Python: what the desks show was run, and follows the form."""

from __future__ import annotations

import pytest

from snpbook.labs.private_memory import Lab
from snpbook.spec.private_memory import NoSuchCell
from snpbook.widgets.fit_desk import SMALL, FitDesk, filled
from snpbook.widgets.regime_desk import RegimeDesk


@pytest.fixture(scope="module")
def desk() -> RegimeDesk:
    return RegimeDesk()


def test_the_regimes_of_a_kind_are_side_by_side(desk: RegimeDesk) -> None:
    assert list(desk.runs) == ["sev, registered", "sev, lazy"]
    pinned = {name: [sample.pages.pinned for sample in samples] for name, samples in desk.runs.items()}
    assert set(pinned["sev, registered"]) == {4112}
    assert pinned["sev, lazy"][0] == 16
    assert pinned["sev, lazy"] != sorted(pinned["sev, lazy"]), "punching gives back"


def test_the_form_is_the_plan(desk: RegimeDesk) -> None:
    shown = desk.show(kind="sev", working_set=50, converted=10, rounds=2)
    assert desk.plan.touched == (5, 50)
    assert (desk.plan.converted, desk.plan.rounds, desk.plan.ballooned) == (5, 2, 5)
    assert "touched again, 2" in shown.text
    assert desk.describe() == shown.text
    slider = desk.children[0].children[1].children[1]
    assert slider.value == 50, "the slider moves with the field"
    slider.value = 80
    assert desk.working_set.value == 80
    assert desk.describe() == shown.text, "nothing runs before the button is pressed"
    desk.button.click()
    assert "touched 80 %" in desk.describe()
    assert not desk.button.disabled


def test_keeping_both_sides_costs_twice(desk: RegimeDesk) -> None:
    def most(*, discard: bool) -> int:
        desk.show(kind="sev", working_set=20, converted=50, rounds=1, discard=discard)
        return max(sample.pages.doubled for sample in desk.runs["sev, lazy"])

    assert most(discard=False) > most(discard=True)
    desk.discard.value = True


def test_large_pages_are_shattered(desk: RegimeDesk) -> None:
    desk.show(kind="snp", working_set=100, converted=20, rounds=1, huge=True)
    work = desk.runs["snp, restricted"][-1].work
    assert work.psmashes > 0
    assert desk.runs["snp, guest_memfd"][-1].work.psmashes == 0, "4 KB pages alone"


def test_time_comes_on_request(desk: RegimeDesk) -> None:
    desk.quantity.value = "rmpupdates"
    assert "illustrative" not in desk.describe()
    desk.time.value = True
    assert "(illustrative)" in desk.describe()
    desk.time.value, desk.quantity.value = False, ""


def test_a_guess_comes_first() -> None:
    desk = FitDesk()
    desk.button.click()
    assert desk.describe().startswith("Guess first")
    right = filled("sev", "registered", SMALL)[-1].guests
    verdict = desk.predict("sev, registered", right)
    assert f"✓ {right}" in verdict.text
    assert f"✗ {right + 1}" in desk.predict("sev, registered", right + 1).text
    assert 0 < right < 8, "8 of 32 MiB would be all of a host of 256 MiB"


def test_each_guest_uses_half_of_its_memory() -> None:
    """And what it is launched with twice: less than half a MiB."""
    found = filled("snp", "guest_memfd", SMALL)
    assert 16 << 8 <= found[0].free - found[1].free < 33 << 7
    assert found[-1].guests == found[0].free // (found[0].free - found[1].free) + 1


def test_the_lab() -> None:
    lab = Lab()
    with pytest.raises(NoSuchCell, match="a sev guest has no guest_memfd memory"):
        lab.refused("sev", "guest_memfd")
    with pytest.raises(ValueError, match="no VMM forgets 'hole': one of 'nothing', 'the attribute', 'the hole'"):
        lab.forgets("hole")
    with pytest.raises(ValueError, match="no story 'x': one of 'a page is used as private'"):
        lab.serve(print, "x")
    with pytest.raises(ValueError, match="no regime 'tdx': one of sev, registered; snp, registered"):
        lab.fit.predict("tdx", 3)
    assert "noise" in lab.host_does("sev", "registered", "migrate", pinned=False).text
    assert "noise" not in lab.host_does("sev", "lazy", "migrate").text
    assert "SIGBUS" in lab.vmm_writes(("snp", "registered")).text
    assert any("BUG" in line for line in lab.kernel_writes("snp", "guest_memfd"))
    assert "changes nothing" in lab.flips(("snp", "guest_memfd", False)).text
    assert "2 MB entries" in lab.shatter().text
    assert "2 MB entries" not in lab.shatter(fragmented=True).text
    assert "pinned" not in lab.null().text, "nothing keeps its pages"
    assert repr(lab) == "Lab(private memory)"
