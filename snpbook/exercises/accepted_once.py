"""Exercises on memory that a guest accepts: what PVALIDATE answers, why no page is validated twice, how many lists.

The first and the last run on a guest that has booted, the second on a workbench, where the reader plays the host, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from snpbook.exercises.inside_the_guest import SOURCE, STOPS
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.exercises.tried_guest import tried_guest
from snpbook.guest.acceptance import accept, give_up
from snpbook.guest.boot import Kernel
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.snapshot import Snapshot
from snpbook.hardware.workbench import PLAY, Workbench
from snpbook.spec.ghcb import PSC_ENTRIES
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.vmcb import ExitCode
from snpbook.trace import VmExit

APM = "APM2 15.36.6"
_VERDICTS = ("done", "smaller", "end")
_REGION = range(PAGES_PER_LARGE, 2 * PAGES_PER_LARGE)
"""2 MB of accepted memory, which the host backs by pages of 4 KB."""

# 3: PVALIDATE


async def _asked(answer: Answer, cpu: GuestCpu, pages: range, *, validate: bool) -> object:
    """Execute PVALIDATE as often as the answer to its results says. A range with steps of 512 stands for 2 MB pages."""
    large = pages.step > 1
    codes, carries = await cpu.pvalidate(pages.start << PAGE_SHIFT, len(pages), validate=validate, large=large)
    results = sorted(set(zip(codes.tolist(), carries.tolist(), strict=True)))
    said = [answer(code, carry, large) for code, carry in results]
    if None in said:
        return None
    if unknown := [one for one in said if one not in _VERDICTS]:
        return f"{unknown[0]!r}, which is none of {', '.join(map(repr, _VERDICTS))}"
    if "end" in said:
        return STOPS
    if "smaller" in said:
        if not large:
            return "asks for smaller pages than there are"
        return await _asked(answer, cpu, range(pages.start, pages.stop), validate=validate)
    bad = int(((codes != 0) | carries).sum())
    return f"goes on, and {bad} pages are not as it thinks" if bad else f"goes on with {len(pages)} pages"


def _fate_cases() -> list[Case]:
    def case(name: str, pages: range, fresh: range, expected: str, rule: str, *, validate: bool = True) -> Case:
        def run(answer: Answer) -> object:
            async def act(kernel: Kernel) -> object:
                await kernel.cpu.pvalidate(fresh.start << PAGE_SHIFT, len(fresh), validate=False)
                return await _asked(answer, kernel.cpu, pages, validate=validate)

            return tried_guest().run(act).outcome

        return Case(name, run, expected, rule, APM)

    first, whole = _REGION[:4], range(_REGION.start, _REGION.stop, PAGES_PER_LARGE)
    twice = "CF = 1: nothing has changed, so the page was validated before, and not by this guest now. It ends"
    return [
        case("four fresh pages", first, first, "goes on with 4 pages", "code 0 and CF = 0: the page is validated"),
        case("the last of four was validated before", first, first[:3], STOPS, twice),
        case("all four were validated before", first, _REGION[8:9], STOPS, twice),
        case(
            "2 MB that the host backs by 4 KB", whole, _REGION, "goes on with 512 pages",
            "code 6: the RMP has pages of 4 KB here. Nothing is wrong; they are validated one by one",
        ),
        case("the same, and one page of it was validated before", whole, _REGION[:-1], STOPS, twice),
        case(
            "2 MB at an address that is no multiple of 2 MB", range(_REGION.start + 1, _REGION.stop, PAGES_PER_LARGE),
            _REGION, STOPS, "code 1: the instruction was wrong, and a guest that goes on has validated nothing",
        ),
        case("four pages are given up", first, _REGION[8:9], "goes on with 4 pages",
             "to rescind is judged by the same two results", validate=False),
        case("one of the four was given up before", first, first[1:2], STOPS,
             "CF = 1 when rescinding: the page is not what the guest believes it to be", validate=False),
    ]  # fmt: skip


FATE_STUB = '''\
def fate(code, carry, large):
    """What a guest makes of the results of PVALIDATE: "done", "smaller" or "end"."""
    ...
'''


def fate(code: int, carry: bool, large: bool) -> str:
    """What a guest makes of the results of PVALIDATE: "done", "smaller" or "end"."""
    if code == 6 and large:
        return "smaller"
    return "end" if code or carry else "done"


def _code_alone(code: int, carry: bool, large: bool) -> str:
    return fate(code, False, large)


def _no_smaller(code: int, carry: bool, large: bool) -> str:
    return "end" if code or carry else "done"


def _always_smaller(code: int, carry: bool, large: bool) -> str:
    return "smaller" if code and large else fate(code, carry, large)


FATE = register(
    Exercise(
        id="inside_the_guest.3",
        title="Nothing has changed",
        minutes=10,
        difficulty=1,
        prerequisites=(),
        task=(
            "A guest executes PVALIDATE. `code` is what it finds in EAX (0 success, 1 wrong input, 6 another page "
            "size), `carry` the carry flag CF, `large` whether it named a page of 2 MB. Return 'done' where the page "
            "is as the guest wants it, 'smaller' where it shall try the 512 pages of 4 KB, and 'end' where it must "
            "end itself."
        ),
        stub=FATE_STUB,
        reference=fate,
        wrong=(
            Wrong(_code_alone, "the page was validated before"),
            Wrong(_no_smaller, "they are validated one by one"),
            Wrong(_always_smaller, "2 MB at an address"),
        ),
        hints=(
            "There are three codes and two values of CF. Only one of the six combinations is plain success.",
            "CF = 1 comes with code 0: the instruction was in order, and changed nothing.",
            "Code 6 for a page of 2 MB: smaller. Any other code, or CF = 1: end. Else: done.",
        ),
        solution=(
            "CF = 1 looks harmless: the page is validated, as the guest wants it. But the guest validates each page "
            "once, so somebody has put another page there, one that it, or the firmware at launch, validated at an "
            "earlier time, and whose content is old. A guest that goes on has accepted a replay."
        ),
        cases=_fate_cases,
    )
)

# 4: validated twice

_GFN, _ASID = 0x10, 1
_SIZE = 8
Move = tuple[str, ...]


@cache
def _table() -> tuple[Workbench, Snapshot]:
    """Where the game is played, and how it is before the first move: the guest has its own tables, and no page."""
    bench = Workbench()
    bench.guest(_ASID)
    return bench, Snapshot(bench=bench)


@cache
def played(moves: tuple[Move, ...]) -> list[str]:
    """What the guest's accesses come to, read off a machine on which host and guest move as told."""
    bench, before = _table()
    before.restore()
    guest, pages = bench.guest(_ASID), {"A": PLAY[0], "B": PLAY[1]}
    found: list[str] = []
    given: set[str] = set()
    for what, *rest in moves:
        match what:
            case "map":
                page = range(pages[rest[0]], pages[rest[0]] + 1)
                if rest[0] not in given:
                    bench.host.rmpupdate(page, range(_GFN, _GFN + 1), NewState(assigned=True, asid=_ASID))
                    given.add(rest[0])
                guest.map(_GFN, page)
            case "validate":
                guest.pvalidate(_GFN)
            case "write":
                fault = guest.core().write(_GFN << PAGE_SHIFT, rest[0].encode().ljust(_SIZE, b"\0"))
                found += ["#VC"] if isinstance(fault, GuestException) else []
            case "read":
                data = guest.core().read(_GFN << PAGE_SHIFT, _SIZE)
                found.append(data.rstrip(b"\0").decode() if isinstance(data, bytes) else "#VC")
    return found


