"""The clock's registers are the host's word for how much memory there is: the guest ends or is right.

Too little it uses; what is not there it cannot accept; and no table in its memory overflows.
"""

from __future__ import annotations

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.spec.ghcb import Nae
from tests.guest.hostile.world import Watch, pristine
from tests.machines import MIB
from tests.sampling import sampled

TOLD: dict[str, tuple[dict[int, int], str, str]] = {
    "1 MiB and nothing": ({}, "accepted", "accepted"),
    "1 TiB above 4 GiB": ({0x5B: 0xFF, 0x5C: 0xFF, 0x5D: 0xFF}, "1:1", "0:0"),
    "whole units above 4 GiB": ({0x5B: 0xE0, 0x5C: 0xFF, 0x5D: 0xFF}, "1:1", "0:0"),
    "RAM where the image is": ({0x34: 0xFF, 0x35: 0xFF}, "1:1", "1:1"),
    "the image's pages as RAM": ({0x34: 0xF0, 0x35: 0xFE}, "1:1", "1:1"),
    "a page more than there is": ({0x34: 0x00, 0x35: 0x01}, "1:1", "accepted"),
}
"""Registers of the clock (the others are 0), and what comes of an eager and of a lazy boot. A lazy guest meets what is
not there when it uses it."""


@pytest.mark.parametrize("acceptance", ["eager", "lazy"])
@pytest.mark.parametrize("name", sampled(TOLD, 2))
def test_what_the_clock_says(name: str, acceptance: str) -> None:
    registers, *expected = TOLD[name]
    guest, watch = pristine(), Watch()
    index = [0]

    def lie(m: Moment) -> None:
        watch(m)
        if m.event is not Nae.IOIO or m.page is None:
            return
        if m.stage is Stage.EXIT and not m.page.sw_exit_info_1 & 1:
            index[0] = m.page.rax & 0x7F
        elif m.stage is Stage.ENTRY and m.page.sw_exit_info_1 & 1:
            m.put(rax=registers.get(index[0], 0))

    tamper(guest, lie)
    wanted = expected[acceptance == "lazy"]
    if wanted == "accepted":
        assert 0 < guest.boot(acceptance) <= 18 * MIB
    else:
        with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
            guest.boot(acceptance)
        assert watch.ended == wanted
