"""The labs of the chapter on the guest, driven from Python: theatre, two eyes, acceptance over time, the lab itself."""

from __future__ import annotations

import pytest

from snpbook.labs.inside_the_guest import Lab
from snpbook.widgets.acceptance_race import AcceptanceRace
from snpbook.widgets.ghcb_theatre import NOTHING, GhcbTheatre
from snpbook.widgets.page_eyes import PageEyes
from tests.machines import poke_private, private_bytes
from tests.views.reading import read

SHARE = "five pages become shared"


# The theatre.


@pytest.fixture(scope="module")
def theatre() -> GhcbTheatre:
    return GhcbTheatre()


def test_what_is_chosen_is_played(theatre: GhcbTheatre) -> None:
    theatre.show(guest="snp", scene="CPUID 1: what am I?", era="mainline", field=NOTHING)
    assert "goes on" in theatre.ending.describe()
    assert theatre.show(field="rbx", number=9 << 24).text.endswith("APIC id 9")
    assert "✗ writes RBX = 0x9000000" in theatre.sequence.describe()
    assert "✗ 0x9000000 ✓" in theatre.page.describe()
    theatre.number.value = "0x3000000"
    assert theatre.ending.describe().endswith("APIC id 3"), "a number that is typed counts at once"
    theatre.field.value = "mark of rax"
    theatre.number.value = "0"
    assert "the guest stops" in theatre.ending.describe()


def test_scenes_are_those_of_the_guest(theatre: GhcbTheatre) -> None:
    theatre.show(guest="snp")
    theatre.show(scene=SHARE, field="cur_entry", number=0)
    assert "set 1, 1" in theatre.ending.describe()
    theatre.guest.value = "sev-es"
    assert SHARE not in theatre.scene.options
    assert theatre.field.value == NOTHING
    assert theatre.made.result.value == "passed"
    theatre.guest.value = "snp"
    assert SHARE in theatre.scene.options
    theatre.scene.value = SHARE
    assert "cur_entry" in dict(theatre.field.options)
    assert "RAX" not in dict(theatre.field.options)


@pytest.mark.parametrize(("typed", "complaint"), [("zz", "is no number"), ("0x10000", "does not fit 16 bits")])
def test_a_value_that_cannot_be_is_told(theatre: GhcbTheatre, typed: str, complaint: str) -> None:
    theatre.show(guest="snp", scene=SHARE, field="cur_entry", number=5)
    before = theatre.describe()
    theatre.number.value = typed
    assert complaint in theatre.number.complaint
    assert theatre.describe() == before
    theatre.number.value = "5"
    assert theatre.number.complaint == ""


def test_the_kernel_of_the_series_lets_its_vmm_parse_the_list(theatre: GhcbTheatre) -> None:
    theatre.show(guest="snp", scene=SHARE, era="rfc-v7", field=NOTHING)
    assert "goes on" in theatre.ending.describe()
    theatre.show(era="mainline")


def test_every_answer(theatre: GhcbTheatre) -> None:
    theatre.show(guest="snp", scene="an attestation report", field="sw_exit_info_2", number=2 << 32, every=True)
    assert "ETIMEDOUT" in theatre.ending.describe()
    theatre.show(every=False)
    assert "EIO" in theatre.ending.describe()


def test_the_theatre_reads_on_paper(theatre: GhcbTheatre) -> None:
    theatre.show(guest="snp", scene=SHARE, field=NOTHING)
    data, _ = theatre._repr_mimebundle_()
    page = read(data["text/html"])
    assert page.tables == [SHARE, "The GHCB: PAGE_STATE_CHANGE"]
    assert len(page.pictures) == 2
    assert data["text/plain"] == repr(theatre)


# Two eyes.


@pytest.fixture(scope="module")
def eyes() -> PageEyes:
    return PageEyes()


