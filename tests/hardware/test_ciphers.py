"""The memory ciphers: equal to slow references, to the library and to published vectors, block by block."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.cipher import STEP_PAGES, MemoryKey
from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.tweaks import Origin, boot_constants
from snpbook.hardware.xex import Xex
from snpbook.hardware.xts import Xts
from tests.hardware.schemes import BOOT, CONSTANTS, LINEAR, NAPLES, PAGE, SEED, expected, random_bytes
from tests.reference import xex as reference

SIZE = 4 << 20
IEEE_KEY = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
IEEE_PLAIN = np.tile(np.arange(256, dtype=np.uint8), PAGE // 256)
IEEE_VECTORS = {  # IEEE 1619-2007 annex B, vectors 10 to 14: data unit number, the first two blocks
    0xFF: "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
    0xFFFF: "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11",
    0xFFFFFF: "e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200",
    0xFFFFFFFF: "bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5",
    0xFFFFFFFFFF: "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23",
}
IEEE_LAST_OF_10 = "c4f36ffda9fcea70b9c6e693e148c151"  # the 32nd block of vector 10


STEP_BLOCKS = STEP_PAGES * PAGE // 16


def linear(scheme: str) -> MemoryKey:
    """A key of the cipher, at addresses far beyond what a test's DRAM has."""
    constants = BOOT if scheme == "xex-aes-128" else NAPLES
    return Xex(constants, tweaks_output=scheme != "naples-xe").key(bytes(range(16)))


@given(
    st.sampled_from(LINEAR),
    st.integers(0, (1 << 44) - 600)
    | st.tuples(st.integers(1, 1 << 28), st.integers(1, 300)).map(lambda near: near[0] * STEP_BLOCKS - near[1]),
    st.integers(1, 600),
)
def test_linear_span_equals_the_reference(scheme: str, block: int, blocks: int) -> None:
    plain = random_bytes(16 * blocks)
    key, result = linear(scheme), np.zeros(16 * blocks, np.uint8)
    key.encrypt.span(16 * block, plain, result)
    assert result.tobytes() == expected(scheme, bytes(range(16)), 16 * block, plain.tobytes())
    key.decrypt.span(16 * block, result, result)
    assert result.tobytes() == plain.tobytes()
    assert key.tweaks(16 * block, 32).tobytes() == b"".join(
        reference.tweak(CONSTANTS[scheme], spa) for spa in (16 * block, 16 * block + 16)
    )


@given(st.sampled_from(LINEAR), st.lists(st.integers(0, (1 << 36) - 1), min_size=1, max_size=4))
def test_linear_scattered_pages_equal_the_reference(scheme: str, numbers: list[int]) -> None:
    plain = random_bytes(len(numbers) * PAGE).reshape(-1, PAGE)
    key, result = linear(scheme), np.zeros_like(plain)
    pages = np.array(numbers, np.uint64)
    key.encrypt.pages(pages, plain, result)
    for number, before, after in zip(numbers, plain, result, strict=True):
        assert after.tobytes() == expected(scheme, bytes(range(16)), number * PAGE, before.tobytes())
    key.decrypt.pages(pages, result, result)
    assert np.array_equal(result, plain)


@pytest.mark.parametrize("scheme", LINEAR)
def test_a_run_and_scattered_pages_agree_over_many_steps(scheme: str) -> None:
    count = 3 * STEP_PAGES + 5
    plain = random_bytes(count * PAGE)
    key = linear(scheme)
    run, scattered = np.zeros_like(plain), np.zeros_like(plain)
    key.encrypt.span(7 * PAGE, plain, run)
    key.encrypt.pages(np.arange(7, 7 + count, dtype=np.uint64), plain.reshape(-1, PAGE), scattered.reshape(-1, PAGE))
    assert np.array_equal(run, scattered)
    last = slice((count - 1) * PAGE, count * PAGE)
    assert run[last].tobytes() == expected(scheme, bytes(range(16)), (7 + count - 1) * PAGE, plain[last].tobytes())


@pytest.mark.parametrize("count", [1, 64, 65, STEP_PAGES + 1, 300])
@pytest.mark.parametrize("direction", ["encryptor", "decryptor"])
def test_xts_equals_the_library(count: int, direction: str) -> None:
    pages = np.random.default_rng(count).integers(0, 1 << 52, count, np.uint64)
    source = random_bytes(count * PAGE).reshape(-1, PAGE)
    pair = Xts().key(IEEE_KEY)
    result = source.copy()
    (pair.encrypt if direction == "encryptor" else pair.decrypt).pages(pages, result, result)
    for page, before, after in zip(pages.tolist(), source, result, strict=True):
        cipher = Cipher(algorithms.AES(IEEE_KEY), modes.XTS(page.to_bytes(16, "little")))
        assert after.tobytes() == getattr(cipher, direction)().update(before.tobytes())


