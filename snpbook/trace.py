"""What happened: typed events, one for each vector operation, and the bus that carries them.

The model emits, listeners observe: logs, ledgers, widgets and tests are listeners, and nothing in
the model depends on one being there. This file knows events only, neither their causes nor views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from snpbook.spec.pages import PAGES_PER_LARGE
from snpbook.spec.refusal import Refusal
from snpbook.spec.rmp import LARGE, VALIDATED

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Event:
    """Something that took place; `count` says how many times, for a vector operation."""

    @property
    def count(self) -> int:
        return 1

    def __repr__(self) -> str:
        parts = (f"{field.name}={_brief(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Instruction(Event):
    """An RMP instruction executed on a run of pages: RMPUPDATE, PVALIDATE and their kin.

    `status` has one return code per page; `before` and `after` are the raw RMP words (n, 2).
    """

    name: str
    actor: str
    pages: range | NDArray[Any]
    status: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]

    @property
    def count(self) -> int:
        return len(self.pages)


@dataclass(frozen=True, slots=True, eq=False)
class StateChange:
    """A platform, guest or ASIDs that a firmware command moved from one state to another; None: there was, or is, none.

    `what` is "SNP platform", "legacy platform", "guest" (`where` is its context's address), "legacy guest" (its handle)
    or "ASIDs" (an array (n, 2) of core complex and ASID).
    """

    what: str
    where: Any
    before: IntEnum | None
    after: IntEnum | None

    def __str__(self) -> str:
        where = {"guest": f" {self.where:#x}" if isinstance(self.where, int) else "", "legacy guest": f" {self.where}"}
        count = f"{len(self.where)} " if self.what == "ASIDs" else ""
        names = (state.name if state is not None else "none" for state in (self.before, self.after))
        return f"{count}{self.what}{where.get(self.what, '')}: {' -> '.join(names)}"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class FirmwareCommand(Event):
    """A mailbox command and its status, with the refusal behind it; a run of SNP_LAUNCH_UPDATE is one with `pages`.

    `changed` are the pages whose RMP entries the command wrote (n,), `before` and `after` their `PageState`s (n,). The
    building of a whole table is not told page by page. `states` are its changes of other states.
    """

    name: str
    status: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    refusal: Refusal | None = None
    pages: range | NDArray[Any] | None = None
    changed: NDArray[Any] | None = None
    before: NDArray[Any] | None = None
    after: NDArray[Any] | None = None
    states: tuple[StateChange, ...] = ()

    @property
    def count(self) -> int:
        return 1 if self.pages is None else len(self.pages)

    @property
    def reason(self) -> str:
        """The refused rule in one line, without the status; empty for a success."""
        return Refusal.__str__(self.refusal) if self.refusal else ""


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Ioctl(Event):
    """A system call of the VMM on a device file: `errno` 0 is success."""

    device: str
    name: str
    errno: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SystemCall(Event):
    """Any other system call of a process, such as mmap or fallocate: `errno` 0 is success."""

    name: str
    errno: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class PagesMoved(Event):
    """Pages of a file of memory got frames or lost them: of the run `offsets`, which are `resident` now (n,)."""

    file: Any
    offsets: range
    resident: NDArray[Any]

    @property
    def count(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class PagesPinned(Event):
    """The kernel pins frames for `owner` for long, or lets them go."""

    owner: Any
    frames: NDArray[Any]
    pinned: bool

    @property
    def count(self) -> int:
        return len(self.frames)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class PagesCopied(Event):
    """A launch copied pages from the shared to the private side of a guest's memory."""

    pages: int

    @property
    def count(self) -> int:
        return self.pages


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class CachesWrittenBack(Event):
    """WBINVD on every core."""

    cores: int


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class NestedMapping(Event):
    """A run of guest pages is now mapped in the nested tables at `root`, or no more."""

    root: int
    gfns: range
    mapped: bool

    @property
    def count(self) -> int:
        return len(self.gfns)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class VmExit(Event):
    """A vCPU left guest mode; a nested page fault may stand for a run of `pages` pages."""

    vcpu: int
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    pages: int = 1

    @property
    def count(self) -> int:
        return self.pages


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Message(Event):
    """A line that a party prints: the kernel's log, the guest's console."""

    source: str
    text: str


Listener = Callable[[Event], None]


class Trace:
    """The bus: `emit` hands an event to every listener, in order of subscription.

    A trace without listeners is false, so that the model need not build events nobody reads.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def __repr__(self) -> str:
        return f"Trace({len(self._listeners)} listeners)"

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; the value returned removes it again."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            listener(event)


class Recorder:
    """A listener that keeps events in order, for logs and tests."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        return f"Recorder({len(self.events)} events)"

    def of(self, kind: type[Event], name: str | None = None) -> list[Any]:
        """The events of one type, and with `name` only those of that name."""
        return [e for e in self.events if isinstance(e, kind) and (name is None or getattr(e, "name", None) == name)]


@dataclass(slots=True)
class Counts:
    """A listener that counts work exactly: vector runs expanded, pages of 4 KB."""

    rmpupdates: int = 0
    pvalidates: int = 0
    pages_validated: int = 0
    firmware_commands: int = 0
    ioctls: int = 0
    exits: int = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Instruction(name="RMPUPDATE"):
                self.rmpupdates += event.count
            case Instruction(name="PVALIDATE"):
                self.pvalidates += event.count
                self.pages_validated += _newly_validated(event)
            case FirmwareCommand():
                self.firmware_commands += event.count
            case Ioctl():
                self.ioctls += 1
            case VmExit():
                self.exits += event.count


def _brief(value: Any) -> str:
    """One short word for a value: arrays by their length, runs and numbers in hexadecimal."""
    if isinstance(value, range):
        return f"{len(value)} pages from {value.start:#x}"
    if hasattr(value, "shape"):
        return f"[{len(value)}]"
    return f"{value:#x}" if isinstance(value, int) and value > 9 else repr(value)


def _newly_validated(event: Instruction) -> int:
    """Pages of 4 KB that a PVALIDATE run turned from not validated to validated."""
    low, word = event.after[:, 0], event.after.dtype.type
    became = low & ~event.before[:, 0] & word(VALIDATED) != 0
    return int(became.sum()) + (PAGES_PER_LARGE - 1) * int((became & (low & word(LARGE) != 0)).sum())
