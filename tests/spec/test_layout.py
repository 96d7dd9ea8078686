"""Every layout of the project: no overlap, an exact round trip in each form, and refusals that name the field."""

from __future__ import annotations

import pkgutil
import random
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import snpbook.spec
from snpbook.spec.cite import Cite
from snpbook.spec.layout import REGISTRY, Field, Layout, Record, bits, raw, sub, uint

for module in pkgutil.iter_modules(snpbook.spec.__path__):
    import_module(f"snpbook.spec.{module.name}")

LAYOUTS = [layout for layout in REGISTRY.values() if layout.size]
every = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def value_of(field: Field, rng: random.Random) -> Any:
    """A random value that fits."""
    if field.kind == "raw":
        return rng.randbytes(field.size)
    if field.kind == "sub":
        assert field.layout is not None
        items = [record_of(field.layout, rng) for _ in range(max(field.count, 1))]
        return tuple(items) if field.count else items[0]
    return rng.choice([0, 1, field.limit, rng.randrange(field.limit + 1)])


def record_of(layout: Layout, rng: random.Random) -> Record:
    return layout.record(**{name: value_of(field, rng) for name, field in layout.fields.items()})


def by_hand(layout: Layout, record: Record) -> bytes:
    """The bytes of a record, each field added at its first bit: another way than the library's."""
    number = 0
    for name, value in record:
        field = layout.fields[name]
        if field.kind == "raw":
            value = int.from_bytes(value, "little")
        elif field.kind == "sub":
            assert field.layout is not None
            parts = value if field.count else (value,)
            value = int.from_bytes(b"".join(by_hand(field.layout, part) for part in parts), "little")
        number += int(value) << field.first_bit
    return number.to_bytes(layout.size, "little")


@every
def test_fields_do_not_overlap_and_the_rest_is_reserved(layout: Layout) -> None:
    named = [bit for field in layout.fields.values() for bit in range(field.first_bit, field.last_bit + 1)]
    assert len(named) == len(set(named))
    assert max(named) < 8 * layout.size
    reserved = {bit for bit in range(8 * layout.size) if layout.reserved_mask >> bit & 1}
    assert reserved == set(range(8 * layout.size)) - set(named)
    assert layout.cite.title


@every
def test_the_bit_diagram_covers_every_bit_once(layout: Layout) -> None:
    rows = layout.rows()
    assert [first for _, first, _, _ in rows] == [0, *(last + 1 for _, _, last, _ in rows[:-1])]
    assert rows[-1][2] == 8 * layout.size - 1
    assert [name for name, *_ in rows if name != "reserved"] == [
        field.name for field in sorted(layout.fields.values(), key=lambda field: field.first_bit)
    ]


@every
def test_round_trip(layout: Layout) -> None:
    rng = random.Random(layout.name)
    for _ in range(5):
        record = record_of(layout, rng)
        data = bytes(record)
        assert data == by_hand(layout, record) == layout.pack(**dict(record))
        assert layout.unpack(data) == record
        assert layout.unpack(b"\xaa" * 3 + data + b"\xbb", 3) == record
        assert hash(layout.unpack(data)) == hash(record)
        assert not layout.reserved_set(data)


