"""The mailbox bench, what the states admit, and a launch page by page against digests computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha384

import numpy as np
import pytest

from snpbook.firmware.admission import Standing, obstacle
from snpbook.firmware.bench import BUFFER, CONTEXT, SPARE, Bench
from snpbook.firmware.growth import Page, begin, grow
from snpbook.firmware.keys import Chip
from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command, MailboxRegister
from snpbook.spec.dispatch import BUFFERS, NOT_MODELLED
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.states import GuestState, LegacyGuestState, LegacyPlatformState, PlatformState
from snpbook.spec.status import FirmwareRefusal, Status

STATE_CODES = {Status.INVALID_PLATFORM_STATE, Status.INVALID_GUEST_STATE}
NO_RMP = {Command.INIT, Command.INIT_EX}
"""Legacy initialisation wants a table where the cores are switched to SNP: a matter of the machine, not of a state."""


def bench(*, initialised: bool = True) -> Bench:
    made = Bench(rng=np.random.default_rng(1).bytes)
    return made.initialise() if initialised else made


# The mailbox.


def test_a_command_and_what_it_moves() -> None:
    here = bench()
    here.assign(CONTEXT, FIRMWARE)
    made = here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)
    assert (made.name, made.status, made.refusal, made.ok) == ("SNP_GCTX_CREATE", Status.SUCCESS, None, True)
    assert [(one.page, one.before, one.after) for one in made.changes] == [
        (CONTEXT >> 12, PageState.FIRMWARE, PageState.CONTEXT)
    ]
    assert (made.before.guest, made.after.guest) == (None, GuestState.INIT)
    assert made.registers[MailboxRegister.COMMAND] == 1 << 31
    assert here.made[-1] is made


def test_a_refusal_says_what_it_wants_and_leaves_its_status() -> None:
    made = bench(initialised=False).command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)
    assert made.refusal is not None
    assert (made.refusal.expected, made.refusal.found) == ("INIT", "UNINIT")
    assert made.registers[MailboxRegister.COMMAND] == 1 << 31 | 1
    assert made.before == made.after
    assert str(made).startswith("SNP_GCTX_CREATE: INVALID_PLATFORM_STATE (0x01)")


def test_raw_bytes_and_unknown_numbers_are_sent_as_they_are() -> None:
    here = bench()
    assert here.send(0xCC, b"").status is Status.INVALID_COMMAND
    stray = here.send(Command.SNP_CONFIG, bytes(8) + b"\4" + bytes(55))
    assert stray.refusal is not None
    assert stray.refusal.rule == "reserved bits of the buffer are zero"
    here.assign(BUFFER, FIRMWARE)
    with pytest.raises(HostPageFault):
        here.command(Command.SNP_DECOMMISSION, gctx_paddr=CONTEXT)


def test_a_buffer_that_is_only_written_may_be_the_firmwares() -> None:
    here = bench()
    here.assign(BUFFER, FIRMWARE)
    made = here.command(Command.PLATFORM_STATUS)
    assert made.written is not None
    assert (made.written.api_major, made.written.api_minor) == (1, 55)
    assert here.state(BUFFER) is PageState.RECLAIM


# What the states admit.


def to_initialised(here: Bench) -> None:
    here.initialise()


def to_launch(here: Bench) -> None:
    begin(here.initialise())


def to_running(here: Bench) -> None:
    to_launch(here)
    here.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=CONTEXT)


def to_created(here: Bench) -> None:
    here.initialise().assign(CONTEXT, FIRMWARE)
    here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)


def to_legacy(here: Bench) -> None:
    here.initialise()
    here.command(Command.INIT)


def to_legacy_launch(here: Bench) -> None:
    to_legacy(here)
    assert here.command(Command.LAUNCH_START).status is Status.INVALID_BUFFER_STATE
    here.assign(BUFFER, FIRMWARE)
    assert here.command(Command.LAUNCH_START).ok
    here.take_back(BUFFER)


_P, _L, _G, _H = PlatformState, LegacyPlatformState, GuestState, LegacyGuestState
WAYS: dict[str, tuple[Callable[[Bench], object], Standing]] = {
    "off": (lambda here: None, Standing(_P.UNINIT, _L.UNINIT, None, _H.UNINIT)),
    "on": (to_initialised, Standing(_P.INIT, _L.UNINIT, None, _H.UNINIT)),
    "created": (to_created, Standing(_P.INIT, _L.UNINIT, _G.INIT, _H.UNINIT)),
    "launch": (to_launch, Standing(_P.INIT, _L.UNINIT, _G.LAUNCH, _H.UNINIT)),
    "running": (to_running, Standing(_P.INIT, _L.UNINIT, _G.RUNNING, _H.UNINIT)),
    "legacy": (to_legacy, Standing(_P.INIT, _L.INIT, None, _H.UNINIT)),
    "legacy guest": (to_legacy_launch, Standing(_P.INIT, _L.WORKING, None, _H.LUPDATE)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_admitted_is_refused_and_no_state_refuses_the_rest(way: str) -> None:
    prepare, standing = WAYS[way]
    for command in Command:
        here = bench(initialised=False)
        prepare(here)
        assert here.standing() == standing
        layout = BUFFERS[command]
        fields = {name: CONTEXT for name in ("gctx_paddr",) if layout and name in layout.fields}
        if layout and "handle" in layout.fields and command not in (Command.LAUNCH_START, Command.RECEIVE_START):
            fields["handle"] = 1
        if layout and "length" in layout.fields:
            fields["length"] = layout.size
        if command in NOT_MODELLED:
            assert "not modelled" in obstacle(command, standing)
            continue
        offered = here.obstacle(command)
        made = here.command(command, **fields)
        if command not in here.psp.release.abi.commands:
            assert made.status is Status.INVALID_COMMAND
            assert "does not have it" in offered
        elif offered:
            assert offered == obstacle(command, standing)
            assert not made.ok, command
        elif command not in NO_RMP:
            assert made.status not in STATE_CODES, (command, made)


# A launch, page by page.

CHAIN = {
    "NORMAL": "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20",
    "ZERO": "3bb77aec4f0d90c147b6b7884b6bd5741994d2575305f89639c95186690d949261186702ef51f2fa7c0dd4c90f03ebfd",
    "UNMEASURED": "2904df3d88c1174e011bf113d78e2e6a25a8d43cbe047460257dc617210d9dbad410737337d3abcb02c82f3fff625df4",
    "SECRETS": "be5cbd2d68b9649eaa74bf51925b7722aeafd3df80590e24a91e6007453a529685fdbfde9c5ec0e2cd0def6f0e65f220",
    "CPUID": "43af46e6b20bf630da0dbc6392e51fee9dfa805945d2411f0ed748bd44e3601c016e737b423dc8af9fd91b48bc8c5cca",
    "VMSA": "f6741910fc3349f40b1f443300a3ca65c5046c5405db1dc42b13ae3d5cd36382e55114593fd48a9d80da790dbabd7b9d",
}
"""Zero-filled pages at consecutive addresses, the last one at 0xFFFFFFFFF000: computed with hashlib from PAGE_INFO."""


def test_the_digest_grows_as_computed() -> None:
    here = bench()
    begin(here)
    pages = [Page(LaunchPage[name], number << 12) for number, name in enumerate(CHAIN)]
    pages[-1] = Page(LaunchPage.VMSA, 0xFFFFFFFFF000)
    links = grow(here, pages)
    assert [link.digest.hex() for link in links] == list(CHAIN.values())
    assert all(link.hashed for link in links)
    assert links[1].info.digest_cur == links[0].digest


def test_rights_and_the_unmeasured_part_of_a_vmsa() -> None:
    here = bench()
    begin(here)
    (link,) = grow(here, [Page(LaunchPage.NORMAL, 0, rights=(0xF, 3, 1))])
    assert link.digest.hex().startswith("113f3016280394f88f6032595b95396c")
    data = bytes(0x2F0) + bytes(range(16)) + bytes(4096 - 0x300)
    assert Page(LaunchPage.VMSA, 0, data).contents == sha384(bytes(4096)).digest()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda b: b.send(-1, b""), "a mailbox register holds 32 bits"),
        (lambda b: b.send(1 << 40, b""), "a mailbox register holds 32 bits"),
        (lambda b: b.send(0x93, bytes(8), address=-8), "outside DRAM"),
        (lambda b: b.command(Command.SNP_GCTX_CREATE, gctx_paddr=-1), "does not fit 64 bits"),
        (lambda b: b.command(Command.SNP_GCTX_CREATE, page=1), "has no field 'page'"),
        (lambda b: b.assign(-4096, FIRMWARE), "spa = -4096: no address"),
        (lambda b: b.state(-1), "spa = -1: no address"),
        (lambda b: b.asid(0), "number = 0: ASIDs are 1 to 509"),
        (lambda b: b.asid(510), "ASIDs are 1 to 509"),
        (lambda b: Bench("naples", rng=bytes), "has no SNP to be switched on"),
        (lambda b: Bench("x", rng=bytes), "no product 'x'"),
        (lambda b: Chip("milan", bytes(31)), "secret has 31 bytes"),
    ],
)
def test_bad_use_is_a_value_error(use: Callable[[Bench], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        use(bench())


def test_numbers_are_numbers() -> None:
    with pytest.raises(TypeError, match="command = 'SNP_INIT': an integer"):
        bench().send("SNP_INIT", b"")  # type: ignore[arg-type]


def test_a_launch_that_cannot_go_on_says_why() -> None:
    here = bench()
    with pytest.raises(ValueError, match="call begin first"):
        grow(here, [Page(LaunchPage.NORMAL, 0)])
    begin(here)
    here.assign(SPARE, FIRMWARE)
    with pytest.raises(HostPageFault):
        grow(here, [Page(LaunchPage.NORMAL, 0)])
    here.command(Command.SNP_PAGE_RECLAIM, page=SPARE >> 12)
    here.take_back(SPARE)
    here.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=CONTEXT)
    with pytest.raises(FirmwareRefusal, match="INVALID_GUEST_STATE"):
        grow(here, [Page(LaunchPage.NORMAL, 0)])