REPLAY: tuple[Move, ...] = (
    ("map", "A"), ("validate",), ("write", "old"), ("map", "B"), ("read",), ("validate",), ("write", "new"),
    ("map", "A"), ("read",),
)  # fmt: skip
"""The game of the chapter: the host keeps the first page, and brings it back when the guest has gone on."""


def _reads_cases() -> list[Case]:
    def case(name: str, rule: str, *moves: Move) -> Case:
        return Case(name, lambda answer: answer([tuple(move) for move in moves]), played(moves), rule, APM)

    start: tuple[Move, ...] = (("map", "A"), ("validate",), ("write", "old"))
    return [
        case("one page, validated once", "what was written is read", *start, ("read",)),
        case("nothing is validated", "an access to a page that is not validated is a #VC", ("map", "A"), ("read",)),
        case("another page comes", "a new page is not validated: the guest notices", *start, ("map", "B"), ("read",)),
        case(
            "the first page comes back", "Validated belongs to the page in the RMP: A still has it", *start,
            ("map", "B"), ("read",), ("map", "A"), ("read",),
        ),
        case(
            "the guest validates again", "two pages are validated for one address: the host chooses which one is read",
            *REPLAY,
        ),
        case(
            "to and fro", "each page keeps its own content: the host can go to and fro without a single #VC", *REPLAY,
            ("map", "B"), ("read",), ("map", "A"), ("write", "last"), ("map", "B"), ("read",), ("map", "A"), ("read",),
        ),
        case(
            "a write to the page that is not validated", "a write is checked like a read, and nothing is stored",
            *start, ("map", "B"), ("write", "lost"), ("map", "A"), ("read",),
        ),
    ]  # fmt: skip


