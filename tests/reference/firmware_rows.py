"""How a firmware command is told: a valid case, its checks in their order, the ways to fail each, what it does.

A check is a condition on a world and a request; the first that holds is the answer. Shared here are the checks that
many commands begin with. Sources: the firmware sheet's sections 1.2 and 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from tests.reference.firmware_world import (
    ABOVE,
    ASID_LIMIT,
    C_BIT,
    GCTX,
    IN_ASEG,
    IN_NOTHING,
    IN_RMP,
    IN_TSEG,
    MIB,
    OF_GUESTS,
    PAGE,
    PAGE_STATES,
    POLICY,
    Guest,
    Page,
    Request,
    World,
    bad_address,
)  # fmt: skip

Act = Callable[[World, Request], None]
Holds = Callable[[World, Request], bool]


@dataclass(frozen=True)
class Change:
    """One way to spoil a valid case."""

    name: str
    act: Act


def ask(**values: Any) -> Change:
    """Other fields of the buffer, or another meaning of the memory it points to."""

    def act(w: World, r: Request) -> None:
        for name, value in values.items():
            r.set(name, value)

    return Change(_shown(values), act)


def part(name: str, **values: Any) -> Change:
    """Another value in something that the request or the memory it points to is made of."""
    return Change(f"{name} {_shown(values)}", lambda w, r: r.set(name, replace(getattr(r, name), **values)))


def world(**values: Any) -> Change:
    """Another state of the platform."""

    def act(w: World, r: Request) -> None:
        for name, value in values.items():
            assert hasattr(w, name), name
            setattr(w, name, value)

    return Change(_shown(values), act)


def fault(name: str) -> Change:
    """A fault of the chip."""
    return Change(name, lambda w, r: w.faults.add(name))


def _place(w: World, r: Request, where: str | int) -> int | None:
    """The page that a field names or that lies at an address, if it is one that can be given away."""
    address = int(getattr(r, where) if isinstance(where, str) else where) & ~C_BIT & -PAGE
    return None if bad_address(w, address) else address


def page(where: str | int, **values: Any) -> Change:
    """Another entry for the page that a field names, or that lies at an address."""

    def act(w: World, r: Request) -> None:
        address = _place(w, r, where)
        if address is None:
            return
        if w.at(address) is w.pages.get(address & -(2 * MIB)):
            address &= -(2 * MIB)
        entry = deepcopy(w.at(address))
        for name, value in values.items():
            assert hasattr(entry, name), name
            setattr(entry, name, value)
        if entry.state in OF_GUESTS:
            entry.asid = entry.asid or 1
        else:
            entry.asid = 0
        entry.large = entry.large and entry.state not in ("HYPERVISOR", "HV_FIXED")
        entry.owner = (entry.owner or GCTX) if entry.state == "METADATA" else 0
        entry.gfn = entry.gfn if entry.state in OF_GUESTS else 0
        entry.vmsa = entry.state == "CONTEXT" or (entry.vmsa and entry.state in OF_GUESTS)
        w.pages[address] = entry

    return Change(f"{where} {_shown(values)}", act)


def pages_other_than(where: str | int, *states: str) -> list[Change]:
    """The page in each state but these."""
    return [page(where, state=state) for state in PAGE_STATES if state not in states]


def large(where: str | int, **values: Any) -> Change:
    """The entry becomes one of 2 MB."""

    def act(w: World, r: Request) -> None:
        address = _place(w, r, where)
        if address is None or w.at(address).state in ("HYPERVISOR", "HV_FIXED"):
            return
        w.pages[address & -(2 * MIB)] = replace(w.at(address), large=True, **values)

    return Change(f"{where} of 2 MB", act)


def guest(**values: Any) -> Change:
    """Another state of the guest that the command names."""

    def act(w: World, r: Request) -> None:
        for name, value in values.items():
            assert hasattr(w.guests[GCTX], name), name
            setattr(w.guests[GCTX], name, value)

    return Change(_shown(values), act)


def core(number: int | None = None, **values: int) -> Change:
    """Registers of one core, or of all."""

    def act(w: World, r: Request) -> None:
        for one in w.cores if number is None else [w.cores[number]]:
            for name, value in values.items():
                assert hasattr(one, name), name
                setattr(one, name, value)

    return Change(f"core {'s' if number is None else number}: {_shown(values)}", act)


def asid_is(state: str, last_complex_only: bool = False) -> Change:
    """The requested ASID is not clean, if it is one that can be."""

    def act(w: World, r: Request) -> None:
        if r.asid > ASID_LIMIT:
            return
        for states in w.asids[-1:] if last_complex_only else w.asids:
            states[r.asid] = state

    return Change(f"ASID {state}{' on one complex' * last_complex_only}", act)


def both(*changes: Change) -> Change:
    """Several changes as one."""

    def act(w: World, r: Request) -> None:
        for change in changes:
            change.act(w, r)

    return Change(", ".join(change.name for change in changes), act)


def _shown(values: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:#x}" if type(v) is int else f"{k}={v}" for k, v in values.items())


# Tables of checks.


@dataclass(frozen=True)
class Row:
    """One check of the sheet: when it fails, with which status, and the ways to make it fail.

    `left` is what the sheet says changes in the world although the command is refused, `leaves` names what changes
    besides, in memory. Rows of one `group` are answers of one check, of which only one can be given.
    """

    name: str
    status: int
    holds: Holds
    changes: list[Change]
    leaves: str = ""
    group: str = ""
    left: Act | None = None


@dataclass(frozen=True)
class Spec:
    """A command: its number, a valid case of it, its checks in order, what it does."""

    number: int
    base: Callable[[], tuple[World, Request]]
    rows: list[Row]
    effect: Act = lambda w, r: None
    size: int = 0  # of the buffer, in bytes; 0: there is none
    reserved: tuple[tuple[int, int], ...] = ()  # of the buffer: first and last bit of each run
    buffer: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of each field: first bit, number of bits

    def encode(self, r: Request) -> bytes:
        """The command buffer."""
        number = 0 if r.stray is None else 1 << r.stray
        for name, (first, bits) in self.buffer.items():
            value = r.fields[name]
            if isinstance(value, bytes):
                value = int.from_bytes(value, "little")
            assert 0 <= value < 1 << bits, (name, value)
            number |= value << first
        return number.to_bytes(self.size, "little")


def expected(spec: Spec, w: World, r: Request) -> int:
    """The status of the first check that fails, or 0."""
    row = first_failing(spec, w, r)
    return 0 if row is None else row.status


def first_failing(spec: Spec, w: World, r: Request) -> Row | None:
    return next((row for row in spec.rows if row.holds(w, r)), None)


def effects(spec: Spec, w: World, r: Request) -> World:
    """The world after a command."""
    after, row = deepcopy(w), first_failing(spec, w, r)
    if row is None:
        spec.effect(after, r)
    elif row.left:
        row.left(after, r)
    return after


def reserved_row(bits: tuple[tuple[int, int], ...], status: int = 0x16) -> Row:
    """P, first half: a reserved bit is set; the ends of each run stand for it, and a bit in its middle."""
    places = sorted({bit for first, last in bits for bit in (first, (first + last) // 2, last)})
    changes = [_stray(bit) for bit in places]
    return Row("reserved bits", status, lambda w, r: r.stray is not None, changes)


def _stray(bit: int) -> Change:
    def act(w: World, r: Request) -> None:
        r.stray = bit

    return Change(f"byte {bit // 8:#x} bit {bit % 8}", act)


def low_rows(*fields: str) -> Iterator[Row]:
    """P, second half: bits 11:0 of a page address."""
    for name in fields:
        yield Row(
            f"{name} not page-aligned", 0x16, lambda w, r, name=name: getattr(r, name) % PAGE != 0,
            [_add(name, low) for low in (1, 8, 0x800)],
        )  # fmt: skip


def _add(name: str, low: int) -> Change:
    return Change(f"{name} + {low:#x}", lambda w, r: r.set(name, getattr(r, name) + low))


NOT_INIT = Row("SNP UNINIT", 0x01, lambda w, r: w.snp != "INIT", [world(snp="UNINIT")])
"""S."""


def address_rows(
    name: str, size: int | Callable[[Request], int] = PAGE, lookup: bool = True, when: Holds = lambda w, r: True
) -> Iterator[Row]:
    """Where an address leads: into the RMP (0x16 for a look-up, 0x09 for data), to forbidden places, to no DRAM."""

    def answers(status: int) -> Holds:
        def holds(w: World, r: Request) -> bool:
            length = size if isinstance(size, int) else size(r)
            return when(w, r) and bad_address(w, getattr(r, name), length, lookup) == status

        return holds

    def lead(*places: int) -> list[Change]:
        return [ask(**{name: place}) for place in places]

    if lookup:
        yield Row(f"{name} in the RMP", 0x16, answers(0x16), lead(IN_RMP), group=name)
    forbidden = lead(*[IN_RMP] * (not lookup), ABOVE, IN_TSEG, IN_ASEG)
    yield Row(f"{name} forbidden", 0x09, answers(0x09), forbidden, group=name)
    yield Row(f"{name} in no DRAM", 0x03, answers(0x03), lead(IN_NOTHING, 1 << 30), group=name)


NO_CONTEXT = Row(
    "gctx no Context", 0x10, lambda w, r: w.at(r.gctx_paddr).state != "CONTEXT",
    [page("gctx_paddr", state=s) for s in ("FIRMWARE", "HYPERVISOR", "RECLAIM", "METADATA", "HV_FIXED")],
)  # fmt: skip
"""G: the page is no context; what stands in it may well be one."""


def prefix(
    bits: tuple[tuple[int, int], ...] = (), others: tuple[str, ...] = (), low: tuple[str, ...] = ()
) -> list[Row]:
    """[P S G]. `others` are further pages whose state is looked up, `low` further page-aligned addresses.

    Unconfirmed: the look-ups of other pages come in the order of the buffer, that of the context last.
    """
    rows = [reserved_row(bits)] if bits else []
    rows += low_rows("gctx_paddr", *low)
    rows.append(NOT_INIT)
    for name in (*others, "gctx_paddr"):
        rows += address_rows(name)
    return [*rows, NO_CONTEXT]


def gstate_row(*admitted: str) -> Row:
    """The guest is in none of the admitted states."""
    others = [s for s in ("INIT", "LAUNCH", "RUNNING") if s not in admitted]
    return Row(
        f"guest not {' or '.join(admitted)}", 0x02, lambda w, r: w.guest(r.gctx_paddr).gstate not in admitted,
        [guest(gstate=state) for state in others],
    )  # fmt: skip


INACTIVE = Row("guest inactive", 0x08, lambda w, r: w.guest(r.gctx_paddr).asid == 0, [guest(asid=0)])


def world_with_guest(gstate: str = "LAUNCH", asid: int = 1, **values: Any) -> World:
    """SNP initialised, every ASID clean, and a guest; its ASID is in the state that goes with its own."""
    policy = 0 if gstate == "INIT" else POLICY
    w = World(guest_count=int(gstate != "INIT"))
    w.guests[GCTX] = Guest(gstate, asid, **{"policy": policy, **values})
    w.pages[GCTX] = Page("CONTEXT", vmsa=True)
    if asid:
        w.set_asid(asid, "IN_USE" if gstate == "RUNNING" else "ALLOCATED")
    return w


def writable_row(name: str) -> Row:
    """An output page: Firmware or Default once SNP is on."""
    return Row(
        f"{name}: page not Firmware or Default", 0x1A,
        lambda w, r: w.snp == "INIT" and w.at(getattr(r, name)).state not in ("FIRMWARE", "DEFAULT"),
        pages_other_than(name, "FIRMWARE"),
    )  # fmt: skip


def length_row(length: int, status: int = 0x16) -> Row:
    """The buffer's own length field."""
    return Row("length", status, lambda w, r: r.length != length, [ask(length=n) for n in (0, length - 1, length + 1)])
