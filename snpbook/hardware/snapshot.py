"""Snapshots: everything that some objects, and all objects behind them, hold at one moment.

What is found is written down: attributes, lists, dictionaries, sets, arrays. An object with the methods `snapshot` and
`restore` says itself what it holds, as memory, the memory keys and executors do. The trace and its listeners
are observers and no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, timedelta
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from snpbook.hardware.contents import Contents
from snpbook.trace import Counts, Recorder, Trace

_LEAVES = (int, float, str, bytes, type(None), frozenset, range, np.generic, date, timedelta, type, Contents)
_FACTS = "snpbook.spec"
"""Layouts, records and products: nothing changes them."""
_OBSERVERS = (Trace, Recorder, Counts)
_CONTAINERS = (dict, list, set, bytearray, np.ndarray)


@runtime_checkable
class Keeper(Protocol):
    """An object that says itself what it holds."""

    def snapshot(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class _Ref:
    """A mutable object, by its number among those of a snapshot."""

    number: int


@dataclass(frozen=True, slots=True)
class _Value:
    """An immutable object made of others: equal if kind and parts are; `raw` is the object itself."""

    kind: object
    parts: tuple[object, ...]
    raw: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and (self.kind, self.parts) == (other.kind, other.parts)

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True)
class _Node:
    """A mutable object: where it was found first, itself, and what it held: pairs of a name and an encoded value."""

    path: str
    object: Any
    state: list[tuple[object, object]]
    kept: Any = None


class Snapshot:
    """What the objects named by `roots` hold now.

    `restore` gives it back to the same objects. Two snapshots are equal if the objects that they found, in the order of
    finding, held the same: also those of two machines made from the same seed.
    """

    def __init__(self, **roots: object) -> None:
        self._nodes: list[_Node] = []
        self._numbers: dict[int, int] = {}
        self._roots = [(name, self._encode(root, name)) for name, root in roots.items()]
        done = 0
        while done < len(self._nodes):
            node = self._nodes[done]
            self._write_down(node)
            done += 1

    def __repr__(self) -> str:
        return f"Snapshot({', '.join(name for name, _ in self._roots)}: {len(self._nodes)} objects)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and next(self._unlike(other), None) is None

    __hash__ = None  # type: ignore[assignment]

    def differences(self, other: Snapshot) -> list[str]:
        """The places that differ, by their paths, such as `machine.cores[2].in_guest`."""
        return list(self._unlike(other))

    def restore(self) -> None:
        """Give every object back what it held."""
        for node in self._nodes:
            match node.object:
                case Keeper():
                    node.object.restore(node.kept)
                case dict():
                    node.object.clear()
                    node.object.update({self._decode(key): self._decode(value) for key, value in node.state})
                case list():
                    node.object[:] = [self._decode(value) for _, value in node.state]
                case set():
                    node.object.clear()
                    node.object.update(node.kept)
                case np.ndarray() if not node.object.flags.writeable:
                    pass  # nobody can have changed it
                case bytearray() | np.ndarray():
                    node.object[:] = node.kept
                case _:
                    self._restore_attributes(node)

    def _restore_attributes(self, node: _Node) -> None:
        held = {str(name): self._decode(value) for name, value in node.state}
        for name in [name for name, _ in _attributes(node.object) if name not in held]:
            object.__delattr__(node.object, name)
        for name, value in held.items():
            object.__setattr__(node.object, name, value)

    def _write_down(self, node: _Node) -> None:
        """Encode what an object holds, which may find further objects."""
        found, path = node.object, node.path
        match found:
            case Keeper():
                node.kept = found.snapshot()
                node.state = [("", self._encode(node.kept, path))]
            case dict():
                node.state = [
                    (self._encode(k, f"{path} key"), self._encode(v, f"{path}[{k!r}]")) for k, v in found.items()
                ]
            case list():
                node.state = [(i, self._encode(value, f"{path}[{i}]")) for i, value in enumerate(found)]
            case set():
                node.kept = frozenset(found)
                node.state = [("", node.kept)]
            case bytearray():
                node.kept = bytes(found)
                node.state = [("", node.kept)]
            case np.ndarray():
                node.kept = found.copy()
                node.state = [("", _Value(found.dtype.str, (found.shape, node.kept.tobytes()), node.kept))]
            case _:
                node.state = [(name, self._encode(value, f"{path}.{name}")) for name, value in _attributes(found)]

    def _encode(self, value: Any, path: str) -> object:
        """A leaf as it is, an immutable object as `_Value`, a mutable one as the number of its node."""
        if isinstance(value, _LEAVES) or type(value).__module__.startswith(_FACTS):
            return value
        if isinstance(value, FunctionType | BuiltinFunctionType):
            return _Value("function", (value.__module__, value.__qualname__), value)
        if isinstance(value, MethodType):
            return _Value("method", (value.__name__, self._encode(value.__self__, path)), value)
        if isinstance(value, tuple):
            return _Value(type(value), tuple(self._encode(part, f"{path}[{i}]") for i, part in enumerate(value)), value)
        if _frozen(value):
            names = [item.name for item in fields(value) if item.compare]
            return _Value(type(value), tuple(self._encode(getattr(value, n), f"{path}.{n}") for n in names), value)
        if isinstance(value, _OBSERVERS) or not (isinstance(value, _CONTAINERS) or _has_attributes(value)):
            return _Value("opaque", (type(value),), value)
        number = self._numbers.setdefault(id(value), len(self._nodes))
        if number == len(self._nodes):
            self._nodes.append(_Node(path, value, []))
        return _Ref(number)

    def _decode(self, value: object) -> Any:
        """What was encoded: the object itself, whatever it holds now."""
        match value:
            case _Ref():
                return self._nodes[value.number].object
            case _Value():
                return value.raw
            case _:
                return value

    def _unlike(self, other: Snapshot) -> Iterator[str]:
        if self._roots != other._roots:
            yield "the roots"
        for mine, theirs in zip(self._nodes, other._nodes, strict=False):
            if type(mine.object) is not type(theirs.object) or len(mine.state) != len(theirs.state):
                yield mine.path
                continue
            for (name, value), (other_name, other_value) in zip(mine.state, theirs.state, strict=True):
                if name != other_name or value != other_value:
                    yield mine.path + _suffix(mine.object, name)
        if len(self._nodes) != len(other._nodes):
            yield f"{len(self._nodes)} objects and {len(other._nodes)}"


def _attributes(value: object) -> list[tuple[str, object]]:
    """An object's attributes: those of its dictionary and of its slots, as far as they are set."""
    names = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if name[:2] != "__"]
    slots = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *slots]


def _frozen(value: object) -> bool:
    """Whether a value is a dataclass that nobody changes."""
    return is_dataclass(value) and not isinstance(value, type) and vars(type(value))["__dataclass_params__"].frozen


def _has_attributes(value: object) -> bool:
    return hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in type(value).__mro__)


def _suffix(holder: object, name: object) -> str:
    """How a part of an object is written behind the object's path."""
    if isinstance(holder, dict | list):
        return f"[{name!r}]"
    return f".{name}" if name else ""
