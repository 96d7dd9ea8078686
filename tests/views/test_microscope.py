"""What the microscope says, against the engine itself: every number shown is one that memory or a reader has."""

from dataclasses import replace

import numpy as np
import pytest

from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.microscope import examine
from snpbook.spec.encryption import KeyId
from snpbook.views.microscope import Machine, Sample, Step, diary, heat, meaning, microscope, readers, way
from tests.hardware.schemes import KEY_SIZES, SCHEMES
from tests.views.reading import read

PLAIN = b"attack at dawn..and not at dusk.and so on......."
SPA, TO = 0x1230, 0x5640


def machine(scheme: str) -> Machine:
    engine = MemoryEncryption(Dram(2 << 20), scheme, b"machine")
    for asid in (1, 2):
        engine.install(asid, bytes(range(asid, asid + KEY_SIZES[scheme])))
    return Machine("A machine", engine, 2)


def written(scheme: str, *, key_id: int = 1, asid: int = 1) -> Sample:
    """A sample whose blocks are in memory, as the guest wrote them."""
    known = machine(scheme)
    slide = examine(known.engine, key_id, SPA, PLAIN)
    known.engine.write(key_id, SPA, PLAIN)
    return Sample(known, asid, slide, (Step("guest 1 wrote", SPA, slide.cipher, slide.plain),))


def moved(sample: Sample, *, mask: int | np.ndarray = 0) -> Sample:
    step = Step("moved", TO, (sample.now.cipher ^ mask).astype(np.uint8))
    sample.machine.engine.write(KeyId.UNENCRYPTED, TO, step.cipher.reshape(-1))
    return replace(sample, steps=(*sample.steps, step))


def cells(text: str) -> dict[str, list[str]]:
    """Rows of a table in text by their first column."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[3:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_way_ends_at_what_the_module_holds(scheme: str) -> None:
    sample = written(scheme)
    view = way(sample)
    rows = cells(view.text)
    first = sample.machine.engine.read(KeyId.UNENCRYPTED, SPA, 16)
    tail = "DIMM = AES output" if scheme == "naples-xe" else "DIMM = output ⊕ tweak"
    assert list(rows) == [
        "plaintext", "tweak of the address", "AES input = plaintext ⊕ tweak", "AES output", tail, "and 1 block more",
    ]  # fmt: skip
    assert rows[tail][0] == first.hex(" ", 4)
    assert rows["plaintext"] == [PLAIN[:16].hex(" ", 4), PLAIN[16:32].hex(" ", 4)]
    assert view.text.splitlines()[0] == "On the way to the DIMM, as written in #1: A machine, key of ASID 1"
    assert view.text.splitlines()[1].split() == ["step", "0x1230", "0x1240"]
    read(view.html)


def test_the_way_without_a_key() -> None:
    view = way(written("xex-aes-128", key_id=0))
    assert list(cells(view.text))[:2] == ["plaintext", "DIMM = plaintext"]
    assert "unencrypted" in view.text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_readers_read_what_the_engine_gives(scheme: str) -> None:
    sample = written(scheme)
    engine, rows = sample.machine.engine, cells(readers(sample).text)
    for name, key_id in {
        "this guest (ASID 1)": 1, "another guest (ASID 2)": 2, "host, C-bit clear": 0, "host, C-bit set": KeyId.HOST,
        "thief of the DIMM": 0,
    }.items():  # fmt: skip
        assert rows[name][2] == engine.read(key_id, SPA, 16).hex(" ", 4), name
    assert rows["this guest (ASID 1)"][1] == "plaintext of #1"
    assert rows["this guest (ASID 1)"][3] == PLAIN[:32].decode()
    assert rows["host, C-bit clear"][1] == rows["thief of the DIMM"][1] == "ciphertext"
    assert rows["another guest (ASID 2)"][1] == rows["host, C-bit set"][1] == "nonsense"


def test_the_host_as_writer_is_no_guest() -> None:
    sample = written("xex-aes-128", key_id=KeyId.HOST, asid=0)
    assert list(sample.readers) == ["host, C-bit set", "host, C-bit clear", "a guest (ASID 1)"]
    assert cells(readers(sample).text)["host, C-bit set"][1] == "plaintext of #1"
    assert next(iter(written("xex-aes-128", key_id=0, asid=0).readers)) == "host, C-bit clear"


@pytest.mark.parametrize(
    ("scheme", "corrected", "words"),
    [
        ("naples-xe", False, "plaintext of #1 ⊕ T(p) ⊕ T(q)"),
        ("naples-xex", False, "nonsense"),
        ("naples-xex", True, "plaintext of #1 ⊕ T(p) ⊕ T(q)"),
        ("xex-aes-128", True, "plaintext of #1 ⊕ T(p) ⊕ T(q)"),
        ("xts-aes-256", False, "nonsense"),
    ],
)
def test_what_a_moved_block_is(scheme: str, corrected: bool, words: str) -> None:
    sample = written(scheme)
    tweaks = sample.machine.engine.key(1).tweaks
    sample = moved(sample, mask=tweaks(SPA, 48) ^ tweaks(TO, 48) if corrected else 0)
    seen = np.frombuffer(sample.machine.engine.read(1, TO, 48), np.uint8).reshape(-1, 16)
    assert meaning(sample, seen) == words
    assert cells(readers(sample).text)["this guest (ASID 1)"][1] == words
    assert "first block at 0x5640" in readers(sample).text


def test_diary_finds_what_was_seen_before() -> None:
    sample = moved(written("naples-xe"))
    lines = diary(sample).text.splitlines()
    assert lines[3].split()[:4] == ["#1", "guest", "1", "wrote"]
    assert lines[4].endswith("as in #1")
    many = replace(sample, steps=sample.steps * 5)
    assert [line.split()[0] for line in diary(many).text.splitlines()[3:]] == [f"#{n}" for n in range(5, 11)]


def test_heat_shows_the_page_of_the_last_step() -> None:
    sample = moved(written("xex-aes-128"))
    assert heat(sample).text.startswith("Page 0x5 on the DIMM: 256 blocks; once: 3, 16 times or more: 253")


def test_the_whole_reads_the_same_in_both_forms() -> None:
    sample = written("xts-aes-256")
    view, page = microscope(sample), read(microscope(sample).html)
    for part in (way(sample), readers(sample), diary(sample), heat(sample)):
        assert part.text in view.text
        assert part.html in view.html
    assert len(page.tables) == 5
    assert "attack\u00a0at\u00a0dawn.." in page.words
