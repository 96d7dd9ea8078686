"""The references of the chapter on memory encryption, beyond their own cases: random answers against slow oracles."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from snpbook.exercises import exercise
from snpbook.exercises.checking import tried
from snpbook.exercises.memory_encryption import changed_blocks
from snpbook.exercises.memory_tweaks import move_mask, source_for, xor
from snpbook.hardware.tweaks import naples_constants
from snpbook.spec.encryption import Context, KeyId, Kind
from tests.reference import key_choice as reference
from tests.reference import xex

CONSTANTS = {c.bit: c.value for c in naples_constants() if c.bit < 21}
RNG = np.random.default_rng(5)


def test_changed_blocks_are_those_a_loop_finds() -> None:
    before = RNG.integers(0, 256, 8192).astype(np.uint8)
    after = before.copy()
    for place in RNG.integers(0, 8192, 40).tolist():
        after[place] ^= 1 << place % 8
    slow = [
        start for start in range(0, 8192, 16) if bytes(before[start : start + 16]) != bytes(after[start : start + 16])
    ]
    assert changed_blocks(before, after) == slow


def test_mask_is_the_difference_of_the_tweaks() -> None:
    table = [CONSTANTS[bit] for bit in sorted(CONSTANTS)]
    for source, destination in RNG.integers(0, 1 << 17, (50, 2)).tolist():
        p, q = 16 * source, 16 * destination
        assert move_mask(CONSTANTS, p, q) == xor(xex.tweak(table, p), xex.tweak(table, q))


def test_sources_are_found_or_do_not_exist() -> None:
    table = [CONSTANTS[bit] for bit in sorted(CONSTANTS)]
    known = b"a block of guest"
    for difference in RNG.integers(0, 1 << 17, 50).tolist():
        wanted = xor(known, xex.tweak(table, 16 * difference))
        assert source_for(CONSTANTS, known, wanted, 0x1F0730) == 0x1F0730 ^ 16 * difference
        assert source_for(CONSTANTS, known, xor(wanted, b"\1" + bytes(15)), 0x1F0730) == -1


def brute_force(constants: dict[int, bytes], known: bytes, wanted: bytes, destination: int) -> int:
    """Another right way: every difference in a dictionary."""
    found = {0: 0}
    for bit, constant in constants.items():
        value = int.from_bytes(constant, "big")
        found |= {value ^ other: used | 1 << bit for other, used in found.items()}
    difference = found.get(int.from_bytes(known, "big") ^ int.from_bytes(wanted, "big"))
    return -1 if difference is None else destination ^ difference


def wbinvd_where_it_is_not_dear(coherent: bool, page_flush: bool, retire: bool) -> str:
    return "WBINVD" if retire or not page_flush else "VMPAGE_FLUSH"


def key_by_elimination(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    if context in (Context.HOST, Context.GUEST) or kind == Kind.NESTED_WALK or (kind == Kind.DATA and not guest_c):
        return KeyId.HOST if host_c else KeyId.UNENCRYPTED
    return asid


def replay_after_every_second_try(host: Any, guest: Any, spa: int, size: int) -> int:
    block = spa // 16 * 16
    full = host.read(block, 16)
    for pin in range(100):
        if guest.try_pin(pin) == "open":
            return pin
        if pin % 2:
            host.write(block, full)
    return -1


@pytest.mark.parametrize(
    ("identifier", "answer"),
    [
        ("memory_encryption.1", lambda a, b: np.unique(np.flatnonzero(a != b) // 16 * 16)),
        ("memory_encryption.2", key_by_elimination),
        ("memory_encryption.3", wbinvd_where_it_is_not_dear),
        ("memory_encryption.4", replay_after_every_second_try),
        ("memory_encryption.6", lambda *given: np.frombuffer(move_mask(*given), np.uint8)),
        ("memory_encryption.7", brute_force),
        ("memory_encryption.7", lambda *given: np.int64(source_for(*given))),
    ],
)
def test_other_right_answers_pass(identifier: str, answer: Any) -> None:
    assert tried(exercise(identifier), answer)


@pytest.mark.parametrize(
    ("identifier", "answer", "words"),
    [
        ("memory_encryption.2", lambda *_: 77, "nonsense under key id 77"),
        ("memory_encryption.3", lambda *_: "INVD", "'INVD' is none of CLFLUSH, VMPAGE_FLUSH, WBINVD"),
        ("memory_encryption.3", lambda *_: [], "[] is none of"),
        ("memory_encryption.1", lambda *_: 288, "Rule: expected a list, found a number"),
        ("memory_encryption.5", lambda *_: {4: bytes(8)}, "Rule: expected 16 bytes, found 8 bytes"),
        ("memory_encryption.6", lambda *_: bytes(8), "Rule: expected 16 bytes, found 8 bytes"),
        ("memory_encryption.6", lambda *_: 5, "Rule: expected 16 bytes, found a number"),
        ("memory_encryption.7", lambda *_: "nowhere", "found nowhere, which is the address of no block"),
        ("memory_encryption.7", lambda *_: 1 << 40, "found 1099511627776"),
    ],
)
def test_strange_answers_are_told(identifier: str, answer: Any, words: str) -> None:
    assert words in repr(tried(exercise(identifier), answer))


def test_key_of_is_the_manual() -> None:
    key_of = exercise("memory_encryption.2").reference
    whos = dict(zip(Context, ("host", "guest", "sev", "sev-es", "snp"), strict=True))
    kinds = dict(zip(Kind, ("data", "fetch", "guest walk", "nested walk"), strict=True))
    for context, kind, guest_c, host_c in product(Context, Kind, (False, True), (False, True)):
        expected, _ = reference.choose(
            whos[context], kinds[kind], guest_c, host_c, 7, "long", "off", vte=False, mem_encryption=True, tsme=False
        )
        assert key_of(context, kind, guest_c, host_c, 7) == expected
