"""Console, state machines and launch desk driven from Python; in the browser they are in tests/browser."""

from __future__ import annotations

from hashlib import sha384

import pytest

from snpbook.labs.secure_processor import Lab
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.states import GuestState, PlatformState
from snpbook.widgets.launch_desk import CHANGES
from snpbook.widgets.mailbox_console import OUTPUT
from tests.views.reading import read

CONTEXT, PAGE = 17 << 20, 18 << 20


@pytest.fixture
def lab() -> Lab:
    return Lab()


def ready(lab: Lab) -> Lab:
    lab.bench.initialise()
    lab.console.assign(CONTEXT, PageState.FIRMWARE)
    return lab


# The console.


def test_the_button_sends_what_the_form_holds(lab: Lab) -> None:
    console = lab.console
    assert console.command.value is Command.SNP_INIT_EX
    console.button.click()
    assert console.made is not None
    assert console.made.after.snp is PlatformState.INIT
    assert "SUCCESS" in console.describe()
    console.flush.click()
    console.send(Command.SNP_DF_FLUSH)
    assert lab.asid(1) is AsidState.CLEAN


def test_fields_are_set_by_name_and_forms_come_afresh(lab: Lab) -> None:
    console = ready(lab).console
    console.send(Command.SNP_GCTX_CREATE)
    assert "POLICY_FAILURE" in console.send(Command.SNP_LAUNCH_START, policy=0).text
    assert console.entries["policy"].value == "0x0"
    assert "SUCCESS" in console.send(Command.SNP_LAUNCH_START).text
    assert console.entries["policy"].value == "0x30000"
    console.send(Command.SNP_LAUNCH_START, gosvw=bytes(range(16)))
    assert lab.bench.made[-1].arguments["gosvw"] == bytes(range(16))
    with pytest.raises(ValueError, match="has no field 'asid'"):
        console.send(Command.SNP_LAUNCH_START, asid=1)


def test_the_list_marks_what_the_states_admit(lab: Lab) -> None:
    labels = {command: label for label, command in lab.console.command.options}
    assert labels[Command.SNP_INIT_EX] == "\u2713 SNP_INIT_EX"
    assert labels[Command.SNP_ACTIVATE] == "\u2717 SNP_ACTIVATE: the SNP platform is UNINIT"
    lab.console.send(Command.SNP_INIT_EX)
    labels = {command: label for label, command in lab.console.command.options}
    assert labels[Command.SNP_ACTIVATE] == "\u2717 SNP_ACTIVATE: there is no guest context"
    assert lab.console.command.value is Command.SNP_INIT_EX


def test_raw_bytes_and_numbers_override_the_form(lab: Lab) -> None:
    console = lab.console
    console.number.value = "0xcc"
    assert "INVALID_COMMAND" in console.send().text
    console.command.value = Command.SNP_CONFIG
    assert console.number.value == "0xc9"
    console.raw.value = "00" * 8 + "04" + "00" * 55
    assert "reserved bits" in console.send().text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("raw", "xy", "pairs of hexadecimal digits"), ("number", "seven", "is no number"), ("at", "?", "is no number")],
)
def test_what_cannot_be_sent_is_told(lab: Lab, name: str, text: str, message: str) -> None:
    getattr(lab.console, name).value = text
    lab.console.button.click()
    assert message in lab.console.told.value
    assert lab.console.made is None


def test_a_buffer_in_a_page_that_is_given_away_is_told(lab: Lab) -> None:
    console = ready(lab).console
    console.at.value = f"{CONTEXT:#x}"
    console.button.click()
    assert "a host write needs a page of the hypervisor" in console.told.value


def test_the_host_moves_pages(lab: Lab) -> None:
    console = lab.console
    lab.bench.initialise()
    console.page.value, console.becomes.value, console.gpa.value = f"{PAGE:#x}", PageState.PRE_GUEST, "0x5000"
    console.update.click()
    assert "it is Pre-Guest" in console.told.value
    assert lab.bench.host.rmp_entry(PAGE >> 12).gfn == 5


# The state machines.


def test_buttons_follow_the_states(lab: Lab) -> None:
    panel = lab.machines
    assert {name for name, button in panel.buttons.items() if button.disabled} == set()
    panel.press("SNP_INIT_EX")
    assert {name for name, button in panel.buttons.items() if button.disabled} == {"SNP_INIT", "SNP_INIT_EX"}
    assert panel.buttons["SNP_INIT"].tooltip == "the SNP platform is INIT"
    with pytest.raises(ValueError, match="the SNP platform is INIT"):
        panel.press("SNP_INIT")
    with pytest.raises(ValueError, match="no button"):
        panel.press("SNP_ACTIVATE")


