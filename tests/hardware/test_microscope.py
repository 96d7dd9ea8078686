"""The DIMM microscope and ciphertext hiding: what engine, DIMM and readers agree on."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware import microscope
from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption, MissingKeyError
from snpbook.hardware.hiding import hide
from tests.hardware.schemes import KEY_SIZES, LINEAR, PAGE
from tests.reference import xex as reference

SPA = 3 * PAGE + 0x7F0
PLAIN = b"attack at dawn. " * 3


def engine(scheme: str) -> tuple[MemoryEncryption, Dram]:
    dram = Dram(4 << 20)
    result = MemoryEncryption(dram, scheme, b"machine")
    for asid in (1, 2):
        result.install(asid, bytes(range(asid, asid + KEY_SIZES[scheme])))
    return result, dram


@pytest.mark.parametrize("scheme", KEY_SIZES)
def test_a_slide_is_what_the_engine_does(scheme: str) -> None:
    encryption, dram = engine(scheme)
    slide = microscope.examine(encryption, 1, SPA, PLAIN)
    assert not dram.read(SPA, len(PLAIN)).strip(b"\0")
    encryption.write(1, SPA, PLAIN)
    assert slide.cipher.tobytes() == dram.read(SPA, len(PLAIN))
    assert slide.plain.shape == slide.cipher.shape == (3, 16)
    assert np.array_equal(slide.whitened, slide.plain ^ slide.tweak)
    ecb = encryption.key(1).value[:32] if scheme == "xts-aes-256" else encryption.key(1).value
    aes = [reference.encrypt([], ecb, 0, row.tobytes()) for row in slide.whitened]
    assert slide.enciphered.tobytes() == b"".join(aes)
    after = np.zeros_like(slide.tweak) if scheme == "naples-xe" else slide.tweak
    assert np.array_equal(slide.cipher, slide.enciphered ^ after)
    if scheme in LINEAR:
        constants = [constant.value for constant in encryption.constants]
        tweaks = [reference.tweak(constants, SPA + 16 * i) for i in range(3)]
        assert slide.tweak.tobytes() == b"".join(tweaks)


def test_a_slide_without_a_key() -> None:
    encryption, _ = engine("xts-aes-256")
    slide = microscope.examine(encryption, 0, SPA, PLAIN)
    assert not slide.tweak.any()
    assert all(np.array_equal(step, slide.plain) for step in (slide.whitened, slide.enciphered, slide.cipher))


@pytest.mark.parametrize("scheme", KEY_SIZES)
def test_who_reads_what(scheme: str) -> None:
    encryption, dram = engine(scheme)
    cipher = microscope.examine(encryption, 1, SPA, PLAIN).cipher
    parties = microscope.readers(owner=1, other=2)
    seen = {name: rows.tobytes() for name, rows in microscope.views(encryption, SPA, cipher, parties).items()}
    dram.write(SPA, cipher.reshape(-1))
    assert seen == {name: encryption.read(key_id, SPA, len(PLAIN)) for name, key_id in parties.items()}
    assert seen["owner guest"] == PLAIN
    assert seen["host"] == seen["device"] == cipher.tobytes()
    assert len({seen[name] for name in ("owner guest", "host", "host, C-bit set", "other guest")}) == 4
    hidden = microscope.views(encryption, SPA, cipher, parties, hiding=True)
    readable = {name for name, rows in hidden.items() if rows.tobytes() != b"\xff" * len(PLAIN)}
    assert readable == {"owner guest", "other guest"}


@pytest.mark.parametrize("scheme", LINEAR)
def test_move_a_block(scheme: str) -> None:
    encryption, _ = engine(scheme)
    p, q = SPA, 0x12340
    cipher = microscope.examine(encryption, 1, p, PLAIN).cipher
    mask = microscope.move_mask(encryption, 1, p, q, len(PLAIN))
    moved = microscope.look(encryption, 1, q, cipher ^ mask)
    constants = [constant.value for constant in encryption.constants]
    shift = [reference.tweak(constants, (p + 16 * i) ^ (q + 16 * i)) for i in range(3)]
    assert moved.tobytes() == reference.xor(PLAIN, b"".join(shift))
    assert mask.any() == (scheme != "naples-xe")
    assert microscope.look(encryption, 1, p, cipher).tobytes() == PLAIN  # a replay where it was


@given(st.lists(st.integers(0, 3), min_size=512, max_size=512))
def test_repetitions(values: list[int]) -> None:
    choices = np.array([[0] * 16, [0] * 8 + [1] * 8, [1] * 8 + [0] * 8, [255] * 16], np.uint8)
    pages = choices[values].reshape(2, PAGE)
    counts = Counter(values)
    assert microscope.repetitions(pages).tolist() == np.array([counts[v] for v in values]).reshape(2, 256).tolist()


def test_repetitions_of_the_same_text_by_key() -> None:
    encryption, _ = engine("xex-aes-128")
    text = np.tile(np.frombuffer(PLAIN[:16], np.uint8), 3 * 256).reshape(3, PAGE)
    encryption.write_pages(0, range(3), text)
    assert (microscope.repetitions(encryption.read_pages(0, range(3))) == 768).all()
    encryption.encrypt_in_place(1, range(3))
    assert (microscope.repetitions(encryption.read_pages(0, range(3))) == 1).all()
    assert microscope.repetitions(text[:0]).shape == (0, 256)


def test_bad_operands() -> None:
    encryption, _ = engine("xex-aes-128")
    for call in (
        lambda: microscope.examine(encryption, 1, SPA + 1, PLAIN),
        lambda: microscope.examine(encryption, 1, SPA, PLAIN[:-1]),
        lambda: microscope.look(encryption, 1, SPA, PLAIN[:-1]),
        lambda: microscope.move_mask(encryption, 1, 0, 8, 16),
    ):
        with pytest.raises(ValueError, match="whole blocks of 16 bytes"):
            call()
    with pytest.raises(ValueError, match="outside DRAM"):
        microscope.examine(encryption, 1, 4 << 20, PLAIN)
    with pytest.raises(MissingKeyError, match="key_id = 9"):
        microscope.examine(encryption, 9, SPA, PLAIN)


def test_hiding() -> None:
    content = np.random.default_rng(1).integers(0, 255, (5, PAGE), np.uint8)
    before = content.copy()
    seen = hide(content, np.array([0, 1, 99, 100, 1006], np.uint64), max_snp_asid=99)
    assert np.array_equal(seen[[0, 3, 4]], before[[0, 3, 4]])
    assert (seen[1:3] == 0xFF).all()
    assert np.array_equal(content, before)
    assert hide(content, np.zeros(5, np.uint64), max_snp_asid=99) is content
