"""Exercises on memory encryption: what ciphertext gives away, and who decides on the key.

Every case sets up an engine of the model, with its memory, and runs the reader's answer on it; none compares with a
table. Facts are those of `spec.encryption`.
"""

from hashlib import shake_256
from itertools import count, product
from typing import Any

import numpy as np

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.hardware.dram import Bytes, Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.key_choice import choose_keys
from snpbook.spec.encryption import SCHEMES, Context, KeyId, Kind
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE

GUEST, OTHER = 1, 2
"""The ASIDs of the guests in these exercises."""


def machine(scheme: str) -> MemoryEncryption:
    """A small machine with keys for two guests."""
    engine = MemoryEncryption(Dram(LARGE_PAGE_SIZE), scheme, b"exercise")
    for asid in (GUEST, OTHER):
        engine.install(asid, shake_256(f"guest {asid}".encode()).digest(SCHEMES[scheme].key_size))
    return engine


# 1: what has changed


def _raw(engine: MemoryEncryption) -> Bytes:
    """The first two pages as the module's cells hold them, one array."""
    return engine.read_pages(KeyId.UNENCRYPTED, range(2)).flatten()


def _like_zero(spa: int) -> bytes:
    """A value whose ciphertext begins with the same byte as that of zero."""
    engine = machine("xex-aes-128")

    def first(value: bytes) -> int:
        engine.write(GUEST, spa, value)
        return engine.read(KeyId.UNENCRYPTED, spa, 1)[0]

    of_zero = first(bytes(16))
    return next(value for n in count(1) if first(value := n.to_bytes(16, "little")) == of_zero)


def _change_cases() -> list[Case]:
    def case(name: str, old: bytes, new: bytes, spa: int, expected: list[int], rule: str) -> Case:
        def run(answer: Answer) -> object:
            engine = machine("xex-aes-128")
            engine.write(GUEST, spa, old)
            before = _raw(engine)
            engine.write(GUEST, spa, new)
            return answer(before, _raw(engine))

        return Case(name, run, expected, rule, "spec.encryption; CIPHERLEAKS (Li et al., 2021)")

    return [
        case(
            "the first 4 bytes of memory are written", bytes(16), b"yes!", 0, [0],
            "AES turns whole blocks of 16 bytes: name each block once, by the offset at which it begins",
        ),
        case(
            "a word in the middle of a page", bytes(16), b"yes!", 0x124, [0x120],
            "an offset counts bytes from the start, not blocks",
        ),
        case(
            "a word that lies across two blocks", bytes(16), b"password", 0x14C, [0x140, 0x150],
            "8 bytes may touch two blocks, and both change",
        ),
        case(
            "the same value once more", b"a fair coin: no!", b"a fair coin: no!", 0x200, [],
            "the same key, address and plaintext give the same ciphertext: nothing is seen, and nothing changed",
        ),
        case(
            "a block whose first byte stays", bytes(16), _like_zero(0x1230), 0x1230, [0x1230],
            "two ciphertexts may have bytes in common: compare all 16 of a block",
        ),
    ]  # fmt: skip


def changed_blocks(before: Bytes, after: Bytes) -> list[int]:
    """The offsets of the 16-byte blocks that are not what they were."""
    different = (before.reshape(-1, 16) != after.reshape(-1, 16)).any(axis=1)
    return [16 * int(number) for number in np.flatnonzero(different)]


def _bytes_that_differ(before: Bytes, after: Bytes) -> Any:
    return np.flatnonzero(before != after)


def _block_numbers(before: Bytes, after: Bytes) -> Any:
    return np.flatnonzero((before.reshape(-1, 16) != after.reshape(-1, 16)).any(axis=1))


def _first_bytes(before: Bytes, after: Bytes) -> Any:
    return 16 * np.flatnonzero(before[::16] != after[::16])


register(
    Exercise(
        id="memory_encryption.1",
        title="What has changed?",
        minutes=10,
        difficulty=1,
        prerequisites=("NumPy arrays",),
        task=(
            "You are a thief with two copies of a memory module's contents, taken one after the other: arrays of "
            "uint8 with two pages. You have no key. Return the list of the offsets, in bytes, of the 16-byte blocks "
            "that have changed in between."
        ),
        stub='''\
def changed_blocks(before, after):
    """The offsets of the 16-byte blocks that are not what they were."""
    ...
''',
        reference=changed_blocks,
        wrong=(
            Wrong(_bytes_that_differ, "whole blocks of 16 bytes"),
            Wrong(_block_numbers, "counts bytes from the start, not blocks"),
            Wrong(_first_bytes, "compare all 16 of a block"),
        ),
        hints=(
            "One changed bit of plaintext changes all 16 bytes of its block, in a way that nobody can predict.",
            "before.reshape(-1, 16) has one row for each block.",
            "(before.reshape(-1, 16) != after.reshape(-1, 16)).any(axis=1) says which rows differ; np.flatnonzero "
            "gives their numbers, and 16 times a number is an offset.",
        ),
        solution=(
            "Encryption hides what was written, not that it was written: where a block changes, its guest has changed "
            "it. And where it does not change, it was not written, or written with the same value. That second half is "
            "what makes the leak dangerous."
        ),
        cases=_change_cases,
    )
)


# 2: whose key


def _key_cases() -> list[Case]:
    """Every combination, guests with a key of their own first."""
    engine = machine("xex-aes-128")
    contexts = (Context.SEV, Context.SEV_ES, Context.SNP, Context.HOST, Context.GUEST)
    return [_key_case(engine, *combination) for combination in product(contexts, Kind, (True, False), (False, True))]


