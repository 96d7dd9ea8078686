"""Exercises of the chapter on the guest: the reader writes a check that the guest lacks, and a hostile host tries it.

Each answer runs as a part of a guest's kernel, on a guest that has booted. What is judged is what becomes of the guest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from random import Random

from snpbook.exercises.checking import same
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.exercises.tried_guest import Hand, TriedGuest, honest, tried_guest
from snpbook.guest import processors
from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.cpuid import EXTENDED_TOPOLOGY_LEAF, INITIAL_APIC_ID, SIGNATURE_LEAF, Registers
from snpbook.spec.ghcb import PSC_ENTRY, PSC_HEADER, SHARED_BUFFER_SIZE, Nae, PageOperation
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.termination import Reason
from snpbook.spec.vmcb import Vector
from snpbook.system import sample_image
from snpbook.views.ghcb_page import list_header

SOURCE, GHCB = "LINUX arch/x86/coco/sev/core.c", "GHCB specification"
STOPS = "stops"
VCPUS = 4
_FREE = range(3 * PAGES_PER_LARGE // 2, 2 * PAGES_PER_LARGE)
"""Guest pages of a program's own, which the boot has accepted."""
_LOW = (1 << 32) - 1

# 1: an APIC id


@cache
def _with_processors() -> TriedGuest:
    """A guest all of whose processors have save areas."""
    place = Layout.of(sample_image())

    async def start(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        for number in range(1, VCPUS):
            page = (_FREE.start + number) << PAGE_SHIFT
            await processors.start(
                kernel.channel, number, page, vector=_FREE.start >> 4, features=int(SevFeatures.SNP_ACTIVE)
            )

    return TriedGuest(vcpus=VCPUS, prepare=start)


def _judged(verdict: object, going_on: str) -> str | None:
    """What becomes of a guest by the verdict of an answer; None where that says nothing."""
    if verdict is None or verdict is Ellipsis:
        return None
    if same(verdict, True):
        return going_on
    return STOPS if same(verdict, False) else f"{verdict!r}, which is neither True nor False"


def _told_ids(leaf_1: int, leaf_b: int, junk: int = 0) -> Hand:
    """A host that tells these ids in the two leaves, and `junk` in what does not count."""

    def hand(number: int, answer: Record) -> Record:
        if number:
            return answer.replace(rdx=leaf_b, rax=answer.rax ^ junk, rbx=answer.rbx ^ junk)
        low = (1 << INITIAL_APIC_ID) - 1
        return answer.replace(rbx=(answer.rbx ^ junk) & low | leaf_1 << INITIAL_APIC_ID, rax=answer.rax ^ junk)

    return hand


def _id_outcome(answer: Answer, vcpu: int, hand: Hand) -> object:
    """What becomes of processor `vcpu` as it starts after those before it. None where the answer says nothing."""
    taken, said = set(range(vcpu)), []

    async def act(kernel: Kernel) -> int:
        told = {leaf: await kernel.cpu.cpuid(leaf) for leaf in (SIGNATURE_LEAF, EXTENDED_TOPOLOGY_LEAF)}
        said.append(answer(dict(told), VCPUS, set(taken)))
        return int(told[EXTENDED_TOPOLOGY_LEAF].edx)

    number = _with_processors().run(act, hand, vcpu).outcome
    if number in taken:
        going_on = f"overwrites what processor {number} has"
    else:
        going_on = f"{'runs as' if number < VCPUS else 'writes beyond the areas, as'} processor {number}"
    (verdict,) = said
    return _judged(verdict, going_on)


def _id_cases() -> list[Case]:
    def case(name: str, vcpu: int, hand: Hand, expected: str, rule: str) -> Case:
        return Case(name, lambda answer: _id_outcome(answer, vcpu, hand), expected, rule, SOURCE)

    twice = "an id that another processor has is no id of this one: it would overwrite that one's area"
    outside = "ids are 0 to vcpus - 1: a larger one leads beyond the areas"
    differ = "EBX[31:24] of leaf 1 is the low byte of the id in EDX of leaf 0xB: a host that says otherwise lies"
    cases = [
        case("processor 2, an honest host", 2, honest, "runs as processor 2", "an honest answer is good enough"),
        case("processor 0, an honest host", 0, honest, "runs as processor 0", "nobody runs yet, and 0 is an id"),
        case("processor 3, an honest host", 3, honest, "runs as processor 3", "the last id is vcpus - 1"),
        case("both leaves say 4", 2, _told_ids(4, 4), STOPS, outside),
        case("all bits of the id are set", 2, _told_ids(0xFF, _LOW), STOPS, outside),
        case("id 0x102: its low byte is right", 2, _told_ids(2, 0x102), STOPS, outside),
        case("both leaves say 1, which runs already", 2, _told_ids(1, 1), STOPS, twice),
        case("leaf 1 says 3, leaf 0xB says 2", 2, _told_ids(3, 2), STOPS, differ),
        case(
            "both leaves say 3", 2, _told_ids(3, 3), "runs as processor 3",
            "a lie that fits: nobody is 3 yet, no guest can see it, and no harm is done",
        ),
        case(
            "other bits are changed, too", 2, _told_ids(2, 2, junk=_LOW >> 9), "runs as processor 2",
            "of the host's answer the guest takes the id alone, the rest is from the CPUID page: judge nothing else",
        ),
    ]  # fmt: skip
    rng = Random("an id")
    for number in range(2):
        one, other, vcpu = rng.randrange(6), rng.randrange(6), rng.randrange(1, VCPUS)
        good = one == other < VCPUS and other not in range(vcpu)
        expected = f"runs as processor {other}" if good else STOPS
        name = f"fuzzed host {number + 1}: processor {vcpu} is told {one} and {other}"
        cases.append(case(name, vcpu, _told_ids(one, other), expected, differ if one != other else twice))
    return cases


ID_STUB = '''\
def believable(told, vcpus, taken):
    """Whether a processor that starts may go on with the APIC id that its host has told it."""
    ...  # told[1].ebx, told[0xB].edx
'''


def believable(told: Mapping[int, Registers], vcpus: int, taken: set[int]) -> bool:
    """Whether a processor that starts may go on with the APIC id that its host has told it."""
    number = told[0xB].edx
    return number < vcpus and number not in taken and number & 0xFF == told[1].ebx >> 24


def _range_alone(told: Mapping[int, Registers], vcpus: int, taken: set[int]) -> bool:
    return told[0xB].edx < vcpus


def _low_byte(told: Mapping[int, Registers], vcpus: int, taken: set[int]) -> bool:
    number = told[0xB].edx & 0xFF
    return number < vcpus and number not in taken and number == told[1].ebx >> 24


def _one_leaf(told: Mapping[int, Registers], vcpus: int, taken: set[int]) -> bool:
    return told[0xB].edx < vcpus and told[0xB].edx not in taken


APIC_ID = register(
    Exercise(
        id="inside_the_guest.1",
        title="An id out of range",
        minutes=12,
        difficulty=1,
        prerequisites=(),
        task=(
            "A guest gives each of its processors an area of memory, and finds it by the processor's APIC id. That id "
            "is the host's to tell, even to an SNP guest. `told` has the registers of CPUID leaves 1 and 0xB: "
            "`told[1].ebx` has the low byte of the id in its bits 31 to 24, `told[0xB].edx` is the whole id, which the "
            "guest will use. `vcpus` is how many processors there are, `taken` the set of ids that run already. Return "
            "whether this processor may go on."
        ),
        stub=ID_STUB,
        reference=believable,
        wrong=(
            Wrong(_range_alone, "it would overwrite that one's area"),
            Wrong(_low_byte, "leads beyond the areas"),
            Wrong(_one_leaf, "a host that says otherwise lies"),
        ),
        hints=(
            "Play *CPUID 0xB* in the theatre, and have the hand write 0x102 into RDX.",
            "Three things can be wrong with an id: too large, another's, or two leaves that do not agree.",
            "number = told[0xB].edx; it is below vcpus, not in taken, and its low byte equals told[1].ebx >> 24.",
        ),
        solution=(
            "An index from outside is checked against the length of what it indexes, whole, not its low byte. A lie "
            "that is in range and nobody else's cannot be seen, and does no harm: the guest would only call its "
            "processors by other names."
        ),
        cases=_id_cases,
    )
)

# 2: a list of page state changes

_LIST = _FREE[:8]
_OWN = _FREE[-1]
"""A page that is not in the list, and stays private."""
_SECRET = b"not in the list"


def _entries(pages: range, operation: PageOperation) -> bytes:
    return b"".join(PSC_ENTRY.pack(gfn=gfn, operation=operation) for gfn in pages)


def _answered(*answers: Mapping[str, int]) -> Hand:
    """A host that changes the header of its first answers, or SW_EXITINFO2 by `result`. `also` adds an entry."""

    def hand(number: int, answer: Record) -> Record:
        change = dict(answers[number]) if number < len(answers) else {}
        buffer = bytearray(answer.shared_buffer)
        if change.pop("also", 0):
            at = PSC_HEADER.size + len(_LIST) * PSC_ENTRY.size
            buffer[at : at + PSC_ENTRY.size] = _entries(range(_OWN, _OWN + 1), PageOperation.SHARED)
        reserved = change.pop("reserved", 0).to_bytes(PSC_HEADER.size // 2, "little")
        result = change.pop("result", int(answer.sw_exit_info_2))
        header = PSC_HEADER.unpack(bytes(buffer)).replace(**change)
        buffer[: PSC_HEADER.size] = bytes(header)[: PSC_HEADER.size // 2] + reserved
        return answer.replace(shared_buffer=bytes(buffer), sw_exit_info_2=result)

    return hand


def _list_outcome(answer: Answer, hand: Hand) -> object:
    """What becomes of a guest that shares eight pages, and asks by the answer whether to go on."""

    async def act(kernel: Kernel) -> str | None:
        cpu, channel = kernel.cpu, kernel.channel
        await cpu.write(_OWN << PAGE_SHIFT, _SECRET)
        await cpu.pvalidate(_LIST.start << PAGE_SHIFT, len(_LIST), validate=False)
        header = PSC_HEADER.pack(cur_entry=0, end_entry=len(_LIST) - 1)
        buffer, done = (header + _entries(_LIST, PageOperation.SHARED)).ljust(SHARED_BUFFER_SIZE, b"\0"), 0
        while done < len(_LIST):
            found = await channel.call(
                Nae.PAGE_STATE_CHANGE, reason=Reason.PSC, sw_scratch=channel.shared_buffer, shared_buffer=buffer
            )
            current, end, reserved = list_header(found)
            told = {"cur_entry": current, "end_entry": end, "reserved": reserved, "result": found.sw_exit_info_2}
            verdict = _judged(answer(len(_LIST), done, told), going_on="")
            if verdict != "":
                return verdict
            buffer, done = found.shared_buffer, current
        cpu.set_handler(Vector.VC, None)
        try:
            kept = await cpu.read(_OWN << PAGE_SHIFT, len(_SECRET)) == _SECRET
        except GuestException:
            kept = False
        return f"shares {len(_LIST)} pages" if kept else "has given away a page that was not in its list"

    run = tried_guest().run(act, hand)
    return f"hangs: {run.outcome}" if run.failed else run.outcome


def _list_cases() -> list[Case]:
    whole, count = f"shares {len(_LIST)} pages", len(_LIST)

    def case(name: str, expected: str, rule: str, *answers: Mapping[str, int]) -> Case:
        return Case(name, lambda answer: _list_outcome(answer, _answered(*answers)), expected, rule, GHCB)

    back = "cur_entry must have moved on from where the guest asked: what goes back is asked for again and again"
    grown = "end_entry is the guest's own: behind its last entry stands what the host has put there"
    cases = [
        case("an honest host", whole, "a list that is done is a good answer"),
        case("it stops after three", whole, "a host may stop early: the guest asks for the rest", {"cur_entry": 3}),
        case("after three, then after five", whole, "a host may stop early more than once", {"cur_entry": 3},
             {"cur_entry": 5}),
        case("cur_entry goes back from five to two", STOPS, back, {"cur_entry": 5}, {"cur_entry": 2}),
        case("end_entry grows, and an entry is added", STOPS, grown, {"cur_entry": 3, "end_entry": count, "also": 1}),
        case("end_entry shrinks", STOPS, "end_entry is the guest's own: with a smaller one pages are left out",
             {"cur_entry": 3, "end_entry": 4}),
        case("cur_entry is beyond the list", STOPS, "cur_entry is at most the number of entries",
             {"cur_entry": count + 1}),
        case("a reserved byte is set", STOPS, "the reserved bytes stay zero", {"cur_entry": 3, "reserved": 1 << 16}),
        case("an error, and the list half done", STOPS, "SW_EXITINFO2 is 0, or the host has refused",
             {"cur_entry": 3, "result": (1 << 32) + 2}),
    ]  # fmt: skip
    rng = Random("a list")
    for number in range(2):
        change = {"cur_entry": rng.randrange(1, count + 3), "reserved": rng.choice([0, 0, 1])}
        change["end_entry"] = count - 1 + rng.choice([0, 0, 1])
        good = change["cur_entry"] <= count and not change["reserved"] and change["end_entry"] == count - 1
        name = f"fuzzed host {number + 1}: {', '.join(f'{key} {value}' for key, value in change.items())}"
        cases.append(case(name, whole if good else STOPS, back if good else grown, change))
    return cases


LIST_STUB = '''\
def goes_on(count, before, answer):
    """Whether the guest may go on after a page state change."""
    ...  # answer["cur_entry"], answer["end_entry"], answer["reserved"], answer["result"]
'''


def goes_on(count: int, before: int, answer: Mapping[str, int]) -> bool:
    """Whether the guest may go on after a page state change."""
    moved = before < answer["cur_entry"] <= count
    return moved and answer["end_entry"] == count - 1 and answer["reserved"] == 0 and answer["result"] == 0


def _result_alone(count: int, before: int, answer: Mapping[str, int]) -> bool:
    return answer["result"] == 0


def _finished_only(count: int, before: int, answer: Mapping[str, int]) -> bool:
    return goes_on(count, before, answer) and answer["cur_entry"] == count


def _any_end(count: int, before: int, answer: Mapping[str, int]) -> bool:
    return before < answer["cur_entry"] and answer["reserved"] == 0 and answer["result"] == 0


PSC = register(
    Exercise(
        id="inside_the_guest.2",
        title="A list that goes back",
        minutes=15,
        difficulty=2,
        prerequisites=(),
        task=(
            "A guest asks for `count` pages to become shared. The host works through the list, and may stop early: "
            "then the guest asks again with what is in the buffer. `before` is where `cur_entry` stood when the guest "
            "asked, `answer` what it finds: cur_entry, end_entry (the index of the last entry), reserved, and result, "
            "which is SW_EXITINFO2. Return whether the guest may go on."
        ),
        stub=LIST_STUB,
        reference=goes_on,
        wrong=(
            Wrong(_result_alone, "what goes back is asked for again and again"),
            Wrong(_finished_only, "the guest asks for the rest"),
            Wrong(_any_end, "has given away a page"),
        ),
        hints=(
            "Play *five pages become shared*, and change cur_entry, end_entry and reserved in turn.",
            "The list lies in shared memory. What did the guest write there, and which of it may a host change?",
            "before < cur_entry <= count, end_entry == count - 1, reserved == 0, result == 0.",
        ),
        solution=(
            "The host writes cur_entry and each entry's cur_page, and nothing else. Linux accepts a cur_entry that "
            "has not moved: a host that does not serve its guest can let it wait in any case. This one does not."
        ),
        cases=_list_cases,
    )
)