READS_STUB = '''\
def reads(moves):
    """What the guest's accesses come to, in order: the text that a read finds, or "#VC" for a read or a write."""
    ...
'''


def reads(moves: Sequence[Move]) -> list[str]:
    """What the guest's accesses come to, in order: the text that a read finds, or "#VC" for a read or a write."""
    found: list[str] = []
    content: dict[str, str] = {}
    validated, here = set(), ""
    for what, *rest in moves:
        if what == "map":
            here = rest[0]
        elif what == "validate":
            validated.add(here)
        elif here not in validated:
            found.append("#VC")
        elif what == "write":
            content[here] = rest[0]
        else:
            found.append(content[here])
    return found


def _by_address(moves: Sequence[Move]) -> list[str]:
    """Validated, as if it belonged to the address."""
    same = [("map", "A") if move[0] == "map" else move for move in moves]
    return reads(same)


def _last_alone(moves: Sequence[Move]) -> list[str]:
    """As if the second validation took the first away."""
    found, validated, here, content = [], "", "", {}
    for what, *rest in moves:
        if what == "map":
            here = rest[0]
        elif what == "validate":
            validated = here
        elif here != validated:
            found.append("#VC")
        elif what == "write":
            content[here] = rest[0]
        else:
            found.append(content[here])
    return found


READS = register(
    Exercise(
        id="inside_the_guest.4",
        title="Validated twice",
        minutes=20,
        difficulty=2,
        prerequisites=("inside_the_guest.3",),
        task=(
            "Take pencil and paper first: the moves of the chapter's game. `moves` are moves of host and guest at one "
            "guest address: ('map', 'A') the host puts system page A there, and has given it to the guest in the RMP "
            "before; ('validate',) the guest executes PVALIDATE; ('write', text) and ('read',) are the guest's. "
            "Return what the accesses come to, in order: for a read the text that it finds, for a read or a write of "
            "a page that is not validated '#VC'. A write that succeeds adds nothing."
        ),
        stub=READS_STUB,
        reference=reads,
        wrong=(
            Wrong(_by_address, "a new page is not validated"),
            Wrong(_last_alone, "two pages are validated for one address"),
        ),
        hints=(
            "Draw two columns, A and B. In each: is it validated, and what is in it? And a finger on the page that the "
            "host has mapped now.",
            "PVALIDATE marks the page under the finger. Moving the finger changes no mark and no content.",
            "Keep a set of validated pages, a dict of contents, and the page that is mapped; an access to a page that "
            "is not in the set is '#VC'.",
        ),
        solution=(
            "Validated is a bit of the system page's entry in the RMP. While each guest address is validated once, "
            "there is one page for it, and every other is a #VC. After a second validation there are two, and the "
            "host can go back to the first whenever it likes: that is a replay, and no hardware stops it. So a #VC "
            "with error code 0x404 is fatal, and CF = 1, too."
        ),
        cases=_reads_cases,
    )
)