@every
def test_reserved_bits_are_found_where_they_are(layout: Layout) -> None:
    rng = random.Random(layout.name)
    reserved = [bit for bit in range(8 * layout.size) if layout.reserved_mask >> bit & 1]
    for bit in rng.sample(reserved, min(len(reserved), 5)):
        stray = bytearray(bytes(record_of(layout, rng)))
        stray[bit // 8] |= 1 << bit % 8
        assert layout.reserved_set(stray) == [bit // 8]


@every
def test_columns_of_many_records_are_what_each_record_says(layout: Layout) -> None:
    rng = random.Random(layout.name)
    records = [record_of(layout, rng) for _ in range(4)]
    table = np.frombuffer(b"".join(map(bytes, records)), layout.dtype)
    assert layout.dtype.itemsize == layout.size
    for name, column in layout.columns(table).items():
        field = layout.fields[name]
        for record, cell in zip(records, column, strict=True):
            value = getattr(record, name)
            if field.kind in ("uint", "bits"):
                assert int(cell) == value
            else:
                parts = value if field.kind == "sub" and field.count else (value,)
                assert cell.tobytes() == b"".join(map(bytes, parts))


@every
def test_a_value_that_does_not_fit_is_refused_by_name(layout: Layout) -> None:
    for name, field in layout.fields.items():
        if field.kind == "raw":
            with pytest.raises(ValueError, match=f"{layout.name}.{name} takes {field.size} bytes"):
                layout.pack(**{name: bytes(field.size + 1)})
        elif field.kind == "sub":
            with pytest.raises((TypeError, ValueError), match=f"{layout.name}.{name} takes"):
                layout.pack(**{name: ("no record",) * max(field.count, 1) if field.count else "no record"})
        else:
            for value in (field.limit + 1, -1):
                with pytest.raises(ValueError, match=rf"{layout.name}.{name} = .* does not fit {field.width} bits"):
                    layout.pack(**{name: value})
    with pytest.raises(ValueError, match=f"{layout.name} has no field 'nothing'"):
        layout.pack(nothing=1)
    with pytest.raises(ValueError, match=f"{layout.name} takes {layout.size} bytes, {layout.size - 1} are left"):
        layout.unpack(bytes(layout.size - 1))


@every
def test_records_are_read_only_values(layout: Layout) -> None:
    record = record_of(layout, random.Random(layout.name))
    name, field = next(iter(layout.fields.items()))
    with pytest.raises(AttributeError, match="read-only"):
        setattr(record, name, 0)
    with pytest.raises(AttributeError, match="read-only"):
        delattr(record, name)
    with pytest.raises(AttributeError, match="has no field 'nothing'"):
        _ = record.nothing
    changed = record.replace(**{name: value_of(field, random.Random("other"))})
    assert [pair for pair in changed if pair[0] != name] == [pair for pair in record if pair[0] != name]
    assert repr(record).startswith(f"{layout.name}(")
    assert "\n" not in repr(record)
    assert "0x7f" not in repr(layout)


def test_a_declaration_that_contradicts_itself_is_refused() -> None:
    cite = Cite("MODEL", "tests")
    with pytest.raises(ValueError, match="overlaps"):
        Layout("TestOverlap", 4, cite, [uint("a", 0, 4), bits("b", 0, 4, 31)])
    with pytest.raises(ValueError, match="leaves the 4 bytes"):
        Layout("TestOutside", 4, cite, [raw("a", 2, 4)])
    with pytest.raises(ValueError, match="do not fit a word"):
        bits("a", 0, 1, 7, 2)
    with pytest.raises(ValueError, match="declared twice"):
        Layout(LAYOUTS[0].name, 4, cite, [])
    with pytest.raises(ValueError, match="names a field twice"):
        Layout("TestTwice", 4, cite, [uint("a", 0, 1), uint("a", 1, 1)])
    with pytest.raises(ValueError, match="unknown document"):
        Cite("NOWHERE")


@given(st.binary(min_size=8, max_size=8))
def test_bits_and_nested_records_mean_what_they_say(data: bytes) -> None:
    word = int.from_bytes(data, "little")
    inner = REGISTRY.get("TestInner") or Layout("TestInner", 2, Cite("MODEL"), [bits("x", 0, 2, 3, 10)])
    outer = REGISTRY.get("TestOuter") or Layout(
        "TestOuter", 8, Cite("MODEL"), [uint("a", 0, 2), sub("b", 2, inner, count=2), raw("c", 6, 2)]
    )
    record = outer.unpack(data)
    assert record.a == word & 0xFFFF
    assert [part.x for part in record.b] == [word >> 16 >> 3 & 0x3FF, word >> 32 >> 3 & 0x3FF]
    assert record.c == data[6:]


@every
def test_a_value_of_another_kind_is_refused_by_name(layout: Layout) -> None:
    """A number is no bytes, a fraction no number, another structure's record not this one's."""
    other = Cite("MODEL")
    for name, field in layout.fields.items():
        wrong: Any = {"raw": field.size, "sub": other, "uint": 1.0, "bits": "1"}[field.kind]
        if field.kind == "sub" and field.count:
            wrong = (other,) * field.count
        with pytest.raises(TypeError, match=f"{layout.name}.{name}"):
            layout.pack(**{name: wrong})
        assert not hasattr(Record, name)
