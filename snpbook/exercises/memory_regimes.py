"""Exercises on the regimes of private memory: which pages may not move, and what comes back after conversions.

What is expected is read off guests that run on each back end; every case runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from snpbook.exercises.private_memory import LINUX
from snpbook.exercises.registry import Case, Exercise, Wrong, register
from snpbook.regimes.content import Found, flip
from snpbook.regimes.regime import FIRST, Regime

V7 = "RFC v7"
Step = tuple[str, int, int]

# 2: pages that may not move

_CALM: tuple[Step, ...] = (("to private", 0, 100), ("touched", 0, 40))
_LIVES: dict[str, tuple[Step, ...]] = {
    "nothing yet": (),
    "converted and partly touched": _CALM,
    "shared again in part": (*_CALM, ("to shared", 20, 60)),
    "there and back": (*_CALM, ("to shared", 0, 40), ("to private", 0, 40), ("touched", 0, 10)),
}
_KINDS = {"registered": "sev", "lazy": "sev", "restricted": "snp", "guest_memfd": "snp"}


@cache
def _pinned(backend: str, life: tuple[Step, ...]) -> tuple[int, int, int]:
    """Pages of the guest, pages pinned after its launch, and at the end of its life."""
    regime = Regime(_KINDS[backend], backend)
    regime.guest.launch()
    total = sum(block.size for block in regime.vmm.blocks) // 4096
    launched = regime.sample("launched").pages.pinned
    for what, start, stop in life:
        gfns = range(FIRST + start, FIRST + stop)
        if what == "touched":
            regime.touch(gfns)
        else:
            regime.convert(gfns, private=what == "to private")
    return total, launched, regime.sample("end").pages.pinned


def _pinned_cases() -> list[Case]:
    rules = {
        "registered": "all memory is pinned from the registration on, and stays so",
        "lazy": "a page is pinned as it is first used, and free again once a hole is punched",
        "restricted": "the hook of the attribute gives a page memory as it is converted",
        "guest_memfd": "a page gets memory as it is first used, not as it is converted",
    }

    def case(backend: str, name: str) -> Case:
        total, launched, end = _pinned(backend, _LIVES[name])
        if backend == "registered":
            launched = 0
        history = list(_LIVES[name])
        return Case(
            f"{backend}: {name}",
            lambda answer: answer(backend, total, launched, list(history)),
            end,
            rules[backend],
            V7,
        )

    return [case(backend, name) for backend in rules for name in _LIVES]


PINNED_STUB = '''\
def pinned(backend, pages, launched, history):
    """How many pages of a guest may not move after `history`."""
    ...  # for what, start, stop in history: "to private", "touched" or "to shared"
'''


def pinned(backend: str, pages: int, launched: int, history: Sequence[Step]) -> int:
    """How many pages of a guest may not move after `history`."""
    if backend == "registered":
        return pages
    held: set[int] = set()
    for what, start, stop in history:
        if what == "to shared":
            held -= set(range(start, stop))
        elif what == "touched" or backend == "restricted":
            held |= set(range(start, stop))
    return launched + len(held)


def _by_conversion(backend: str, pages: int, launched: int, history: Sequence[Step]) -> int:
    return pinned("registered" if backend == "registered" else "restricted", pages, launched, history)


def _by_use(backend: str, pages: int, launched: int, history: Sequence[Step]) -> int:
    return pinned("registered" if backend == "registered" else "lazy", pages, launched, history)


def _never_less(backend: str, pages: int, launched: int, history: Sequence[Step]) -> int:
    return pinned(backend, pages, launched, [step for step in history if step[0] != "to shared"])


def _registered_lazily(backend: str, pages: int, launched: int, history: Sequence[Step]) -> int:
    return pinned("lazy" if backend == "registered" else backend, pages, launched, history)


PINNED = register(
    Exercise(
        id="private_memory.2",
        title="Pages that may not move",
        minutes=12,
        difficulty=2,
        prerequisites=(),
        task=(
            "A guest of `pages` pages has been launched, with `launched` pages in a private file. `history` is a list "
            "of (what, start, stop) for its pages start to stop - 1: 'to private' and 'to shared' are conversions, "
            "after which the VMM frees the other side, and 'touched' is the first use of private pages. Return how "
            "many pages are pinned, or in a file that nothing moves."
        ),
        stub=PINNED_STUB,
        reference=pinned,
        wrong=(
            Wrong(_registered_lazily, "from the registration on"),
            Wrong(_by_conversion, "as it is first used"),
            Wrong(_by_use, "as it is converted"),
            Wrong(_never_less, "once a hole is punched"),
        ),
        hints=(
            "Look at the line in the panels of the desk: when does it rise, and when does it fall?",
            "One back end pins everything once. One of the other three follows the conversion, two follow the use.",
            "registered: pages. Otherwise launched, plus a set of pages: 'to shared' takes pages out, 'touched' puts "
            "them in, and for restricted 'to private' does so, too.",
        ),
        solution=(
            "In the v7 series a hook at the attribute gives an SNP guest's pages memory, because it makes their RMP "
            "entries there and then. Lazily pinned SEV guests have no entries, and guest_memfd makes them at first use."
        ),
        cases=_pinned_cases,
    )
)

# 3: what comes back

_FLIPS = (
    ("snp", "guest_memfd", True), ("snp", "guest_memfd", False), ("snp", "restricted", True),
    ("snp", "restricted", False), ("snp", "registered", False), ("sev", "lazy", True), ("sev", "lazy", False),
)  # fmt: skip


@cache
def _flip(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    """Whether there is something to accept, and whether the guest reads its secret afterwards."""
    found = flip(kind, backend, discard=punched)
    return found.pvalidate is not None and not found.pvalidate[1], found.found is Found.SECRET


def _flip_cases() -> list[Case]:
    rules = {
        "registered": "in place there is one page: what the VMM wrote has destroyed what was there",
        "lazy": "without an RMP nobody accepts anything, and only a hole frees the old page",
        "restricted": "the entry is made anew with each conversion, not validated; only a hole frees the page",
        "guest_memfd": "without a hole neither the page nor its entry has changed: PVALIDATE finds nothing to do",
    }

    def case(kind: str, backend: str, punched: bool) -> Case:
        name = f"{kind}, {backend}, {'punched' if punched else 'kept'}"
        return Case(
            name, lambda answer: answer(kind, backend, punched), _flip(kind, backend, punched), rules[backend], LINUX
        )

    return [case(*each) for each in _FLIPS]


FLIP_STUB = '''\
def comes_back(kind, backend, punched):
    """Whether PVALIDATE changes anything, and whether the guest reads its secret."""
    ...  # return True, False
'''


def comes_back(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    """Whether PVALIDATE changes anything, and whether the guest reads its secret."""
    kept = backend != "registered" and not punched
    accepts = kind == "snp" and not (backend == "guest_memfd" and kept)
    return accepts, kept


def _always_new(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    return kind == "snp", False


def _always_accepts(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    return kind == "snp", comes_back(kind, backend, punched)[1]


def _kept_is_accepted(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    return kind == "snp" and (punched or backend == "registered"), comes_back(kind, backend, punched)[1]


def _in_place_kept(kind: str, backend: str, punched: bool) -> tuple[bool, bool]:
    return comes_back(kind, backend, punched)[0], not punched


FLIP = register(
    Exercise(
        id="private_memory.3",
        title="What comes back",
        minutes=12,
        difficulty=2,
        prerequisites=("private_memory.1",),
        task=(
            "A guest writes a secret into a private page. The page becomes shared, without the guest's taking back its "
            "acceptance; the VMM writes there, and the page becomes private again. `punched` says whether the VMM "
            "frees what a conversion leaves. Return two truths: does the guest's PVALIDATE change anything then (never "
            "for a guest that has none), and does the guest read its secret?"
        ),
        stub=FLIP_STUB,
        reference=comes_back,
        wrong=(
            Wrong(_always_new, "without a hole neither the page nor its entry has changed"),
            Wrong(_always_accepts, "found (True, True)"),
            Wrong(_kept_is_accepted, "made anew with each conversion"),
            Wrong(_in_place_kept, "in place there is one page"),
        ),
        hints=(
            "Two questions in one: is the page the same one, and is its RMP entry the same?",
            "The page is the same one unless a hole was punched, or the VMM has written into it. The v7 hook changes "
            "RMP entries with the attribute, guest_memfd with first use and with the hole.",
            "Secret: not punched, and not registered. PVALIDATE: an SNP guest, and not guest_memfd without a hole.",
        ),
        solution=(
            "A guest that validates each page once takes 'no change' as a sign that the host plays a trick, and ends. "
            "Linux takes its acceptance back before it shares a page: then PVALIDATE changes something, and the old "
            "content is back without a word. Only a hole makes it a new page in both cases."
        ),
        cases=_flip_cases,
    )
)