def _key_case(engine: MemoryEncryption, context: Context, kind: Kind, guest_c: bool, host_c: bool) -> Case:
    asid = OTHER if context == Context.SNP else GUEST

    def run(answer: Answer) -> object:
        right = int(choose_keys(context, kind, guest_c, host_c, asid).keys)
        engine.write(right, PAGE_SIZE, b"a page-table row")
        key_id = answer(context, kind, guest_c, host_c, asid)
        if key_id is None or key_id is Ellipsis:
            return key_id
        seen = engine.read(key_id, PAGE_SIZE, 16) if engine.has_key(key_id) else b""
        return "the data" if seen == b"a page-table row" else f"nonsense under key id {int(key_id)}"

    name = f"Context.{context.name}, Kind.{kind.name}, guest_c={guest_c}, host_c={host_c}"
    return Case(name, run, "the data", _key_rule(context, kind, guest_c, host_c), "APM2, tables 15-30 and 15-31")


def _key_rule(context: Context, kind: Kind, guest_c: bool, host_c: bool) -> str:
    if context == Context.HOST:
        return "the host has no ASID: its own C-bit asks for the key of the host, and without it nothing is encrypted"
    if context == Context.GUEST:
        return "only SEV guests have a key and a C-bit of their own; for the others the host's C-bit decides"
    if kind == Kind.NESTED_WALK:
        return "nested tables are the host's: its C-bit decides, and the guest has no say"
    if kind == Kind.FETCH:
        return "a guest's code is always private, whatever the C-bits say"
    if kind == Kind.GUEST_WALK:
        return "a guest's page tables are always private, whatever the C-bits say"
    if guest_c and host_c:
        return "where both ask, the guest's key wins"
    if guest_c:
        return "the C-bit of the guest's own tables asks for the guest's key"
    if host_c:
        return "what a guest shares may still be encrypted, with the key of the host"
    return "a guest shares data by clearing the C-bit: where the host's is clear, too, nothing is encrypted"


def key_of(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    """The key id of an access."""
    guest_has_key = context in (Context.SEV, Context.SEV_ES, Context.SNP)
    if guest_has_key and kind in (Kind.FETCH, Kind.GUEST_WALK):
        return asid
    if guest_has_key and kind == Kind.DATA and guest_c:
        return asid
    return KeyId.HOST if host_c else KeyId.UNENCRYPTED


def _only_the_c_bit(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return asid if guest_c else KeyId.HOST if host_c else KeyId.UNENCRYPTED


def _guests_are_private(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return asid if context >= Context.SEV else KeyId.HOST if host_c else KeyId.UNENCRYPTED


def _whoever_fetches(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return asid if kind in (Kind.FETCH, Kind.GUEST_WALK) else key_of(context, kind, guest_c, host_c, asid)


def _never_encrypts_nested(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return KeyId.UNENCRYPTED if kind == Kind.NESTED_WALK else key_of(context, kind, guest_c, host_c, asid)


def _any_guest(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return key_of(Context.SEV if context == Context.GUEST else context, kind, guest_c, host_c, asid)


def _host_first(context: Context, kind: Kind, guest_c: bool, host_c: bool, asid: int) -> int:
    return KeyId.HOST if host_c else key_of(context, kind, guest_c, host_c, asid)


register(
    Exercise(
        id="memory_encryption.2",
        title="Whose key?",
        minutes=10,
        difficulty=1,
        prerequisites=("the lab on who decides",),
        task=(
            "Return the key id of an access: an ASID for a guest's key, KeyId.HOST or KeyId.UNENCRYPTED. You are given "
            "who makes the access, a Context: HOST, GUEST (one without SEV), SEV, SEV_ES or SNP; what for, a Kind: "
            "DATA, FETCH, GUEST_WALK (of the guest's page tables) or NESTED_WALK (of the tables that the host "
            "controls); the C-bit of the guest's page tables, that of the host's or nested tables, and the guest's "
            "ASID. The data is then read under your key. Every combination is tried."
        ),
        stub='''\
def key_of(context, kind, guest_c, host_c, asid):
    """The key id of an access."""
    ...
''',
        reference=key_of,
        wrong=(
            Wrong(_only_the_c_bit, "a guest's code is always private"),
            Wrong(_guests_are_private, "shares data by clearing the C-bit"),
            Wrong(_whoever_fetches, "the host has no ASID"),
            Wrong(_never_encrypts_nested, "nested tables are the host's: its C-bit decides"),
            Wrong(_any_guest, "only SEV guests have a key and a C-bit of their own"),
            Wrong(_host_first, "the guest's key wins"),
        ),
        hints=(
            "Three questions, in this order: has this party a key of its own? Is the access of a kind for which the "
            "C-bit does not count? What do the C-bits say?",
            "Instruction fetches and walks of the guest's page tables are private in every SEV guest. Nested tables "
            "belong to the host.",
            "If context is SEV, SEV_ES or SNP: FETCH and GUEST_WALK give asid, DATA gives asid where guest_c is set. "
            "All that is left is decided by host_c: KeyId.HOST or KeyId.UNENCRYPTED.",
        ),
        solution=(
            "The guest decides on its data, and the hardware on its code and page tables: a host that could have them "
            "read without the guest's key could have the guest run anything. The host decides on what is its own, and "
            "on what a guest has chosen to share."
        ),
        cases=_key_cases,
    )
)
