"""The Python half of the live microscope: what it does to memory, what it refuses, what it sends. See tests/browser."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.spec.encryption import KeyId
from snpbook.views.microscope import Machine
from snpbook.views.palette import DARK, LIGHT, REPEATS
from snpbook.widgets.microscope import InputError, Microscope
from tests.hardware.schemes import KEY_SIZES
from tests.views.reading import read

NAMES = {"naples-xe": "naples-xe", "naples": "naples-xex", "milan": "xex-aes-128", "genoa": "xts-aes-256"}


def machines() -> dict[str, Machine]:
    result = {}
    for name, scheme in NAMES.items():
        engine = MemoryEncryption(Dram(2 << 20), scheme, b"machine")
        for asid in (1, 2, 3):
            engine.install(asid, bytes(range(asid, asid + KEY_SIZES[scheme])))
        result[name] = Machine(name, engine, 3)
    return result


def scope() -> Microscope:
    return Microscope(machines(), "milan", "attack at dawn", 0x1000)


def raw(shown: Microscope, spa: int, size: int = 16) -> bytes:
    return shown.sample.machine.engine.read(KeyId.UNENCRYPTED, spa, size)


def state(shown: Microscope) -> tuple[object, ...]:
    """All that a refusal must leave alone."""
    page = shown.sample.machine.engine.read_pages(KeyId.UNENCRYPTED, range(16)).tobytes()
    return page, shown.sample, dict(shown._form), dict(shown._tables), dict(shown._heat), shown._status


FORM = {"machine": "milan", "plain": "tick", "hex": False, "spa": "0x2000", "asid": "2", "c_bit": True, "copies": "1",
        "to": "0x3000", "corrected": False, "replay": ""}  # fmt: skip


def press(shown: Microscope, button: str, **changes: Any) -> None:
    """What the browser sends when a button is pressed."""
    shown._handle_custom_msg({**FORM, **changes, "do": button}, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_write_reaches_the_module_encrypted(name: str) -> None:
    shown = scope()
    told = shown.write("tick", 0x2000, asid=2, machine=name)
    engine = shown.sample.machine.engine
    assert engine.read(2, 0x2000, 16) == b"tick" + bytes(12)
    assert raw(shown, 0x2000) == shown.sample.slide.cipher.tobytes() != engine.read(2, 0x2000, 16)
    assert "this guest (ASID 2)" in told.text
    assert "guest 2 wrote 'tick'" in shown.describe()
    assert shown._status.endswith(
        "Then this guest (ASID 2) reads: plaintext of #" + ("2." if name == "milan" else "1.")
    )


def test_key_goes_by_asid_and_c_bit() -> None:
    shown = scope()
    for asid, c_bit, key_id in [(3, True, 3), (3, False, 0), (0, True, KeyId.HOST), (0, False, 0)]:
        shown.write(b"\x01" * 32, 0x4000, asid=asid, c_bit=c_bit)
        assert shown.sample.slide.key_id == key_id
        assert shown.sample.machine.engine.read(key_id, 0x4000, 32) == b"\x01" * 32


def test_copies_follow_each_other() -> None:
    shown = scope()
    shown.write("ab", 0x5000, c_bit=False, copies=256)
    assert raw(shown, 0x5000, 4096) == (b"ab" + bytes(14)) * 256
    assert "16 times or more: 256" in shown.describe()


def test_move_without_and_with_the_tweaks() -> None:
    shown = scope()
    shown.write("attack at dawn", 0x1000, machine="naples")
    before = raw(shown, 0x1000)
    assert "nonsense" in shown.move(0x1450).text.splitlines()[3]
    assert raw(shown, 0x1450) == raw(shown, 0x1000) == before
    shown.write("attack at dawn", 0x1000)
    told = shown.move(0x1450, corrected=True)
    assert "plaintext of #3 ⊕ T(p) ⊕ T(q)" in told.text.splitlines()[3]
    constants = {c.bit: c.value for c in shown.sample.machine.engine.constants}
    expected = b"attack at dawn\0\0"
    for bit in (4, 6, 10):
        expected = bytes(a ^ b for a, b in zip(expected, constants[bit], strict=True))
    assert shown.sample.machine.engine.read(1, 0x1450, 16) == expected


def test_replay_brings_back_what_was_there() -> None:
    shown = scope()
    shown.write("hold the line", 0x1000)
    told = shown.replay()
    assert "plaintext of #1" in told.text.splitlines()[3]
    assert shown.sample.machine.engine.read(1, 0x1000, 16) == b"attack at dawn\0\0"
    assert "the host put back #1" in shown.describe()
    shown.replay()
    assert shown.sample.machine.engine.read(1, 0x1000, 16) == b"hold the line\0\0\0"


def test_replay_takes_nothing_from_elsewhere() -> None:
    shown = scope()
    shown.write("x", 0x5000)
    shown.write("x" * 20, 0x1000)
    with pytest.raises(InputError, match="nothing else was at 0x1000"):
        shown.replay()


def test_another_machine_begins_another_diary() -> None:
    shown = scope()
    shown.write("x", 0x2000)
    assert len(shown.sample.steps) == 2
    shown.write("x", 0x2000, machine="genoa")
    assert len(shown.sample.steps) == 1
    assert shown._form["machine"] == "genoa"


REFUSED: list[tuple[Callable[[Microscope], object], str, str]] = [
    (lambda s: s.write("x", 0x1004), "spa", "0x1004 is no multiple of 16, where a block begins; 0x1000 is"),
    (lambda s: s.write("x", 2 << 20), "spa", "outside memory, which ends at 0x1fffff"),
    (lambda s: s.write("x", -16), "spa", "outside memory"),
    (lambda s: s.write("x" * 17, 0x1FF0), "spa", "32 bytes at 0x1ff0 would leave their page"),
    (lambda s: s.write("", 0x1000), "plain", "nothing to write"),
    (lambda s: s.write("x", 0x1000, asid=4), "asid", "milan has 1 to 3, and 0 for the host; not 4"),
    (lambda s: s.write("x", 0x1000, asid=-1), "asid", "not -1"),
    (lambda s: s.write("x", 0x1000, copies=0), "copies", "0 is not 1 to 256"),
    (lambda s: s.write("x", 0x1000, machine="turin"), "machine", "'turin' is none of naples-xe, naples, milan, genoa"),
    (lambda s: s.move(0x1000), "to", "lie at 0x1000 already"),
    (lambda s: s.move(0x1008), "to", "Move to: 0x1008 is no multiple of 16"),
    (lambda s: s.replay(), "replay", "nothing else was at 0x1000 yet"),
]


@pytest.mark.parametrize(("act", "field", "words"), REFUSED)
def test_a_mistake_is_refused_before_anything_changes(act: Any, field: str, words: str) -> None:
    shown = scope()
    before = state(shown)
    with pytest.raises(InputError, match=re.escape(words)) as refusal:
        act(shown)
    assert refusal.value.field == field
    assert state(shown) == before


def test_no_host_has_the_tweaks_of_xts() -> None:
    shown = scope()
    shown.write("x", 0x1000, machine="genoa")
    before = state(shown)
    with pytest.raises(InputError, match="it takes the key"):
        shown.move(0x2000, corrected=True)
    assert state(shown) == before


TYPED: list[tuple[str, dict[str, Any], str, str]] = [
    ("write", {"spa": "home"}, "spa", "Address: 'home' is no number; write it as 4096 or 0x1000"),
    ("write", {"spa": "0x2001"}, "spa", "is no multiple of 16"),
    ("write", {"asid": ""}, "asid", "ASID: '' is no number; write it as 1, or 0 for the host"),
    ("write", {"spa": "0x12345678901"}, "spa", "Address: 0x12345678901 is outside memory, which ends at 0x1fffff"),
    ("write", {"asid": "9"}, "asid", "milan has 1 to 3"),
    ("write", {"copies": "1.5"}, "copies", "Copies: '1.5' is no number; write it as 64"),
    ("write", {"plain": "6g", "hex": True}, "plain", "'6g' is not hexadecimal"),
    ("write", {"plain": ""}, "plain", "nothing to write"),
    ("move", {"to": "0x1_0004"}, "to", "no multiple of 16"),
    ("replay", {}, "replay", "nothing else was at"),
]


@pytest.mark.parametrize(("button", "changes", "field", "words"), TYPED)
def test_what_is_typed_wrong_is_told_beside_its_field(
    button: str, changes: dict[str, Any], field: str, words: str
) -> None:
    shown = scope()
    before = state(shown)
    press(shown, button, **changes)
    assert shown._refusal["field"] == field
    assert words in shown._refusal["text"]
    assert state(shown) == before
    press(shown, "write")
    assert shown._refusal == {}


def test_buttons_do_what_python_does() -> None:
    by_hand, by_python = scope(), scope()
    press(by_hand, "write", plain="00 ff 10", hex=True, spa="8192", asid="2", copies="0x2")
    press(by_hand, "move")
    press(by_hand, "write", plain="tock")
    press(by_hand, "write", plain="tick")
    press(by_hand, "replay")
    by_python.write(b"\x00\xff\x10", 0x2000, asid=2, copies=2)
    by_python.move(0x3000)
    by_python.write("tock", 0x2000, asid=2)
    by_python.write("tick", 0x2000, asid=2)
    by_python.replay()
    assert by_hand.describe() == by_python.describe()
    assert by_hand._form == by_python._form


def test_fields_follow_python() -> None:
    shown = scope()
    shown.write(b"\xff", 0x3000, asid=3, c_bit=False, copies=2, machine="naples")
    shown.move(0x3010, corrected=True)
    assert shown._form == {
        "machine": "naples", "plain": "ff", "hex": True, "spa": "0x3000", "asid": "3", "c_bit": False, "copies": "2",
        "to": "0x3010", "corrected": True,
    }  # fmt: skip


def test_bundle_holds_the_live_view_and_its_twins() -> None:
    shown = scope()
    data, _ = shown._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.model_id
    assert data["text/plain"] == shown.describe() == repr(shown)
    page = read(data["text/html"])
    assert "snpbook-view" in data["text/html"]
    way = "On the way to the DIMM, as written in #1: milan, key of ASID 1"
    assert page.tables[:3] == [way, "Who reads what", "Diary"]
    assert page.pictures[0][0].startswith("Page 0x1 on the DIMM: 256 blocks")


def test_the_picture_of_the_way_says_whose_it_is() -> None:
    shown = scope()
    shown.write("tick", 0x2000)
    shown.move(0x3000)
    assert "On the way to the DIMM, as written in #2: milan" in shown._tables["way"]


def test_the_host_that_has_written_reads_first() -> None:
    shown = scope()
    shown.write("tick", 0x2000, asid=0)
    assert shown._status == "#2 the host wrote 'tick'. Then host, C-bit set reads: plaintext of #2."
    shown.write("tick", 0x2000, asid=0, c_bit=False)
    assert shown._status == "#3 the host wrote 'tick'. Then host, C-bit clear reads: plaintext of #3."


def test_where_the_tweak_takes_the_key_no_correction_is_offered() -> None:
    shown = scope()
    shown.move(0x3000, corrected=True)
    assert (shown._linear, shown._form["corrected"]) == (True, True)
    shown.write("tick", 0x2000, machine="genoa")
    assert (shown._linear, shown._form["corrected"]) == (False, False)
    press(shown, "move", corrected=shown._form["corrected"])
    assert shown._refusal == {}
    shown.write("tick", 0x2000, machine="milan")
    assert shown._linear


def test_heat_map_is_sent_for_each_theme() -> None:
    shown = scope()
    shown.write("ab", 0x5000, copies=3, c_bit=False)
    for theme, swatch in [(LIGHT, REPEATS[2].light), (DARK, REPEATS[2].dark)]:
        picture = read(shown._heat[theme.name]).pictures[0][1]
        assert swatch in {node.get("fill") for node in picture.iter()}
    assert sum(len(html) for html in [*shown._heat.values(), *shown._tables.values()]) < 80_000


def test_text_is_escaped() -> None:
    shown = scope()
    shown.write("<b>&", 0x1000)
    assert "<b>" not in "".join(shown._tables.values()) + shown.static().html
    assert np.array_equal(shown.sample.slide.plain[0, :4], np.frombuffer(b"<b>&", np.uint8))
