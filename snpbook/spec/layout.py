"""Layouts: a structure in memory, declared once, read in every form the model needs.

One declaration gives bytes <-> `Record`, a NumPy structured dtype and columns for thousands of
records, the mask of reserved bits, and the rows of a bit diagram. All integers are little-endian.
Whatever a layout does not name is reserved. No other file knows an offset.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Any

from snpbook.spec.cite import Cite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}
REGISTRY: dict[str, Layout] = {}
"""Every layout of the project, by name; the property tests walk it."""


@dataclass(frozen=True, slots=True)
class Field:
    """A named part of a layout: use `uint`, `bits`, `raw` or `sub` to make one."""

    name: str
    offset: int
    size: int
    lo: int = 0
    width: int = 0
    kind: str = "uint"
    enum: type[IntEnum] | None = None
    layout: Layout | None = None
    count: int = 1
    note: str = ""

    @property
    def first_bit(self) -> int:
        return self.offset * 8 + self.lo

    @property
    def last_bit(self) -> int:
        return self.first_bit + self.width - 1

    @property
    def limit(self) -> int:
        """The largest value that fits."""
        return (1 << self.width) - 1

    @property
    def where(self) -> str:
        """The place as a document writes it: `0x48[4:2]` for bits, `0x090+48` for bytes."""
        if self.kind == "bits":
            return f"{self.offset:#x}[{self.lo + self.width - 1}:{self.lo}]"
        return f"{self.offset:#05x}+{self.size}"


def uint(name: str, offset: int, size: int, *, enum: type[IntEnum] | None = None, note: str = "") -> Field:
    """An unsigned integer of `size` bytes (1, 2, 4 or 8)."""
    return Field(name, offset, size, 0, size * 8, "uint", enum, note=note)


def bits(
    name: str, offset: int, size: int, lo: int, width: int = 1, *, enum: type[IntEnum] | None = None, note: str = ""
) -> Field:
    """Bits `lo` .. `lo + width - 1` of the `size`-byte word at `offset`."""
    if lo + width > size * 8:
        raise ValueError(f"{name}: bits {lo + width - 1}:{lo} do not fit a word of {size} bytes")
    return Field(name, offset, size, lo, width, "bits", enum, note=note)


def raw(name: str, offset: int, size: int, *, note: str = "") -> Field:
    """`size` uninterpreted bytes."""
    return Field(name, offset, size, 0, size * 8, "raw", note=note)


def sub(name: str, offset: int, layout: Layout, *, count: int = 0, note: str = "") -> Field:
    """A nested layout, or (with `count`) a tuple of `count` of them."""
    size = layout.size * max(count, 1)
    return Field(name, offset, size, 0, size * 8, "sub", layout=layout, count=count, note=note)


class Record:
    """One decoded structure: read-only attributes, equality by content, an exact one-line repr.

    The values are the instance's dictionary, because reading a field is what is done most.
    """

    __slots__ = ("__dict__", "layout")
    layout: Layout

    def __init__(self, layout: Layout, values: dict[str, Any]) -> None:
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "__dict__", values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.layout.name} has no field {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{self.layout.name} is read-only: use .replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self.layout.name} is read-only")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(vars(self).items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.layout is other.layout and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.layout.name, tuple(vars(self).items())))

    def __bytes__(self) -> bytes:
        buffer = bytearray(self.layout.size)
        for name, value in self:
            if not value:  # as the buffer is
                continue
            field = self.layout.fields[name]
            end = field.offset + field.size
            if field.kind == "raw":
                buffer[field.offset : end] = value
            elif field.kind == "sub":
                buffer[field.offset : end] = b"".join(map(bytes, value)) if field.count else bytes(value)
            else:
                word = int.from_bytes(buffer[field.offset : end], "little") | value << field.lo
                buffer[field.offset : end] = word.to_bytes(field.size, "little")
        return bytes(buffer)

    def replace(self, **changes: Any) -> Record:
        """A copy with some fields changed."""
        return Record(self.layout, {**vars(self), **self.layout.checked(changes)})

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self if value)
        return f"{self.layout.name}({shown})"


def _show(value: Any) -> str:
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, int):
        return str(value) if value < 10 else f"{value:#x}"
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{value[:8].hex()}..({len(value)} bytes)"
    return repr(value)


class Layout:
    """The declaration of one structure.

    `size` is in bytes. `pack` refuses unknown names and values that do not fit, naming the field;
    `unpack` keeps whatever the named fields hold and leaves judging reserved bits to the caller
    (`reserved_set`), because who may set them differs from interface to interface.
    """

    def __init__(self, name: str, size: int, cite: Cite, fields: Sequence[Field]) -> None:
        if name in REGISTRY:
            raise ValueError(f"layout {name!r} is declared twice")
        self.name, self.size, self.cite = name, size, cite
        self.fields = {field.name: field for field in fields}
        taken = 0
        for field in fields:
            mask = field.limit << field.first_bit
            if taken & mask or field.last_bit >= size * 8:
                raise ValueError(f"{name}.{field.name} overlaps another field or leaves the {size} bytes")
            taken |= mask
        if len(self.fields) != len(fields):
            raise ValueError(f"{name} names a field twice")
        self.reserved_mask = ((1 << size * 8) - 1) ^ taken
        REGISTRY[name] = self

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, {self.size:#x} bytes, {len(self.fields)} fields, {self.cite})"

    def offset(self, name: str) -> int:
        """The byte offset of a field, for partial reads."""
        return self.fields[name].offset

    def record(self, **values: Any) -> Record:
        """A record with the given fields, the others zero."""
        return Record(self, {**self._empty, **self.checked(values)})

    def checked(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values in the form of their fields; `ValueError` or `TypeError` names a field that they do not fit."""
        for name in values:
            if name not in self.fields:
                raise ValueError(f"{self.name} has no field {name!r}")
        return {name: self._checked(self.fields[name], value) for name, value in values.items()}

    @cached_property
    def _empty(self) -> dict[str, Any]:
        """Every field as zero, in the order of the declaration."""
        return {name: self._checked(field, None) for name, field in self.fields.items()}

    def _checked(self, field: Field, value: Any) -> Any:
        label = f"{self.name}.{field.name}"
        if field.kind == "raw":
            if isinstance(value, int):
                raise TypeError(f"{label} takes {field.size} bytes, not the number {value:#x}")
            data = bytes(field.size) if value is None else bytes(value)
            if len(data) != field.size:
                raise ValueError(f"{label} takes {field.size} bytes, not {len(data)}")
            return data
        if field.kind == "sub":
            assert field.layout is not None
            count = max(field.count, 1)
            items = (field.layout.record(),) * count if value is None else tuple(value) if field.count else (value,)
            if len(items) != count:
                raise ValueError(f"{label} takes {count} records, not {len(items)}")
            for item in items:
                if not isinstance(item, Record) or item.layout is not field.layout:
                    raise TypeError(f"{label} takes a record of {field.layout.name}, not {item!r}")
            return items if field.count else items[0]
        try:
            number = 0 if value is None else operator.index(value)
        except TypeError:
            raise TypeError(f"{label} = {value!r}: an integer") from None
        if not 0 <= number <= field.limit:
            raise ValueError(f"{label} = {number:#x} does not fit {field.width} bits ({field.where})")
        return field.enum(number) if field.enum and number in field.enum._value2member_map_ else number

    def pack(self, **values: Any) -> bytes:
        """The bytes of a record; reserved bits are zero."""
        return bytes(self.record(**values))

    def unpack(self, data: bytes | bytearray | memoryview, offset: int = 0) -> Record:
        """The record at `offset` of `data`; `ValueError` where too few bytes are left."""
        if len(data) - offset < self.size:
            raise ValueError(f"{self.name} takes {self.size} bytes, {max(len(data) - offset, 0)} are left")
        values: dict[str, Any] = dict.fromkeys(self.fields)
        whole, names, others = self._plan
        values.update(zip(names, whole.unpack_from(data, offset), strict=True))
        body = bytes(data[offset : offset + self.size]) if others else b""
        for field in others:
            values[field.name] = self._decode(field, body)
        return Record(self, values)

    @cached_property
    def _plan(self) -> tuple[Struct, tuple[str, ...], tuple[Field, ...]]:
        """What `struct` decodes in one go, with the fields' names, and the fields that are left."""
        plain = [
            field for field in self.fields.values() if field.kind == "raw" or (field.kind == "uint" and not field.enum)
        ]
        plain.sort(key=lambda field: field.offset)
        formats, end = "<", 0
        for field in plain:
            formats += f"{field.offset - end}x" + (f"{field.size}s" if field.kind == "raw" else _FORMATS[field.size])
            end = field.offset + field.size
        others = tuple(field for field in self.fields.values() if field not in plain)
        return Struct(formats), tuple(field.name for field in plain), others

    def _decode(self, field: Field, body: bytes) -> Any:
        part = body[field.offset : field.offset + field.size]
        if field.kind == "raw":
            return part
        if field.kind == "sub":
            assert field.layout is not None
            if not field.count:
                return field.layout.unpack(part)
            return tuple(field.layout.unpack(part, i * field.layout.size) for i in range(field.count))
        number = int.from_bytes(part, "little") >> field.lo & field.limit
        return field.enum(number) if field.enum and number in field.enum._value2member_map_ else number

    def reserved_set(self, data: bytes | bytearray | memoryview, unknown: Iterable[str] = ()) -> list[int]:
        """The byte offsets whose reserved bits are not zero, lowest first; fields in `unknown` count as reserved."""
        mask = self.reserved_mask
        for name in unknown:
            mask |= self.fields[name].limit << self.fields[name].first_bit
        stray = int.from_bytes(data[: self.size], "little") & mask
        return [i for i, byte in enumerate(stray.to_bytes(self.size, "little")) if byte] if stray else []

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """A NumPy structured dtype; bit fields share a word named `word_0x..` (see `columns`)."""
        import numpy as np

        names: list[str] = []
        formats: list[Any] = []
        offsets: list[int] = []
        for field in self.fields.values():
            name = f"word_{field.offset:#x}" if field.kind == "bits" else field.name
            if name in names:
                continue
            names.append(name)
            offsets.append(field.offset)
            if field.kind == "raw":
                formats.append(("u1", (field.size,)))
            elif field.kind == "sub":
                assert field.layout is not None
                formats.append((field.layout.dtype, (field.count,)) if field.count else field.layout.dtype)
            else:
                formats.append(f"<u{field.size}")
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size})

    def columns(self, records: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Each field of many records (an array of `dtype`) as one array, bit fields shifted down."""
        result: dict[str, NDArray[Any]] = {}
        for field in self.fields.values():
            if field.kind == "bits":
                word = records[f"word_{field.offset:#x}"]
                result[field.name] = word >> word.dtype.type(field.lo) & word.dtype.type(field.limit)
            else:
                result[field.name] = records[field.name]
        return result

    def rows(self) -> list[tuple[str, int, int, str]]:
        """The bit diagram: (name, first bit, last bit, note) in order, gaps as `reserved`."""
        result: list[tuple[str, int, int, str]] = []
        position = 0
        for field in sorted(self.fields.values(), key=lambda f: f.first_bit):
            if field.first_bit > position:
                result.append(("reserved", position, field.first_bit - 1, "must be zero"))
            result.append((field.name, field.first_bit, field.last_bit, field.note))
            position = field.last_bit + 1
        if position < self.size * 8:
            result.append(("reserved", position, self.size * 8 - 1, "must be zero"))
        return result
