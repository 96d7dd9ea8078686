"""Exercises on what private memory costs and spares: who notices a stray write, and what takes large pages apart.

What is expected is read off guests that run on each back end; every case runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from snpbook.exercises.memory_regimes import V7
from snpbook.exercises.registry import Case, Exercise, Wrong, register
from snpbook.regimes.host_writes import Damage, by_kernel, by_vmm
from snpbook.regimes.regime import FIRST, Regime

# 4: who notices

_WRITES = (
    ("VMM", "sev", "registered"), ("VMM", "sev", "lazy"), ("VMM", "snp", "registered"), ("VMM", "snp", "restricted"),
    ("VMM", "snp", "guest_memfd"), ("kernel", "sev", "lazy"), ("kernel", "snp", "restricted"),
    ("kernel", "snp", "guest_memfd"),
)  # fmt: skip
_WORDS = {Damage.SILENT: "corrupt", Damage.STOPPED: "stopped", Damage.ELSEWHERE: "elsewhere"}


@cache
def _damage(writer: str, kind: str, backend: str) -> str:
    write = by_vmm(kind, backend) if writer == "VMM" else by_kernel(kind, backend)[0]
    return _WORDS[write.damage]


def _damage_cases() -> list[Case]:
    rules = {
        ("VMM", True): "the VMM's address leads to the guest's page itself; only an RMP can stop a write to it",
        ("VMM", False): "the VMM's address leads to the shared side, which is another page",
        ("kernel", True): "the kernel reaches every frame: what stops it is the RMP, and nothing else",
    }

    def case(writer: str, kind: str, backend: str) -> Case:
        rule = rules[writer, backend == "registered" or writer == "kernel"]
        return Case(
            f"the {writer}, {kind}, {backend}", lambda answer: answer(writer, kind, backend),
            _damage(writer, kind, backend), rule, f"{V7}, patches 18 to 23",
        )  # fmt: skip

    return [case(*each) for each in _WRITES]


DAMAGE_STUB = '''\
def damage(writer, kind, backend):
    """What comes of a stray write to a page that the guest has private."""
    ...  # return "corrupt", "stopped" or "elsewhere"
'''


def damage(writer: str, kind: str, backend: str) -> str:
    """What comes of a stray write to a page that the guest has private."""
    if writer == "VMM" and backend != "registered":
        return "elsewhere"
    return "stopped" if kind == "snp" else "corrupt"


def _encryption_stops(writer: str, kind: str, backend: str) -> str:
    return "elsewhere" if writer == "VMM" and backend != "registered" else "stopped"


def _unmapped_for_all(writer: str, kind: str, backend: str) -> str:
    return damage("VMM", kind, backend)


def _snp_stops_all(writer: str, kind: str, backend: str) -> str:
    return damage("kernel", kind, backend)


DAMAGE = register(
    Exercise(
        id="private_memory.4",
        title="Who notices?",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "Somebody writes where a guest has a private page: `writer` is 'VMM' (by its own address of that guest "
            "page) or 'kernel' (to the frame). Return 'corrupt' where the write succeeds and the guest's page is "
            "destroyed, 'stopped' where the writer is stopped, 'elsewhere' where it goes to another page."
        ),
        stub=DAMAGE_STUB,
        reference=damage,
        wrong=(
            Wrong(_encryption_stops, "only an RMP can stop a write"),
            Wrong(_unmapped_for_all, "the kernel reaches every frame"),
            Wrong(_snp_stops_all, "leads to the shared side"),
        ),
        hints=(
            "First ask where the address leads: to the guest's page, or to another one?",
            "With a private file the VMM has no address of the private page at all. The kernel has one of every frame.",
            "VMM without registration: elsewhere. What is left: stopped for SNP, corrupt for SEV and SEV-ES.",
        ),
        solution=(
            "Encryption keeps nobody from writing. The RMP does, but a VMM that is stopped by a fault dies with its "
            "guest. A page that the VMM cannot even name is the better answer, for guests with and without an RMP."
        ),
        cases=_damage_cases,
    )
)

# 5: large pages

Conversion = tuple[int, int, bool]
_SPLITS: dict[str, tuple[Conversion, ...]] = {
    "two whole large pages": ((0, 1024, True),),
    "one page of a large one is shared": ((0, 512, True), (7, 8, False)),
    "two pages of the same": ((0, 512, True), (7, 8, False), (100, 101, False)),
    "half of one": ((0, 256, True), (7, 8, False)),
    "a range over two": ((0, 1024, True), (500, 600, False)),
    "a whole large page is shared": ((0, 512, True), (0, 512, False)),
    "crooked": ((256, 1280, True), (512, 513, False), (300, 301, False)),
}


@cache
def _psmashes(conversions: tuple[Conversion, ...]) -> int:
    regime = Regime("snp", "restricted", huge=True, discard=False)
    regime.guest.launch()
    before = regime.ledger.work.psmashes
    for start, stop, private in conversions:
        regime.convert(range(FIRST + start, FIRST + stop), private=private)
    return regime.ledger.work.psmashes - before


def _split_cases() -> list[Case]:
    rules = {
        "half of one": "an entry of 2 MB is made only for a whole large page",
        "two pages of the same": "an entry that has been split is 512 entries of 4 KB, which nothing splits again",
        "a whole large page is shared": "to shared it goes page by page, so the first page splits the entry",
    }
    rule = "PSMASH is executed once for each 2 MB entry in which pages become shared"

    def case(name: str) -> Case:
        conversions = _SPLITS[name]
        return Case(
            name, lambda answer: answer(list(conversions)), _psmashes(conversions), rules.get(name, rule),
            f"{V7}, patch 55",
        )  # fmt: skip

    return [case(name) for name in _SPLITS]


SPLITS_STUB = '''\
def psmashes(conversions):
    """How often KVM of the v7 series executes PSMASH."""
    ...  # for start, stop, private in conversions:
'''


def psmashes(conversions: Sequence[Conversion]) -> int:
    """How often KVM of the v7 series executes PSMASH."""
    large: set[int] = set()
    count = 0
    for start, stop, private in conversions:
        for number in range(start // 512, (stop - 1) // 512 + 1):
            if private and start <= number * 512 and (number + 1) * 512 <= stop:
                large.add(number)
            elif not private and number in large:
                large.remove(number)
                count += 1
    return count


def _each_large_page(conversions: Sequence[Conversion]) -> int:
    return sum((stop - 1) // 512 - start // 512 + 1 for start, stop, private in conversions if not private)


def _whole_stays_whole(conversions: Sequence[Conversion]) -> int:
    return psmashes([each for each in conversions if each[2] or (each[1] - each[0]) % 512])


def _parts_are_large(conversions: Sequence[Conversion]) -> int:
    whole = [(start // 512 * 512, -(-stop // 512) * 512, True) for start, stop, private in conversions if private]
    return psmashes([*whole, *(each for each in conversions if not each[2])])


SPLITS = register(
    Exercise(
        id="private_memory.5",
        title="Shattered",
        minutes=12,
        difficulty=3,
        prerequisites=("private_memory.2",),
        task=(
            "An SNP guest of the v7 series has huge pages behind all of its memory, and page 0 begins one. "
            "`conversions` is a list of (start, stop, private) for its pages start to stop - 1; the VMM keeps both "
            "sides, and the guest touches nothing. Return how often KVM executes PSMASH."
        ),
        stub=SPLITS_STUB,
        reference=psmashes,
        wrong=(
            Wrong(_parts_are_large, "made only for a whole large page"),
            Wrong(_each_large_page, "which nothing splits again"),
            Wrong(_whole_stays_whole, "so the first page splits the entry"),
        ),
        hints=(
            "Keep a set of the entries of 2 MB. What puts one in, and what takes one out?",
            "A conversion to private that covers pages 512 n to 512 n + 511 makes one entry of them. A conversion to "
            "shared goes page by page.",
            "For each 512 pages that a conversion meets: private and covered whole, put the number in; shared and in "
            "the set, take it out and count one.",
        ),
        solution=(
            "One page of the guest's that becomes shared costs its 511 neighbours their large entry, for good: nothing "
            "puts 4 KB entries together again but another conversion of all of them."
        ),
        cases=_split_cases,
    )
)
