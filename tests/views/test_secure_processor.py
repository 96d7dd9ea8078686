"""The pictures of the state machines, the answer of the mailbox and the chain of a launch, as a reader reads them."""

from __future__ import annotations

import numpy as np
import pytest

from snpbook.firmware.bench import CONTEXT, Bench
from snpbook.firmware.growth import Page, begin, grow
from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.states import GuestState, LegacyGuestState, LegacyPlatformState, PlatformState
from snpbook.views.launch_digest import chain, page_info
from snpbook.views.mailbox import answer, answers
from snpbook.views.state_machines import MACHINES, state_machine
from snpbook.views.states import page_life
from tests.views.reading import Page as Html
from tests.views.reading import read

SVG = "{http://www.w3.org/2000/svg}"


def bench() -> Bench:
    return Bench(rng=np.random.default_rng(2).bytes).initialise()


def drawn(html: str) -> tuple[Html, list[str], int]:
    """The fragment, the words in its picture, and how many arrows the picture has."""
    page = read(html)
    ((_, picture),) = page.pictures
    words = [text.text or "" for text in picture.iter(f"{SVG}text")]
    arrows = [path for path in picture.iter(f"{SVG}path") if path.get("marker-end")]
    return page, words, len(arrows)


@pytest.mark.parametrize(
    ("name", "arrows", "states"),
    [("snp", 2, PlatformState), ("guest", 2, GuestState), ("legacy", 5, LegacyPlatformState),
     ("legacy_guest", 8, LegacyGuestState)],
)  # fmt: skip
def test_every_state_is_drawn_once_and_the_present_one_is_marked(name: str, arrows: int, states: type) -> None:
    for current in states:
        page, words, count = drawn(state_machine(name, current).html)
        assert count == arrows
        assert [word for word in words if word.startswith("\u25cf")] == [f"\u25cf {current.name}"]
        assert {word.removeprefix("\u25cf ") for word in words} >= {state.name for state in states}
        assert f"in {current.name}" in page.tables[0]
    assert "not there yet" in state_machine(name, None).text


def test_commands_come_from_the_table() -> None:
    text = state_machine("guest", GuestState.LAUNCH).text
    assert "LAUNCH, now  RUNNING  LAUNCH_FINISH" in text
    assert "INIT         LAUNCH   LAUNCH_START" in text
    assert Command.SNP_GCTX_CREATE in MACHINES["guest"].commands
    assert "INIT     DECOMMISSION" in state_machine("legacy", None).text


def test_a_page_in_a_state_shows_the_ways_out_of_it() -> None:
    life = page_life(PageState.PRE_GUEST)
    assert "SNP_LAUNCH_UPDATE" in life.text
    assert "GCTX_CREATE" not in life.text
    assert "Pre-Guest marked" in read(life.html).pictures[0][0]
    assert page_life(PageState.HV_FIXED).text.startswith("A page that is HV-Fixed")


def test_an_answer_says_status_check_and_registers() -> None:
    here = bench()
    here.assign(CONTEXT, FIRMWARE)
    done = answer(here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT))
    assert "SUCCESS (0x00)" in done.text
    assert "page 0x1100  Firmware  Context" in done.text
    assert read(done.html).tables == ["SNP_GCTX_CREATE", "What moved", "Mailbox registers"]
    refused = answer(here.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=CONTEXT)).text
    for words in ("INVALID_GUEST_STATE (0x02)", "guest state", "LAUNCH", "INIT", "SNP SNP_LAUNCH_FINISH", "0x80000002"):
        assert words in refused
    assert "What moved" not in refused
    rows = answers(here.made[-2:], 3).text.splitlines()
    assert rows[3].startswith("3  SNP_GCTX_CREATE")
    assert "SNP guest: none to INIT; page: Firmware to Context" in rows[3]


def test_a_buffer_that_came_back_is_shown() -> None:
    here = Bench(rng=np.random.default_rng(2).bytes)
    shown = answer(here.command(Command.PLATFORM_STATUS))
    assert "The buffer, written back" in read(shown.html).tables
    assert "api_major" in shown.text


def test_the_chain_shows_where_two_launches_part() -> None:
    links = []
    for data in (bytes(4096), bytes(4095) + b"\1"):
        here = bench()
        begin(here)
        links.append(grow(here, [Page(LaunchPage.ZERO, 0), Page(LaunchPage.NORMAL, 4096, data)]))
    intended, changed = links
    rows = chain(changed, intended).text.splitlines()
    assert rows[3].endswith("the same")
    assert rows[4].endswith("another")
    assert changed[-1].digest.hex() in rows[-1]
    assert "compared" not in chain(intended).text
    assert "48 bytes of zero" in chain([]).text
    info = page_info(intended[1], 2)
    assert "PAGE_INFO of page 2" in read(info.html).tables
    assert "SHA-384 of the above" in info.text
    assert intended[0].digest.hex() in info.text
