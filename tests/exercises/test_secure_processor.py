"""The references against values computed elsewhere, and against the firmware in every situation they speak of."""

import pytest

from snpbook.exercises.secure_pages import digest, reclaimed
from snpbook.exercises.secure_processor import answer, bench, carry_out, launch
from snpbook.firmware.bench import CONTEXT, SPARE, Bench
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.rmp import RMP_ENTRY


def prepared(guest: str, own: int, *, flushed: bool) -> Bench:
    """A machine with a guest in that state that has ASID `own`."""
    here = bench().initialise() if flushed else bench()
    if not flushed:
        here.command(Command.SNP_INIT_EX, init_rmp=1)
    if guest:
        here.assign(CONTEXT, FIRMWARE)
        here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)
    if guest in ("LAUNCH", "RUNNING"):
        here.command(Command.SNP_LAUNCH_START, gctx_paddr=CONTEXT, policy=DEFAULT_POLICY)
    if own:
        here.command(Command.SNP_ACTIVATE, gctx_paddr=CONTEXT, asid=own)
    if guest == "RUNNING":
        here.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=CONTEXT)
    return here


SITUATIONS = [
    ("", 0, True), ("INIT", 0, True), ("LAUNCH", 0, True), ("LAUNCH", 1, True), ("RUNNING", 1, True),
    ("", 0, False), ("INIT", 0, False), ("LAUNCH", 0, False),
]  # fmt: skip
"""Guest, its ASID, and whether ASIDs were flushed: no guest comes further without."""


@pytest.mark.parametrize(("guest", "own", "flushed"), SITUATIONS)
def test_the_first_check_is_the_firmwares(guest: str, own: int, flushed: bool) -> None:
    for asid in (0, 1, 2, "min", "last", "beyond"):
        here = prepared(guest, own, flushed=flushed)
        first, limit = here.psp.min_sev_asid, here.psp.asids.limit
        number = {"min": first, "last": limit, "beyond": limit + 1}.get(asid, asid) if isinstance(asid, str) else asid
        state = here.asid(number).name if 0 < number <= limit else ""
        said = answer(guest, own, number, state, first, limit)
        assert said == here.command(Command.SNP_ACTIVATE, gctx_paddr=CONTEXT, asid=number).status.name


def test_a_page_before_the_asid_stops_the_launch() -> None:
    steps = ["RMPUPDATE page", *launch(True)]
    assert carry_out(bench().initialise(), steps)["refused"] == "SNP_ACTIVATE: INVALID_CONFIG"
    with pytest.raises(ValueError, match="'SNP_LAUNCH' is no step"):
        carry_out(bench(), ["SNP_LAUNCH"])


@pytest.mark.parametrize("new", [NewState(True), NewState(True, 3), NewState(True, 3, True), NewState(True, 0, True)])
def test_a_reclaimed_page_is_what_the_firmware_makes_of_it(new: NewState) -> None:
    here = bench().initialise()
    here.assign(SPARE, new)
    said = reclaimed(here.host.rmp_entry(SPARE >> 12))
    here.command(Command.SNP_PAGE_RECLAIM, page=SPARE >> 12)
    assert said == here.state(SPARE).name
    assert reclaimed(RMP_ENTRY.record(assigned=1, immutable=1, vmsa=1)) == "INVALID_PAGE_STATE"


def test_digests_computed_elsewhere() -> None:
    first = [(LaunchPage.NORMAL, 0, bytes(4096))]
    assert digest(first) == (
        "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20"
    )
    assert digest([]) == "00" * 48
    assert digest([*first, (LaunchPage.UNMEASURED, 4096, b"x" * 4096)]) == digest(
        [*first, (LaunchPage.UNMEASURED, 4096, bytes(4096))]
    )