@pytest.mark.parametrize("count", [1, 65], ids=["library", "vectorised"])
def test_xts_published_vectors(count: int) -> None:
    key = Xts().key(IEEE_KEY).encrypt
    for number, head in IEEE_VECTORS.items():
        pages = np.full(count, number, np.uint64)
        result = np.zeros((count, PAGE), np.uint8)
        key.pages(pages, np.tile(IEEE_PLAIN, (count, 1)), result)
        assert {row[:32].tobytes().hex() for row in result} == {head}
        if number == 0xFF:
            assert result[0, 31 * 16 : 32 * 16].tobytes().hex() == IEEE_LAST_OF_10


@pytest.mark.parametrize("blocks", [1, 3, 256, 700])
def test_xts_tweaks_are_those_of_the_library(blocks: int) -> None:
    """A block is E_1(P ^ T) ^ T: with the tweak in place of P and AES-ECB beside it, T is seen from outside."""
    key, spa = Xts().key(IEEE_KEY), 5 * PAGE + 16 * 9
    tweaks = key.tweaks(spa, 16 * blocks)
    seen = np.zeros(16 * blocks, np.uint8)
    key.encrypt.span(spa, tweaks.reshape(-1), seen)
    zero = Cipher(algorithms.AES(IEEE_KEY[:32]), modes.ECB()).encryptor().update(bytes(16))
    assert np.array_equal(seen.reshape(-1, 16) ^ tweaks, np.tile(np.frombuffer(zero, np.uint8), (blocks, 1)))


places = st.integers(0, (1 << 44) - 1).map(lambda block: 16 * block)


@given(st.sampled_from(LINEAR), st.binary(min_size=16, max_size=16), places, places)
def test_moved_blocks(scheme: str, block: bytes, p: int, q: int) -> None:
    """XE: Dec(Enc(m, p), q) = m ^ T(p ^ q), just so. XEX: the same, for C ^ T(p) ^ T(q). Moving attacks rest on it."""
    key, plain = linear(scheme), np.frombuffer(block, np.uint8)
    raw, moved = np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    key.encrypt.span(p, plain, raw)
    delta = np.frombuffer(reference.tweak(CONSTANTS[scheme], p ^ q), np.uint8)
    key.decrypt.span(q, raw if scheme == "naples-xe" else raw ^ delta, moved)
    assert np.array_equal(moved, plain ^ delta)
    if scheme != "naples-xe" and delta.any():
        key.decrypt.span(q, raw, moved)
        assert not np.array_equal(moved, plain ^ delta)


def test_constants_of_naples() -> None:
    published = {c.bit: c.value.hex(" ", -4) for c in NAPLES if c.origin == Origin.PUBLISHED}
    assert published == {
        4: "82253838 82253838 82253838 82253838",
        5: "ec09079c ec09079c ec09079c ec09079c",
        6: "40000018 40000018 40000018 40000018",
    }
    assert [c.bit for c in NAPLES if c.origin == Origin.STAND_IN] == list(range(7, 48))
    assert all(c.value == c.value[:4] * 4 for c in NAPLES)
    assert len(independent([c.value for c in NAPLES[:28]])) == 28
    assert len(independent([c.value for c in NAPLES])) <= 32
    dram = Dram(SIZE)
    assert MemoryEncryption(dram, "naples-xex", b"one boot").constants == NAPLES
    assert MemoryEncryption(dram, "naples-xe", b"another").constants == NAPLES


def independent(values: list[bytes]) -> list[int]:
    """A basis of the space that the values span, over the field of two elements."""
    basis: list[int] = []
    for value in values:
        rest = int.from_bytes(value, "big")
        for element in basis:
            rest = min(rest, rest ^ element)
        if rest:
            basis.append(rest)
    return basis


def test_constants_of_a_boot() -> None:
    assert not {c.value for c in BOOT} & {c.value for c in boot_constants(b"another boot")}
    assert [c.bit for c in BOOT] == list(range(4, 48))
    assert {c.origin for c in BOOT} == {Origin.DRAWN}
    assert not any(c.value[:4] == c.value[4:8] for c in BOOT)
    assert len(independent([c.value for c in BOOT])) == 44
    assert MemoryEncryption(Dram(SIZE), "xex-aes-128", SEED).constants == BOOT
    assert MemoryEncryption(Dram(SIZE), "xts-aes-256", SEED).constants == ()
    with pytest.raises(ValueError, match="constants: one for each address bit from 4 to 47, in order"):
        Xex(BOOT[:-1])