def test_a_guest_is_launched_by_buttons(lab: Lab) -> None:
    panel = ready(lab).machines
    panel.machine.value = "guest"
    for name in ("SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE", "SNP_LAUNCH_FINISH"):
        panel.press(name)
        assert lab.console.made is not None
        assert lab.console.made.ok, lab.console.made
    assert lab.bench.standing().guest is GuestState.RUNNING
    assert "An SNP guest, in RUNNING" in panel.describe()
    assert panel.buttons["SNP_LAUNCH_UPDATE"].disabled
    panel.buttons["SNP_DECOMMISSION"].click()
    assert "An SNP guest, not there yet" in panel.describe()


def test_a_page_goes_round(lab: Lab) -> None:
    panel = ready(lab).machines
    panel.machine.value, panel.page.value = "page", f"{PAGE:#x}"
    way = ["RMPUPDATE to Firmware", "SNP_PAGE_RECLAIM", "RMPUPDATE to Hypervisor", "RMPUPDATE to Pre-Guest"]
    seen = []
    for name in way:
        panel.press(name)
        seen.append(panel.page_state)
    assert seen == [PageState.FIRMWARE, PageState.RECLAIM, PageState.HYPERVISOR, PageState.PRE_GUEST]
    assert panel.buttons["RMPUPDATE to Hypervisor"].disabled
    lab.console.assign(PAGE + 4096, PageState.FIRMWARE)
    panel.page.value = f"{PAGE + 4096:#x}"
    lab.console.send(Command.SNP_PAGE_RECLAIM, page=(PAGE + 4096) >> 12)
    assert "A page that is Reclaim" in panel.describe()
    lab.console.assign(PAGE + 4096, PageState.HYPERVISOR)
    assert "A page that is Hypervisor" in panel.describe(), "it follows the console"


def test_a_metadata_page_goes_out_and_comes_back(lab: Lab) -> None:
    panel = ready(lab).machines
    panel.machine.value = "guest"
    for name in ("SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE"):
        panel.press(name)
    lab.console.assign(OUTPUT, PageState.FIRMWARE)
    panel.machine.value, panel.page.value = "page", f"{PAGE:#x}"
    assert panel.buttons["SNP_PAGE_MD_INIT"].disabled
    way = ["RMPUPDATE to Firmware", "SNP_PAGE_MD_INIT", "SNP_PAGE_SWAP_OUT", "SNP_PAGE_SWAP_IN", "SNP_PAGE_RECLAIM"]
    seen = []
    for name in way:
        panel.press(name)
        seen.append(panel.page_state.name)
    assert seen == ["FIRMWARE", "METADATA", "FIRMWARE", "METADATA", "RECLAIM"]
    panel.page.value = "nowhere"
    assert "Page at" in panel.told.value


# The launch desk.


def test_the_digest_grows_and_a_change_shows_from_its_page_on(lab: Lab) -> None:
    desk = lab.launch
    assert [sha384(bytes(link.info)).digest() for link in desk.intended] == [link.digest for link in desk.intended]
    desk.show(grown=0)
    assert desk.digest == b""
    desk.show(grown=7, change="one bit of its bytes", page=2)
    same = [one.digest == other.digest for one, other in zip(desk.launched, desk.intended, strict=True)]
    assert same == [True] + [False] * 6
    desk.show(page=4)
    assert desk.digest == desk.intended[-1].digest, "the bytes of an unmeasured page do not count"
    desk.show(change="nothing")
    assert "compared" not in desk.describe()


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "nothing"])
def test_every_change_of_a_measured_page_tells(lab: Lab, change: str) -> None:
    lab.launch.show(change=change, page=1)
    assert lab.launch.digest != lab.launch.intended[-1].digest


def test_on_paper(lab: Lab) -> None:
    lab.console.send(Command.SNP_INIT_EX)
    for view in (lab.console, lab.machines, lab.launch):
        data, _ = view._repr_mimebundle_()
        read(data["text/html"])
        assert data["text/plain"] == repr(view)
    assert repr(lab) == "Lab(Bench(milan, SecureProcessor(1.55.29, INIT, 0 guests)))"
    assert "SNP_INIT_EX" in lab.commands().text
    with pytest.raises(ValueError, match="no buffer"):
        lab.buffer(Command.SNP_DF_FLUSH)