# 5: how many lists


@cache
def asked_lists(first: int, count: int, entries: int) -> int:
    """How many lists a guest sends to accept `count` pages from `first` on, counted on a guest that does.

    Before it gives them up, which takes as many; each list is an exit.
    """
    pages = range(first, first + count)

    async def act(kernel: Kernel) -> None:
        await give_up(kernel.channel, pages, entries)
        await accept(kernel.channel, pages, entries)

    happened = tried_guest().run(act).happened
    exits = sum(
        event.count for event in happened if isinstance(event, VmExit) and event.reason == ExitCode.VMGEXIT.name
    )
    return exits // 2


def _lists_cases() -> list[Case]:
    def case(name: str, first: int, count: int, entries: int, rule: str) -> Case:
        expected = asked_lists(first, count, entries)
        return Case(name, lambda answer: answer(first, count, entries), expected, rule, SOURCE)

    start = _REGION.start
    return [
        case("one page", start, 1, PSC_ENTRIES, "one entry is a list, too"),
        case("300 pages, none of 2 MB", start, 300, PSC_ENTRIES, "a list has `entries` at most: 253 and then 47"),
        case("300 pages, lists of 64", start, 300, 64, "a list has `entries` at most, whatever the buffer holds"),
        case("2 MB", start, PAGES_PER_LARGE, 64, "an aligned 2 MB is one entry"),
        case("2 MB that are not aligned", start + 1, PAGES_PER_LARGE, 64,
             "only what begins at a multiple of 512 pages and is whole is one entry"),
        case("100 pages, 4 MB, 20 pages", start - 100, 2 * PAGES_PER_LARGE + 120, 64,
             "entries of both sizes share lists: 100 + 2 + 20 entries"),
        case("two ends without a whole region", start - 100, 200, PSC_ENTRIES, "no 2 MB in it: 200 entries"),
    ]  # fmt: skip


LISTS_STUB = '''\
def lists(first, count, entries):
    """How many lists of page state changes a guest sends to accept a run of pages."""
    ...
'''


def lists(first: int, count: int, entries: int) -> int:
    """How many lists of page state changes a guest sends to accept a run of pages."""
    begin, end = -(-first // 512), (first + count) // 512
    large = max(end - begin, 0)
    return -(-(count - 512 * large + large) // entries)


def _no_large(first: int, count: int, entries: int) -> int:
    return -(-count // entries)


def _unaligned(first: int, count: int, entries: int) -> int:
    large, rest = divmod(count, 512)
    return -(-(large + rest) // entries)


def _one_too_few(first: int, count: int, entries: int) -> int:
    return lists(first, count, entries) - 1 or 1


LISTS = register(
    Exercise(
        id="inside_the_guest.5",
        title="How many lists?",
        minutes=10,
        difficulty=1,
        prerequisites=(),
        task=(
            "A guest accepts `count` pages of 4 KB from guest page `first` on. It asks by lists of up to `entries` "
            "entries. An entry stands for a page of 4 KB, or for a whole 2 MB (512 pages) that begins at a multiple of "
            "512 pages; the guest takes 2 MB where it can. Entries of both sizes stand in one list. Return how many "
            "lists it sends."
        ),
        stub=LISTS_STUB,
        reference=lists,
        wrong=(
            Wrong(_no_large, "an aligned 2 MB is one entry"),
            Wrong(_unaligned, "begins at a multiple of 512 pages"),
            Wrong(_one_too_few, "253 and then 47"),
        ),
        hints=(
            "Count entries first, lists then.",
            "Whole regions lie between `first` rounded up and `first + count` rounded down to multiples of 512.",
            "large = max((first + count) // 512 - ceil(first / 512), 0); entries = large + count - 512 * large.",
        ),
        solution=(
            "64 GiB by 4 KB are 16,777,216 entries: 66,314 lists of 253, and for Linux, whose lists have 64 entries, "
            "262,144. By 2 MB they are 32,768 entries and 130 lists. Each list is an exit from the guest, so lazy "
            "acceptance pays at once for memory that nobody uses."
        ),
        cases=_lists_cases,
    )
)
