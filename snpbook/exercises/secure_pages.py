"""Exercises on what the firmware does with pages: where SNP_PAGE_RECLAIM leads, and the launch digest of a few pages.

Both are compared with the firmware's own doing: the state that a page then has, the digest in a guest's context.
"""

from collections.abc import Callable, Sequence
from hashlib import sha384
from typing import Any

from snpbook.exercises.registry import Case, Exercise, Wrong, register
from snpbook.exercises.secure_processor import bench
from snpbook.firmware.bench import CONTEXT, SPARE, Bench
from snpbook.firmware.growth import ASID, Page, begin, grow
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.launch import PAGE_INFO
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage

# 4: what a reclaim leads to


def _reclaim_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Bench], object], rule: str, spa: int = SPARE) -> Case:
        here = bench().initialise()
        prepare(here)
        entry = here.host.rmp_entry(spa >> PAGE_SHIFT)
        made = here.command(Command.SNP_PAGE_RECLAIM, page=spa >> PAGE_SHIFT)
        end = here.state(spa).name if made.ok else made.status.name
        return Case(name, lambda answer: answer(entry), end, rule, "SNP SNP_PAGE_RECLAIM")

    def launched(here: Bench) -> None:
        begin(here)
        grow(here, [Page(LaunchPage.NORMAL, 0)])

    def swapping(here: Bench) -> None:
        launched(here)
        here.assign(SPARE, NewState(assigned=True, asid=ASID, immutable=True))

    return [
        case(
            "a page that the host gave to the firmware", lambda here: here.assign(SPARE, FIRMWARE),
            "without Immutable, and still assigned with ASID 0: that is Reclaim, which the host may then take",
        ),
        case(
            "a page that was to be launched and was not",
            lambda here: here.assign(SPARE, NewState(assigned=True, asid=ASID, immutable=True)),
            "RECLAIM takes Immutable away and nothing else: the page stays the guest's, not validated",
        ),
        case("a page on its way out to swap", swapping, "the guest's page stays validated: nothing was changed"),
        case(
            "the context of a guest", begin, "a context is ended by SNP_DECOMMISSION: RECLAIM refuses it", CONTEXT,
        ),
        case("a page of a guest", launched, "what is not immutable needs no reclaiming: a success without effect"),
        case(
            "a page of the hypervisor", lambda here: here.assign(SPARE, HYPERVISOR),
            "what is not immutable needs no reclaiming: a success without effect",
        ),
    ]  # fmt: skip


RECLAIM_STUB = '''\
def reclaimed(entry):
    """The state of the page after SNP_PAGE_RECLAIM, or the status where it is refused."""
    ...  # return "RECLAIM", "GUEST_VALID", ..., "INVALID_PAGE_STATE"
'''


def reclaimed(entry: Record) -> str:
    """The state of the page after SNP_PAGE_RECLAIM, or the status where it is refused."""
    if not entry.assigned:
        return "HYPERVISOR"
    if entry.asid:
        return "GUEST_VALID" if entry.validated else "GUEST_INVALID"
    return "INVALID_PAGE_STATE" if entry.immutable and entry.vmsa else "RECLAIM"


def _to_reclaim(entry: Record) -> str:
    return "RECLAIM" if entry.immutable else reclaimed(entry)


def _to_invalid(entry: Record) -> str:
    return "GUEST_INVALID" if entry.immutable and entry.asid else reclaimed(entry)


def _any_context(entry: Record) -> str:
    return "RECLAIM" if entry.vmsa else reclaimed(entry)


RECLAIMED = register(
    Exercise(
        id="secure_processor.4",
        title="Where does a reclaim lead?",
        minutes=10,
        difficulty=2,
        prerequisites=(),
        task=(
            "SNP_PAGE_RECLAIM gives a page back that the host has handed over. Given the page's RMP entry (assigned, "
            "asid, immutable, validated, vmsa), return the name of the state that it has afterwards, or the status "
            "where the command is refused. Only a context has vmsa with ASID 0. No page here is metadata."
        ),
        stub=RECLAIM_STUB,
        reference=reclaimed,
        wrong=(
            Wrong(_to_reclaim, "the page stays the guest's, not validated"),
            Wrong(_to_invalid, "stays validated"),
            Wrong(_any_context, "SNP_DECOMMISSION"),
        ),
        hints=(
            "The command clears two bits, Immutable and the firmware's Lock. What does the entry say without them?",
            "Assigned with an ASID is a guest's page, validated or not. Assigned with ASID 0 is Reclaim.",
            "HYPERVISOR where not assigned; by validated with an ASID; INVALID_PAGE_STATE for a context; RECLAIM.",
        ),
        solution=(
            "A state is a name for bits, so what a command leads to follows from the bits that it clears. Firmware "
            "pages become Reclaim, Pre-Guest becomes Guest-Invalid, Pre-Swap becomes Guest-Valid again."
        ),
        cases=_reclaim_cases,
    )
)

