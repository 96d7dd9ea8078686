"""The memory encryption engine: whole pages, bytes and keys, equal to the references on both DRAM back ends."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.cipher import STEP_PAGES
from snpbook.hardware.dram import Dram, Pages
from snpbook.hardware.encryption import MemoryEncryption, MissingKeyError
from tests.hardware.schemes import KEY_SIZES, PAGE, SCHEMES, SEED, expected, random_bytes
from tests.reference import xex as reference

SIZE = 4 << 20
BORDER = 2 << 20  # where the dictionary's first region ends
KEYS = {scheme: [hashlib.shake_256(bytes([n])).digest(size) for n in range(2)] for scheme, size in KEY_SIZES.items()}


@pytest.fixture(
    params=[(s, m) for s in SCHEMES for m in (True, False)], ids=lambda p: f"{p[0]}-{'map' if p[1] else 'dict'}"
)
def engine(request: pytest.FixtureRequest) -> tuple[MemoryEncryption, Dram]:
    scheme, mapping = request.param
    return make(scheme, mapping)


def make(scheme: str, mapping: bool) -> tuple[MemoryEncryption, Dram]:
    dram = Dram(SIZE, mapping=mapping)
    engine = MemoryEncryption(dram, scheme, SEED)
    for asid, key in enumerate(KEYS[scheme], 1):
        engine.install(asid, key)
    return engine, dram


def test_whole_pages(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    plain = random_bytes(5 * PAGE).reshape(-1, PAGE)
    for pages in (range(510, 515), range(3, 514, 127), np.array([3, 514, 0, 1023, 511], np.uint64)):
        encryption.write_pages(1, pages, plain)
        assert np.array_equal(encryption.read_pages(1, pages), plain)
        for page, row in zip(pages, plain, strict=True):
            wanted = expected(encryption.scheme, KEYS[encryption.scheme][0], int(page) * PAGE, row.tobytes())
            assert dram.read(int(page) * PAGE, PAGE) == wanted


@pytest.mark.parametrize("pages", [range(300, 700), np.random.default_rng(3).permutation(1024)[:400].astype(np.uint64)])
def test_in_place(engine: tuple[MemoryEncryption, Dram], pages: Pages) -> None:
    encryption, dram = engine
    plain = random_bytes(SIZE).reshape(-1, PAGE)
    dram.write(0, plain.reshape(-1))
    encryption.encrypt_in_place(1, pages)
    numbers = np.asarray(pages, np.int64)
    assert np.array_equal(encryption.read_pages(1, pages), plain[numbers])
    for page in numbers[[0, 211, 399]]:
        wanted = expected(encryption.scheme, KEYS[encryption.scheme][0], int(page) * PAGE, plain[page].tobytes())
        assert dram.read(int(page) * PAGE, PAGE) == wanted
    others = np.setdiff1d(np.arange(SIZE // PAGE), numbers)
    assert np.array_equal(dram.gather(others.astype(np.uint64)), plain[others])


Write = tuple[int, bytes]
WINDOW, WINDOW_SIZE = BORDER - 2 * PAGE, 4 * PAGE
writes = st.tuples(st.integers(0, WINDOW_SIZE), st.binary(max_size=40) | st.integers(0, WINDOW_SIZE).map(bytes)).filter(
    lambda write: write[0] + len(write[1]) <= WINDOW_SIZE
)


@given(st.sampled_from(SCHEMES), st.booleans(), st.lists(writes, max_size=8), writes)
def test_byte_ranges(scheme: str, mapping: bool, done: list[Write], asked: Write) -> None:
    encryption, dram = make(scheme, mapping)
    mirror = bytearray(random_bytes(WINDOW_SIZE))
    encryption.write(1, WINDOW, mirror)
    for offset, data in done:
        encryption.write(1, WINDOW + offset, data)
        mirror[offset : offset + len(data)] = data
    assert dram.read(WINDOW, WINDOW_SIZE) == expected(scheme, KEYS[scheme][0], WINDOW, bytes(mirror))
    offset, size = asked[0], len(asked[1])
    assert encryption.read(1, WINDOW + offset, size) == mirror[offset : offset + size]


def test_a_long_byte_range_is_the_same_as_its_pages(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    first, count = 450, 3 * STEP_PAGES
    plain = random_bytes(count * PAGE)
    encryption.write(1, first * PAGE, plain[:21])
    encryption.write(1, first * PAGE + 21, plain[21:])
    raw = dram.read(first * PAGE, count * PAGE)
    encryption.write_pages(1, range(first, first + count), plain.reshape(-1, PAGE))
    assert dram.read(first * PAGE, count * PAGE) == raw
    assert encryption.read(1, first * PAGE + 3, count * PAGE - 5) == plain[3:-2].tobytes()


def test_a_write_changes_the_blocks_that_it_touches_and_no_other(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    before = random_bytes(2 * PAGE)
    dram.write(0, before)
    encryption.write(1, 4090, b"eight by")
    changed = np.flatnonzero(np.frombuffer(dram.read(0, 2 * PAGE), np.uint8) != before)
    assert set(changed // 16) == {255, 256}


def test_ciphertext_depends_on_key_address_and_plaintext_only(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    plain = np.zeros((1, PAGE), np.uint8)

    def raw(asid: int, page: int) -> bytes:
        encryption.write_pages(asid, range(page, page + 1), plain)
        return dram.read(page * PAGE, PAGE)

    first = raw(1, 8)
    encryption.write_pages(1, range(8, 9), random_bytes(PAGE).reshape(1, PAGE))
    assert raw(1, 8) == first
    assert raw(1, 9) != first
    assert len({first[i : i + 16] for i in range(0, PAGE, 16)}) == PAGE // 16
    assert encryption.read(2, 8 * PAGE, PAGE) != bytes(PAGE)
    assert raw(2, 8) != first


@pytest.mark.parametrize("pages", [range(1, 6), np.array([5, 4, 3, 2, 1], np.uint64)])
def test_a_view_of_dram_may_be_the_data(engine: tuple[MemoryEncryption, Dram], pages: Pages) -> None:
    encryption, dram = engine
    raw = random_bytes(6 * PAGE).reshape(-1, PAGE)
    dram.write(0, raw.reshape(-1))
    encryption.write_pages(1, pages, dram.gather(range(5)))
    assert np.array_equal(encryption.read_pages(1, pages), raw[:5])


def test_keys_come_and_go(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, _ = engine
    encryption.write(1, 0, b"secret")
    encryption.remove(1)
    assert (encryption.has_key(1), encryption.has_key(2)) == (False, True)
    for access in (lambda: encryption.read(1, 0, 6), lambda: encryption.remove(1)):
        with pytest.raises(MissingKeyError, match="key_id = 1: no memory key"):
            access()
    encryption.install(1, KEYS[encryption.scheme][1])
    assert encryption.read(1, 0, 6) != b"secret"
    encryption.install(1, KEYS[encryption.scheme][0])
    assert encryption.read(1, 0, 6) == b"secret"


HOST = 1023


def test_key_id_0_is_unencrypted(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    plain = random_bytes(3 * PAGE).reshape(-1, PAGE)
    for pages in (range(511, 514), np.array([7, 600, 5], np.uint64)):
        encryption.write_pages(0, pages, plain)
        assert np.array_equal(dram.gather(pages), plain)
        encryption.encrypt_in_place(0, pages)
        assert np.array_equal(encryption.read_pages(0, pages), plain)
    encryption.write(0, 0x1003, b"bytes")
    assert dram.read(0x1000, 10) == b"\0\0\0bytes\0\0"
    assert encryption.read(0, 0x1002, 7) == b"\0bytes\0"
    assert not encryption.key(0).tweaks(0x100, 48).any()


def test_the_host_has_a_key_of_each_boot() -> None:
    for scheme in SCHEMES:
        dram = Dram(SIZE)
        first, second = (MemoryEncryption(dram, scheme, seed) for seed in (b"a", b"b"))
        first.write(HOST, 64, bytes(16))
        raw = dram.read(64, 16)
        assert first.read(HOST, 64, 16) == bytes(16) != second.read(HOST, 64, 16)
        constants = [c.value for c in first.constants]
        if constants:
            key, after = first.key(HOST).value, scheme != "naples-xe"
            assert raw == reference.encrypt(constants, key, 64, bytes(16), after=after)


@given(st.sampled_from(SCHEMES), st.booleans(), st.sampled_from([0, 1, HOST]), st.data())
def test_words(scheme: str, mapping: bool, key_id: int, data: st.DataObject) -> None:
    encryption, _ = make(scheme, mapping)
    plain = random_bytes(WINDOW_SIZE)
    encryption.write(key_id, WINDOW, plain)
    size = data.draw(st.integers(0, 9))
    places = np.array(data.draw(st.lists(st.integers(0, WINDOW_SIZE // 8 - 1), min_size=2 * size, max_size=2 * size)))
    addresses = (WINDOW + 8 * places.astype(np.uint64)).reshape(2, size)
    wanted = plain.view("<u8")[places.astype(int)].reshape(2, size)
    assert np.array_equal(encryption.words(key_id, addresses), wanted)


def test_keys_of_a_snapshot_come_back(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, _ = engine
    first, second = KEYS[encryption.scheme]
    encryption.write(1, 0, b"secret")
    before = encryption.snapshot()
    encryption.install(1, second)
    encryption.remove(2)
    encryption.install(3, first)
    assert encryption.snapshot() != before
    encryption.restore(before)
    assert encryption.snapshot() == before
    assert encryption.read(1, 0, 6) == b"secret"
    encryption.install(1, first)
    assert encryption.snapshot() == before
    assert encryption.has_key(2)


def test_empty_operands(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, dram = engine
    none = np.array([], np.uint64)
    for pages in (range(3, 3), none):
        assert encryption.read_pages(1, pages).shape == (0, PAGE)
        encryption.write_pages(1, pages, np.empty((0, PAGE), np.uint8))
        encryption.encrypt_in_place(1, pages)
    encryption.write(1, SIZE, b"")
    assert encryption.read(1, 5, 0) == b""
    assert not any(dram.read(0, SIZE))


ROW = np.zeros((1, PAGE), np.uint8)
BAD: list[tuple[Callable[[MemoryEncryption], Any], type[Exception], str]] = [
    (lambda e: e.read_pages(1, 5.0), TypeError, "pages = 5.0: a range or an array of integers"),
    (lambda e: e.read_pages(1, [5]), TypeError, r"pages = \[5\]"),
    (lambda e: e.read_pages(1, np.array([5.0])), TypeError, r"pages = float64 \(1,\)"),
    (lambda e: e.read_pages(1, np.array([5, -1])), ValueError, "pages: -1 is no page number"),
    (lambda e: e.write_pages(1, np.zeros((1, 1), np.uint64), ROW), TypeError, r"pages = uint64 \(1, 1\)"),
    (lambda e: e.write_pages(1, range(4, 0, -2), np.zeros((2, PAGE), np.uint8)), ValueError, "a run goes upwards"),
    (lambda e: e.write_pages(1, range(1024, 1025), ROW), ValueError, "pages: page 0x400 is beyond the last, 0x3ff"),
    (lambda e: e.write_pages(1, range(-1, 0), ROW), ValueError, "pages: -1 is no page number"),
    (
        lambda e: e.encrypt_in_place(1, np.array([3, 1 << 63], np.uint64)),
        ValueError,
        "pages: page 0x8000000000000000 is beyond the last",
    ),
    (lambda e: e.encrypt_in_place(1, np.array([3, 3], np.uint64)), ValueError, "named twice"),
    (lambda e: e.encrypt_in_place(1, range(1000, 1025)), ValueError, "page 0x400 is beyond the last"),
    (lambda e: e.write_pages(1, range(2), ROW), ValueError, r"data = uint8 \(1, 4096\): an array of uint8 \(2, 4096\)"),
    (lambda e: e.write_pages(1, range(1), ROW.astype(int)), ValueError, "data = int64"),
    (lambda e: e.write_pages(1, range(1), bytes(PAGE)), ValueError, "data = b"),
    (lambda e: e.read(1, 1.0, 4), TypeError, "spa = 1.0: an integer"),
    (lambda e: e.read(1, 0, 4.0), TypeError, "size = 4.0: an integer"),
    (lambda e: e.read(1, SIZE - 3, 4), ValueError, "spa = 0x3ffffd, size = 0x4: outside DRAM of 0x400000 bytes"),
    (lambda e: e.write(1, -1, b"ab"), ValueError, "spa = -0x1"),
    (lambda e: e.read(1, 0, -1), ValueError, "size = -0x1"),
    (lambda e: e.write(3, 0, b"ab"), MissingKeyError, "key_id = 3"),
    (lambda e: e.read(1.5, 0, 1), TypeError, "key_id = 1.5: an integer"),
    (lambda e: e.install(-1, KEYS[e.scheme][0]), ValueError, "key_id = -1: 1 to 1023; 0 means unencrypted"),
    (lambda e: e.install(0, KEYS[e.scheme][0]), ValueError, "key_id = 0"),
    (lambda e: e.install(1024, KEYS[e.scheme][0]), ValueError, "key_id = 1024"),
    (lambda e: e.remove(0), ValueError, "key_id = 0"),
    (lambda e: e.install(1, bytes(32)), ValueError, r"key: .* takes (16|64) bytes, not 32"),
]


@pytest.mark.parametrize(("operation", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_operands_change_nothing(
    engine: tuple[MemoryEncryption, Dram],
    operation: Callable[[MemoryEncryption], Any],
    error: type[Exception],
    message: str,
) -> None:
    encryption, dram = engine
    before = random_bytes(SIZE)
    dram.write(0, before)
    with pytest.raises(error, match=message):
        operation(encryption)
    assert dram.read(0, SIZE) == before.tobytes()
    assert [encryption.has_key(asid) for asid in (-1, 1, 2, 3)] == [False, True, True, False]


def test_whole_numbers_of_numpy_are_taken(engine: tuple[MemoryEncryption, Dram]) -> None:
    encryption, _ = engine
    encryption.write(np.uint16(1), np.uint64(0x1003), b"abc")
    assert encryption.read(1, 0x1003, np.uint8(3)) == b"abc"


def test_machines_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="scheme = 'rot13': one of naples-xe, naples-xex, xex-aes-128, xts-aes-256"):
        MemoryEncryption(Dram(SIZE), "rot13", SEED)
    with pytest.raises(ValueError, match="addresses below 0x1000000000000"):
        MemoryEncryption(Dram((1 << 48) + BORDER, mapping=False), "xex-aes-128", SEED)
    with pytest.raises(ValueError, match="two halves, must differ"):
        MemoryEncryption(Dram(SIZE), "xts-aes-256", SEED).install(1, bytes(64))
