"""Any bytes in any command buffer, message or page that a command reads: a status answers, and no secret shows.

Long sequences come from seeded generators, single commands from Hypothesis, nearly valid buffers from the oracle's own.
"""

from __future__ import annotations

import time
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.firmware.table import COMMANDS
from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.releases import release
from snpbook.spec.snp_buffers import SNP_GUEST_REQUEST
from snpbook.spec.status import Status
from snpbook.vendor.images import firmware_image
from tests.firmware.fuzzing import STAGES, Run, Step, mutated, request, stage, step
from tests.firmware.leaks import image, secrets, shown
from tests.firmware.test_product import SPECS
from tests.firmware.test_requests import report_request, seal
from tests.firmware.typical import BLANK, INPUT
from tests.firmware.worlds import MEMORY, realise
from tests.machines import BUFFER, FREE, GCTX, PAGE, Board
from tests.reference.firmware_cases import valid
from tests.sampling import ALL, sampled

FIRST, SECONDS = 4, 15 if ALL else 0
"""How many sequences are tried from each stage, and how long further ones."""


# The scanner.


@pytest.mark.parametrize("name", STAGES)
def test_the_scanner_finds_every_planted_secret(name: str) -> None:
    prepared = stage(name)
    board = prepared.restore()
    known = secrets(board)
    assert len(known) > 10, known
    before, blank = image(board), board.machine.dram.read(INPUT[0], 2 * PAGE)
    for number, secret in enumerate(sorted(known)):
        start, at = (len(secret) - 16) // 2, INPUT[0] + (16, 5, PAGE - 7)[number % 3]
        window = secret[start : start + 16]
        broken = secret[max(start - 1, 0)] ^ 1, *window[:15], window[15] ^ 1
        board.machine.dram.write(at - 1, bytes(broken))
        assert shown(board, before, known) == [], "15 bytes are no window"
        board.machine.dram.write(at, window)
        assert shown(board, before, known) == [(at, window)]
        board.machine.dram.write(INPUT[0], blank)


def test_the_scanner_knows_the_secrets_of_every_kind() -> None:
    """A secret's windows must be those that the guest has, or it would find nothing."""
    board = stage("RUNNING").restore()
    context = board.psp.context(GCTX)
    assert {context.vek_seed, context.oek, context.vmpck0, context.vmpck3, context.vmrk} < secrets(board)
    assert {board.psp.chip.secret, board.psp.hashstick(board.psp.committed_tcb)} < secrets(board)
    board = stage("legacy SUPDATE").restore()
    identity, guest = board.psp.legacy.identity, board.psp.legacy.guests[1]
    assert identity is not None
    assert {identity.pek_key, identity.pdh_key, guest.transport.encryption, guest.oek} < secrets(board)


# Sequences.


@pytest.mark.parametrize("name", STAGES)
def test_any_sequence_of_commands(name: str) -> None:
    seed, end = 0, time.monotonic() + SECONDS
    while seed < FIRST or time.monotonic() < end:
        random, run = Random(f"{name} {seed}"), Run.of(name)
        for _ in range(random.randrange(1, 16)):
            run.play(step(random, run.board))
        run.assert_tight()
        seed += 1


@pytest.mark.parametrize("name", ["RUNNING", "LAUNCH", "RUNNING, 1.58", "both"])
def test_any_guest_message(name: str) -> None:
    seed, end = 0, time.monotonic() + SECONDS
    while seed < FIRST or time.monotonic() < end:
        random, run = Random(f"message {name} {seed}"), Run.of(name)
        for _ in range(random.randrange(1, 12)):
            run.play(request(random, run.board))
            if run.steps[-1][1] is Status.INVALID_GUEST:
                break
        run.assert_tight()
        seed += 1


@pytest.mark.parametrize("command", sampled([name for name in SPECS if SPECS[name].size], 16))
def test_nearly_valid_buffers(command: str) -> None:
    """The oracle's valid case, and some bits of buffer and of what it points to changed."""
    case, spec = valid(command, SPECS[command]), SPECS[command]
    board = realise(case.world)
    if command in MEMORY:
        MEMORY[command](board, case.world, case.request)
    data = spec.encode(case.request)
    for seed in range(40 if ALL else 4):
        random = Random(f"{command} {seed}")
        before, known = image(board), secrets(board)
        spoilt = mutated(random, data)
        board.machine.dram.write(BUFFER, spoilt)
        assert board.send(spec.number, BUFFER) in Status, (command, spoilt.hex())
        assert not shown(board, before, known | secrets(board)), (command, spoilt.hex())


# Single commands.


@given(data=st.data(), name=st.sampled_from([*STAGES]), command=st.sampled_from([*COMMANDS]))
def test_any_bytes_in_a_buffer(data: st.DataObject, name: str, command: Command) -> None:
    layout, run = BUFFERS[command], Run.of(name)
    size = layout.size if layout else 0
    run.play(Step(command, BUFFER, data.draw(st.binary(min_size=size, max_size=size), "buffer")))
    run.assert_tight()


@given(data=st.data(), name=st.sampled_from(["RUNNING", "both"]))
def test_any_bytes_in_a_message(data: st.DataObject, name: str) -> None:
    """Not sealed by anybody: the envelope's checks answer."""
    run = Run.of(name)
    noise = data.draw(st.binary(max_size=PAGE), "message")
    fields = SNP_GUEST_REQUEST.pack(gctx_paddr=GCTX, request_paddr=INPUT[0], response_paddr=BLANK[0])
    status = run.play(Step(Command.SNP_GUEST_REQUEST, BUFFER, fields, ((INPUT[0], noise),)))
    assert status in (Status.INVALID_PARAM, Status.BAD_MEASUREMENT)
    run.assert_tight()


# What searching has found, or thinking.


@pytest.mark.parametrize("command", [Command.SNP_GUEST_STATUS, Command.SNP_DECOMMISSION, Command.SNP_LAUNCH_START])
def test_a_context_that_was_overwritten_while_snp_was_off(command: Command) -> None:
    """Page states are not tested then, and INIT_RMP = 0 keeps them: what stands in the page is noise."""
    board = Board().initialise()
    board.create()
    board.ok(Command.SNP_SHUTDOWN)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=GCTX)
    board.ok(Command.SNP_INIT_EX, init_rmp=0)
    board.assign(FREE, FIRMWARE)
    fields = {"gctx_paddr": GCTX} | ({"status_paddr": FREE} if command is Command.SNP_GUEST_STATUS else {})
    assert board.command(command, (), **fields) is Status.INVALID_GUEST


def test_an_update_taken_back_while_its_stick_is_in_use() -> None:
    """SNP_INIT takes the stick of the running firmware, which its predecessor has no way to."""
    board = Board()
    for svn in (25, 24):
        new = firmware_image("milan", release("1.55"), build=40, svn=svn)
        board.machine.dram.write(INPUT[0], new)
        board.ok(Command.SNP_DOWNLOAD_FIRMWARE_EX, fw_paddr=INPUT[0], fw_len=len(new))
        if svn == 25:
            board.initialise().start()
            board.finish()
    board.machine.dram.write(INPUT[0], seal(board.psp.context(GCTX).vmpck0, report_request()))
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_GUEST_REQUEST, gctx_paddr=GCTX, request_paddr=INPUT[0], response_paddr=FREE)