# 5: the launch digest


def _digest_cases() -> list[Case]:
    def case(name: str, pages: Sequence[Page], rule: str) -> Case:
        here = bench().initialise()
        begin(here)
        end = grow(here, pages)[-1].digest.hex()
        given = [(page.kind, page.gpa, page.data) for page in pages]
        return Case(name, lambda answer: answer(given), end, rule, "SNP PAGE_INFO")

    code = bytes(range(256)) * (PAGE_SIZE // 256)
    normal, other = Page(LaunchPage.NORMAL, 0, code), Page(LaunchPage.NORMAL, PAGE_SIZE)
    return [
        case("one page", [normal], "the digest before the first page is 48 bytes of zero"),
        case("two pages", [normal, other], "each PAGE_INFO begins with the digest before it: a chain"),
        case(
            "a page that is not measured", [normal, Page(LaunchPage.UNMEASURED, PAGE_SIZE, code)],
            "its bytes do not count, its type and address do: CONTENTS is 48 bytes of zero",
        ),
    ]  # fmt: skip


DIGEST_STUB = '''\
def digest(pages):
    """The launch digest, as text, of pages (kind, gpa, data) of 4 KB."""
    ...
'''


def digest(pages: Sequence[tuple[LaunchPage, int, bytes]]) -> str:
    """The launch digest, as text, of pages (kind, gpa, data) of 4 KB."""
    value = bytes(48)
    for kind, gpa, data in pages:
        contents = sha384(data).digest() if kind is LaunchPage.NORMAL else bytes(48)
        info = PAGE_INFO.pack(digest_cur=value, contents=contents, length=PAGE_INFO.size, page_type=kind, gpa=gpa)
        value = sha384(info).digest()
    return value.hex()


def _one_hash(pages: Sequence[tuple[LaunchPage, int, bytes]]) -> str:
    return sha384(b"".join(data for _, _, data in pages)).hexdigest()


def _no_chain(pages: Sequence[tuple[LaunchPage, int, bytes]]) -> str:
    return digest(pages[-1:])


def _all_measured(pages: Sequence[tuple[LaunchPage, int, bytes]]) -> str:
    value = bytes(48)
    for kind, gpa, data in pages:
        fields: dict[str, Any] = {"contents": sha384(data).digest(), "page_type": kind, "gpa": gpa}
        value = sha384(PAGE_INFO.pack(digest_cur=value, length=PAGE_INFO.size, **fields)).digest()
    return value.hex()


DIGEST = register(
    Exercise(
        id="secure_processor.5",
        title="The launch digest by hand",
        minutes=12,
        difficulty=2,
        prerequisites=(),
        task=(
            "Pages are launched in the order given, each (kind, gpa, data) with kind LaunchPage.NORMAL or "
            "LaunchPage.UNMEASURED, 4 KB, with no rights for VMPL1 to VMPL3. Return the launch digest as text in "
            "hexadecimal. PAGE_INFO.pack(digest_cur=..., contents=..., length=..., page_type=..., gpa=...) gives the "
            "bytes of one structure."
        ),
        stub=DIGEST_STUB,
        reference=digest,
        wrong=(
            Wrong(_one_hash, "48 bytes of zero"),
            Wrong(_no_chain, "a chain"),
            Wrong(_all_measured, "its bytes do not count"),
        ),
        hints=(
            "The digest is one value that each page replaces: SHA-384 of its PAGE_INFO, in which the old value stands.",
            "contents is SHA-384 of the 4096 bytes for NORMAL, and 48 bytes of zero for UNMEASURED. length is 0x70.",
            "Start with bytes(48); for each page value = sha384(PAGE_INFO.pack(...)).digest(); at the end value.hex().",
        ),
        solution=(
            "Because each structure holds the digest before it, the last digest depends on every page, its type, its "
            "address and their order. The owner computes the same from the image alone and compares."
        ),
        cases=_digest_cases,
    )
)
