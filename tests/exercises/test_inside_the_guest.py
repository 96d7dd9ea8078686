"""The exercises of the chapter on the guest: the references against the guest's own code and slow oracles, the theatre.

Expected numbers are typed again from the documents.
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest

from snpbook.attest.checks import Result
from snpbook.exercises import exercise
from snpbook.exercises.accepted_once import REPLAY, asked_lists, fate, lists, played, reads
from snpbook.exercises.boot_requests import acceptance_costs
from snpbook.exercises.checking import tried
from snpbook.exercises.inside_the_guest import believable, goes_on
from snpbook.exercises.replay import replayed
from snpbook.exercises.theatre import SCENES, Tampering, label, play
from snpbook.exercises.tried_guest import PATIENCE, Withheld, tried_guest
from snpbook.spec.cpuid import Registers
from snpbook.spec.ghcb import GHCB, valid_bitmap
from snpbook.spec.layout import Record
from tests.machines import booted, launched
from tests.sampling import sampled

CPUID, IN, SHARE, REPORT, WBINVD = (
    "CPUID 1: what am I?", "IN: a byte of the clock", "five pages become shared", "an attestation report",
    "WBINVD: write back the caches",
)  # fmt: skip


# References.


def test_an_id_is_good_where_nothing_is_overwritten() -> None:
    for number, byte, vcpus, taken in product(range(6), range(6), (1, 4), ({0}, set(), {0, 1, 2})):
        areas = [processor in taken for processor in range(vcpus)]
        good = number < len(areas) and not areas[number] and byte == number
        told = {1: Registers(ebx=byte << 24 | 0x80_0800), 0xB: Registers(1, 2, 0x100, number)}
        assert believable(told, vcpus, taken) is good


@pytest.mark.parametrize("seed", sampled(range(120), 10))
def test_the_list_check_is_the_guests_own(seed: int) -> None:
    """The scene in which five pages become shared, with an answer at random: the guest's own code is the oracle."""
    rng = Random(seed)
    change = {"cur_entry": rng.choice([0, 1, 3, 5, 6]), "end_entry": rng.choice([3, 4, 4, 4, 5])}
    reserved, result = rng.choice([0, 0, 1 << 24]), rng.choice([0, 0, 1 << 32])

    def lie(number: int, answer: Record) -> Record:
        if number:
            return answer
        header = change["cur_entry"].to_bytes(2, "little") + change["end_entry"].to_bytes(2, "little")
        buffer = header + reserved.to_bytes(4, "little") + answer.shared_buffer[8:]
        return answer.replace(shared_buffer=buffer, sw_exit_info_2=result)

    run = tried_guest().run(SCENES[SHARE].act, lie)
    assert goes_on(5, 0, {**change, "reserved": reserved, "result": result}) is not run.failed


def test_fates() -> None:
    assert {(code, carry, large): fate(code, carry, large) for code in (0, 1, 6) for carry in (False, True)
            for large in (False, True)} == {
        (0, False, False): "done", (0, False, True): "done", (0, True, False): "end", (0, True, True): "end",
        (1, False, False): "end", (1, False, True): "end", (1, True, False): "end", (1, True, True): "end",
        (6, False, False): "end", (6, False, True): "smaller", (6, True, False): "end", (6, True, True): "smaller",
    }  # fmt: skip


@pytest.mark.parametrize("seed", sampled(range(60), 4))
def test_reads_are_the_machines(seed: int) -> None:
    """Games at random; what is read was written before, as far as the guest could."""
    rng = Random(seed)
    moves: list[tuple[str, ...]] = [("map", "A"), ("validate",), ("write", "a"), ("map", "B")]
    written = False
    for step in range(12):
        what = rng.choice(["map A", "map B", "validate", "write", "read"])
        if what == "validate" and not written:
            moves += [("map", "B"), ("validate",), ("write", "b")]
            written = True
        elif what.startswith("map"):
            moves.append(("map", what[-1]))
        elif what != "validate":
            moves.append(("write", str(step)) if what == "write" else ("read",))
    assert reads(moves) == played(tuple(moves))


def test_the_game_ends_in_a_replay() -> None:
    assert played(REPLAY) == ["#VC", "old"]