def test_what_each_eye_sees_is_what_is_there(eyes: PageEyes) -> None:
    eyes.show("a page of a program", "attack at dawn")
    eyes.write.click()
    seen, guest = eyes.seen.look(eyes.gpa), eyes.seen.guest
    assert seen.guest is not None
    assert seen.guest.rstrip(b"\0") == b"attack at dawn"
    assert private_bytes(guest, eyes.gpa, 14) == b"attack at dawn"
    assert seen.host == guest.system.machine.dram.read(seen.spa, 32) != seen.guest
    poke_private(guest, eyes.gpa, b"attack at dusk")
    eyes.touch.click()
    assert "attack at dusk" in eyes.eyes.describe()


def test_a_page_changes_sides(eyes: PageEyes) -> None:
    eyes.show("another page of it", "for all")
    eyes.share.click()
    assert "✓ the page is shared now" in eyes.describe()
    eyes.write.click()
    seen = eyes.seen.look(eyes.gpa)
    assert seen.host == seen.guest == b"for all".ljust(32, b"\0")
    assert (seen.private, seen.c_bit, seen.entry["assigned"]) == (False, False, False)
    eyes.share.click()
    assert "✗ the page is shared already" in eyes.describe()
    eyes.take_back.click()
    seen = eyes.seen.look(eyes.gpa)
    assert (seen.private, seen.c_bit, seen.entry["validated"], seen.accepted) == (True, True, True, True)
    assert seen.guest != b"for all".ljust(32, b"\0")


def test_memory_that_is_not_accepted(eyes: PageEyes) -> None:
    eyes.show("memory not used yet", "now")
    assert "not accepted: not touched" in eyes.describe()
    for button in (eyes.write, eyes.share):
        button.click()
        assert "✗ the guest has not accepted this page" in eyes.describe()
    eyes.take_back.click()
    assert "private already" in eyes.describe()
    eyes.touch.click()
    assert "#VC, error code 0x404" in eyes.describe()
    eyes.accept.click()
    assert "512 pages" in eyes.describe()
    eyes.touch.click()
    assert "nothing special" in eyes.describe()
    eyes.write.click()
    assert "now" in eyes.describe()


@pytest.mark.parametrize("place", ["the GHCB", "the secrets page", "the CPUID page", "the guest's page table"])
def test_pages_of_the_kernel_are_looked_at_alone(eyes: PageEyes, place: str) -> None:
    before = eyes.show(place).text
    for button in (eyes.write, eyes.share, eyes.take_back, eyes.accept):
        button.click()
        assert "the kernel needs this page" in eyes.describe()
        assert eyes.eyes.describe() == before
    assert read(eyes._repr_mimebundle_()[0]["text/html"]).tables


# Acceptance.


def test_both_pay_the_same_in_the_end() -> None:
    race = AcceptanceRace()
    assert "programs use 2 MiB" in race.describe(), "a quarter of six regions that are free"
    race.show(used=100)
    eager, lazy = race._run()
    assert eager.points[0].accepted == eager.points[-1].accepted == lazy.points[-1].accepted > 15.8
    assert lazy.points[0].accepted == pytest.approx(4, abs=0.2)
    assert [point.accepted - lazy.points[0].accepted for point in lazy.points] == [2.0 * n for n in range(7)]
    assert eager.points[0].exits == eager.points[-1].exits > 4000 > 1500 > lazy.points[0].exits


# The lab.


def test_the_lab() -> None:
    lab = Lab()
    guest = lab.launch()
    asked = lab.boot(guest).text
    order = [asked.index(word) for word in ("SEV_INFO", "FEATURES", "REGISTER_GPA", "IOIO", "PAGE_STATE_CHANGE", "HLT")]
    assert order == sorted(order)
    assert lab.dmesg(guest).text.splitlines()[1] == "SEV: SNP running at VMPL0."
    other = lab.launch("sev-es")
    assert lab.system.guests == [other]
    assert "CPUID" in lab.boot(other).text
    assert lab.game().text.count("?") == 2
    assert lab.run_game() == ["#VC", "old"]
    assert lab.replay(validates_at_faults=True).endswith("'balance: 100'")
    made = lab.above_svsm()
    assert made.dmesg[1] == "SEV: SNP running at VMPL2."
    assert repr(made.verdict) == "accepted"
