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
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.status import Status
from tests.firmware.fuzzing import BLANK, INPUT, STAGES, Run, Step, buffer, mutated, request, stage, step
from tests.firmware.leaks import image, secrets, shown
from tests.firmware.test_product import SPECS
from tests.firmware.worlds import MEMORY, realise
from tests.machines import BUFFER, GCTX, PAGE
from tests.reference.firmware_cases import valid
from tests.sampling import ALL

SECONDS = 20 if ALL else 0
"""How long each stage is tried beyond the first sequences."""


# The scanner.


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("offset", [0, 5, PAGE - 7])
def test_the_scanner_finds_every_planted_secret(name: str, offset: int) -> None:
    prepared = stage(name)
    board = prepared.restore()
    known = secrets(board)
    assert len(known) > 10, known
    before, blank = image(board), board.machine.dram.read(INPUT[0] + offset - 1, 18)
    for secret in sorted(known):
        start, at = (len(secret) - 16) // 2, INPUT[0] + offset
        window = secret[start : start + 16]
        broken = secret[max(start - 1, 0)] ^ 1, *window[:15], window[15] ^ 1
        board.machine.dram.write(at - 1, bytes(broken))
        assert shown(board, before, known) == [], "15 bytes are no window"
        board.machine.dram.write(at, window)
        assert shown(board, before, known) == [(at, window)]
        board.machine.dram.write(at - 1, blank)


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
    while seed < 12 or time.monotonic() < end:
        random, run = Random(f"{name} {seed}"), Run.of(name)
        for _ in range(random.randrange(1, 16)):
            run.play(step(random, run.board))
        run.assert_tight()
        seed += 1


@pytest.mark.parametrize("name", ["RUNNING", "LAUNCH", "RUNNING, 1.58", "both"])
def test_any_guest_message(name: str) -> None:
    seed, end = 0, time.monotonic() + SECONDS
    while seed < 12 or time.monotonic() < end:
        random, run = Random(f"message {name} {seed}"), Run.of(name)
        for _ in range(random.randrange(1, 12)):
            run.play(request(random, run.board))
            if run.steps[-1][1] is Status.INVALID_GUEST:
                break
        run.assert_tight()
        seed += 1


@pytest.mark.parametrize("command", [name for name in SPECS if SPECS[name].size])
def test_nearly_valid_buffers(command: str) -> None:
    """The oracle's valid case, and some bits of buffer and of what it points to changed."""
    case, spec = valid(command, SPECS[command]), SPECS[command]
    board = realise(case.world)
    MEMORY.get(command, lambda *_: None)(board, case.world, case.request)
    data = spec.encode(case.request)
    for seed in range(100 if ALL else 4):
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
    buffer = BUFFERS[Command.SNP_GUEST_REQUEST]
    assert buffer is not None
    fields = buffer.pack(gctx_paddr=GCTX, request_paddr=INPUT[0], response_paddr=BLANK[0])
    status = run.play(Step(Command.SNP_GUEST_REQUEST, BUFFER, fields, ((INPUT[0], noise),)))
    assert status in (Status.INVALID_PARAM, Status.BAD_MEASUREMENT)
    run.assert_tight()