@pytest.mark.parametrize(("first", "count", "entries"), [(0x240, 0x123, 17), (0x1F0, 0x3F1, 253), (0x200, 0x400, 1)])
def test_lists_are_what_a_guest_sends(first: int, count: int, entries: int) -> None:
    assert lists(first, count, entries) == asked_lists(first, count, entries)


def test_lists_of_64_gib() -> None:
    assert (lists(1, 16_777_216 - 512, 253), lists(0, 64 << 18, 253)) == (129 + 3, 130)
    assert -(-16_777_216 // 253) == 66_314


def test_a_replay_needs_a_guest_that_validates_at_faults() -> None:
    assert "#VC 0x404" in replayed(validates_at_faults=False)
    assert replayed(validates_at_faults=True) == "the program reads 'balance: 100'"
    assert "#VC 0x404" in replayed(validates_at_faults=False), "the check is back"


# Answers that are none.


def explodes(*_: Any) -> Any:
    raise KeyError("oh")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_whatever_an_answer_does_is_told(number: int) -> None:
    asked = exercise(f"inside_the_guest.{number}")
    assert "KeyError" in repr(tried(asked, explodes))
    assert "[1]" in repr(tried(asked, lambda *_: [1]))


@pytest.mark.parametrize(("number", "reference"), [(1, believable), (2, goes_on)])
@pytest.mark.parametrize("kind", [int, np.bool_])
def test_true_and_false_may_be_of_any_type(number: int, reference: Any, kind: Any) -> None:
    assert tried(exercise(f"inside_the_guest.{number}"), lambda *told: kind(reference(*told)))


@pytest.mark.parametrize(
    ("number", "said", "words"),
    [(1, 2, "2, which is neither True nor False"), (2, "yes", "'yes', which is neither True nor False"),
     (3, "Done", "'Done', which is none of 'done', 'smaller', 'end'"), (1, ..., "does not return a value"),
     (2, ..., "does not return a value"), (3, None, "does not return a value")],
)  # fmt: skip
def test_what_is_no_verdict_is_told_as_such(number: int, said: object, words: str) -> None:
    assert words in repr(tried(exercise(f"inside_the_guest.{number}"), lambda *_: said))


# What memory costs.


def test_costs_are_counted_and_reckoned() -> None:
    """16 MiB are 4,096 pages or 8 of 2 MB; 64 GiB are 16,777,216 pages or 32,768 of 2 MB."""
    rows = [line.split()[-5:] for line in acceptance_costs("16 MiB", "64 GiB").text.splitlines()[3:6]]
    assert rows == [
        ["17", "4,096", "0", "66,314", "262,144"],
        ["1", "4,104", "8", "130", "512"],
        ["1", "8", "0", "130", "512"],
    ]


# The guest on which answers are tried.


def test_a_host_tells_each_processor_its_own_id() -> None:
    guest = launched(booted(era="mainline"), vcpus=3)
    for number, vcpu in enumerate(guest.vmm.vcpus):
        entries = {(entry.function, entry.index): entry for entry in vcpu.cpuid}
        assert entries[1, 0].ebx >> 24 == entries[0xB, 0].edx == entries[0xB, 1].edx == number
        assert entries[0x8000001E, 0].eax == number


def test_every_run_begins_where_the_boot_ended() -> None:
    async def leave(kernel: Any) -> bytes:
        found: bytes = await kernel.cpu.read(0x300000, 5)
        await kernel.cpu.write(0x300000, b"left!")
        return found

    assert tried_guest().run(leave).outcome == tried_guest().run(leave).outcome != b"left!"


def test_a_host_that_serves_nothing_is_noticed() -> None:
    async def ask_for_ever(kernel: Any) -> None:
        while True:
            await kernel.channel.features()

    run = tried_guest().run(ask_for_ever)
    assert isinstance(run.outcome, Withheld)
    assert len(run.exchanges) == PATIENCE + 1


# The theatre.


@pytest.mark.parametrize("kind", ["snp", "sev-es"])
@pytest.mark.parametrize("name", list(SCENES))
def test_every_scene_goes_on_with_an_honest_host(name: str, kind: str) -> None:
    if kind == "sev-es" and not SCENES[name].es:
        with pytest.raises(ValueError, match="does not ask for that"):
            play(name, kind=kind)
        return
    made = play(name, kind=kind)
    assert made.result is Result.PASSED
    assert made.exchange.found == made.exchange.answered
    assert not any(step.tampered for step in made.steps)
    assert "VGEXIT" not in made.told


@pytest.mark.parametrize("name", list(SCENES))
def test_without_a_mark_every_scene_stops(name: str) -> None:
    for field in SCENES[name].fields:
        if field.startswith("mark of"):
            made = play(name, Tampering(field, 0))
            assert made.result is Result.FAILED, field
            assert made.steps[-1].words == "ends here"


@pytest.mark.parametrize(
    ("name", "field", "value", "kind", "result", "words"),
    [
        (CPUID, "rbx", 7 << 24, "snp", Result.PASSED, "APIC id 7"),
        (CPUID, "rbx", 0xFFFFFFFF, "snp", Result.PASSED, "FF800800"),
        (CPUID, "rax", 5, "snp", Result.PASSED, "00A00F11"),
        (CPUID, "rax", 5, "sev-es", Result.PASSED, "00000005"),
        (CPUID, "sw_exit_info_1", 2, "snp", Result.FAILED, "set 1, 5"),
        (IN, "rax", 0xFFFFFF99, "snp", Result.PASSED, "reads 0x99"),
        (IN, "sw_exit_info_1", 2, "snp", Result.FAILED, "set 0, 0"),
        (WBINVD, "sw_exit_info_1", 1, "snp", Result.FAILED, "set 0, 0"),
        (SHARE, "cur_entry", 2, "snp", Result.PASSED, "5 pages"),
        (SHARE, "cur_entry", 0, "snp", Result.FAILED, "set 1, 1"),
        (SHARE, "cur_entry", 6, "snp", Result.FAILED, "set 1, 1"),
        (SHARE, "end_entry", 5, "snp", Result.FAILED, "set 1, 1"),
        (SHARE, "reserved", 1, "snp", Result.FAILED, "set 1, 1"),
        (SHARE, "sw_exit_info_2", 1 << 32, "snp", Result.FAILED, "set 1, 1"),
        (REPORT, "sw_exit_info_2", 0x16, "snp", Result.FAILED, "EIO"),
    ],
)
def test_what_the_guest_makes_of_a_lie(
    name: str, field: str, value: int, kind: str, result: Result, words: str
) -> None:
    made = play(name, Tampering(field, value), kind)
    assert made.result is result
    assert words in made.told
    (told,) = [step for step in made.steps if step.tampered]
    assert told.words == f"writes {label(field)} = {value:#x}"


def test_a_list_that_stops_early_is_asked_for_again() -> None:
    words = [step.words for step in play(SHARE, Tampering("cur_entry", 2)).steps]
    assert words.count("VMGEXIT") == 2
    assert words.count("KVM_RUN returns") == 1, "the second time everything is done already"


def test_a_busy_host_ends_the_drivers_patience() -> None:
    made = play(REPORT, Tampering("sw_exit_info_2", 2 << 32, every=True))
    assert "ETIMEDOUT" in made.told
    assert sum(step.words == "VMGEXIT" for step in made.steps) == 30


@pytest.mark.parametrize(("field", "value"), [("rax", 1 << 64), ("cur_entry", 1 << 16), ("mark of rax", 2),
                                             ("reserved", 1 << 32)])  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(field: str, value: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        play(SHARE if field in ("cur_entry", "reserved") else CPUID, Tampering(field, value))


def test_the_hand_writes_where_the_document_has_it() -> None:
    buffer = bytes(range(16)).ljust(2032, b"\0")
    page = GHCB.record(shared_buffer=buffer, valid_bitmap=valid_bitmap("rax"))
    raw = bytes(Tampering("reserved", 0xAABBCCDD)(0, page))
    assert raw[0x800:0x808] == b"\0\1\2\3\xdd\xcc\xbb\xaa"
    assert bytes(Tampering("end_entry", 0x1234)(0, page))[0x800:0x808] == b"\0\1\x34\x12\4\5\6\7"
    assert (
        bytes(Tampering("mark of rbx", 1)(0, page))[0x3F0:0x400].hex() == "0000000000000080" + "00000000" + "08000000"
    )
    assert Tampering("rax", 1)(1, page) == page, "only the first answer"
    assert Tampering("rax", 1, every=True)(1, page).rax == 1
