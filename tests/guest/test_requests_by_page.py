"""Events for SNP guests from the guest's side: which fields of the GHCB each marks, where, and nothing besides.

Numbers are typed again from the documents.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.guest import processors
from snpbook.guest.acceptance import ask
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.guest.termination import Terminated
from snpbook.spec.ghcb import PageOperation
from snpbook.spec.messages import MessageType
from snpbook.spec.termination import GeneralReason
from tests.guest.bare import PLACE, Answer, Bare

BUFFER = PLACE.ghcb + 0x800
KEY = bytes(range(32))


def header(cur: int, end: int, reserved: int = 0) -> bytes:
    return struct.pack("<HHI", cur, end, reserved)


def changed(guest: Bare, parts: list[range], operation: PageOperation, *answers: Answer) -> Any:
    return guest.run(lambda cpu: ask(Ghcb(cpu, PLACE.ghcb), parts, operation), *answers)


@pytest.mark.parametrize(
    ("operation", "parts", "entries"),
    [
        (PageOperation.PRIVATE, [range(0x12, 0x14)], [1 << 52 | 0x12 << 12, 1 << 52 | 0x13 << 12]),
        (PageOperation.SHARED, [range(0x12, 0x13)], [2 << 52 | 0x12 << 12]),
        (PageOperation.PRIVATE, [range(0x1FF, 0x200), range(0x200, 0x600, 512)],
         [1 << 52 | 0x1FF << 12, 1 << 56 | 1 << 52 | 0x200 << 12, 1 << 56 | 1 << 52 | 0x400 << 12]),
    ],
)  # fmt: skip
def test_a_list(operation: PageOperation, parts: list[range], entries: list[int]) -> None:
    """Header and entries of 8 bytes; the index of the last entry is inclusive; the scratch area is the buffer."""
    guest = Bare()
    changed(guest, parts, operation, Answer(buffer=header(len(entries), len(entries) - 1)))
    (request,) = guest.requests
    assert request.fields == {"code": 0x80000010, "info1": 0, "info2": 0, "scratch": BUFFER}
    assert request.buffer[:8] == header(0, len(entries) - 1)
    assert struct.unpack_from(f"<{len(entries)}Q", request.buffer, 8) == tuple(entries)
    assert not any(request.buffer[8 + 8 * len(entries) :])


def test_a_list_that_stops_early_goes_on_where_it_was() -> None:
    guest = Bare()
    changed(guest, [range(0x10, 0x13)], PageOperation.SHARED, Answer(buffer=header(1, 2)), Answer(buffer=header(3, 2)))
    assert [request.buffer[:8] for request in guest.requests] == [header(0, 2), header(1, 2)]


LISTS = {
    "header invalid": Answer({"info2": 1 << 32 | 1}, buffer=header(0, 1)),
    "entry invalid": Answer({"info2": 1 << 32 | 2}, buffer=header(1, 1)),
    "generic failure": Answer({"info2": 0x100 << 32}, buffer=header(2, 1)),
    "error in the lower half alone": Answer({"info2": 1}, buffer=header(2, 1)),
    "cur_entry back": Answer(buffer=header(0, 1)),
    "cur_entry beyond": Answer(buffer=header(3, 1)),
    "end_entry grown": Answer(buffer=header(2, 2)),
    "end_entry shrunk": Answer(buffer=header(2, 0)),
    "reserved": Answer(buffer=header(2, 1, 1)),
    "reserved, the last bit": Answer(buffer=header(2, 1, 1 << 31)),
    "malformed": Answer({"info1": 2, "info2": 3}, buffer=header(2, 1)),
    "no result": Answer(marked=("info1",), buffer=header(2, 1)),
    "#GP": Answer({"info1": 1, "info2": 0x8000030D}, buffer=header(2, 1)),
}


@pytest.mark.parametrize("name", list(LISTS))
def test_a_wrong_answer_to_a_list(name: str) -> None:
    guest = Bare()
    with pytest.raises(Terminated):
        changed(guest, [range(0x10, 0x12)], PageOperation.PRIVATE, LISTS[name])
    assert guest.ended_with == (1, 1)
    assert len(guest.requests) == 1


def send(certificate_pages: int = -1) -> Callable[[Any], Any]:
    async def body(cpu: Any) -> bytes:
        channel = Channel(Ghcb(cpu, PLACE.ghcb), PLACE)
        return await channel.exchange(MessageType.REPORT_REQ, bytes(96), certificate_pages=certificate_pages)

    return body


def with_key() -> Bare:
    guest = Bare()
    guest.put(PLACE.secrets, (bytes(0x20) + KEY).ljust(4096, b"\0"))
    return guest


def test_a_guest_request() -> None:
    guest = with_key()
    with pytest.raises(RequestFailed, match="EIO"):
        guest.run(send(), Answer({"info2": 0x16}))
    (request,) = guest.requests
    assert request.fields == {"code": 0x80000011, "info1": PLACE.request, "info2": PLACE.response}


def test_an_extended_request_and_the_number_used_up() -> None:
    """INVALID_LEN: the same message again without certificates; RBX is how many pages it takes."""
    guest = with_key()
    with pytest.raises(RequestFailed, match="EIO") as caught:
        guest.run(send(1), Answer({"info2": 1 << 32, "rbx": 3}), Answer())
    assert (caught.value.exitinfo2, caught.value.pages) == (1 << 32, 3)
    extended, plain = guest.requests
    assert extended.fields == {
        "code": 0x80000012, "info1": PLACE.request, "info2": PLACE.response, "rax": PLACE.certificates, "rbx": 1,
    }  # fmt: skip
    assert plain.fields == {"code": 0x80000011, "info1": PLACE.request, "info2": PLACE.response}


@pytest.mark.parametrize("vector", [13, 6])
def test_a_message_raises_nothing(vector: int) -> None:
    """#GP in the place of an answer: no program of the guest sees it, and no number is used again."""
    guest = with_key()
    with pytest.raises(Terminated):
        guest.run(send(), Answer({"info1": 1, "info2": 1 << 31 | 3 << 8 | vector}))
    assert guest.ended_with == (0, 0)
    assert guest.get(PLACE.secrets + 0xA0, 4) == b"\2\0\0\0"


def test_creation_and_destruction_of_a_processor() -> None:
    """SW_EXITINFO1: APIC id in the upper half, VMPL in bits 19:16, the request below; RAX only to create."""
    guest, page = Bare(), 0x1B000

    async def body(cpu: Any) -> None:
        ghcb = Ghcb(cpu, PLACE.ghcb)
        await processors.start(ghcb, 5, page, vector=0x9F, features=1)
        await processors.stop(ghcb, 5, page)

    guest.run(body)
    create, destroy = guest.requests
    assert create.fields == {"code": 0x80000013, "info1": 5 << 32 | 1, "info2": page, "rax": 1}
    assert {name: destroy.fields[name] for name in ("code", "info1", "info2")} == {
        "code": 0x80000013, "info1": 5 << 32 | 2, "info2": 0,
    }  # fmt: skip
    assert "rax" not in destroy.fields


def test_a_save_area_at_init() -> None:
    """The registers of section 3.5: real mode at the vector, and what INIT leaves."""
    guest, page = Bare(), 0x1B000
    guest.run(lambda cpu: processors.start(Ghcb(cpu, PLACE.ghcb), 5, page, vector=0x9F, features=1))
    area = guest.get(page, 4096)

    def word(offset: int, size: int = 8) -> int:
        return int.from_bytes(area[offset : offset + size], "little")

    assert (word(0x10, 2), word(0x18)) == (0x9F00, 0x9F000), "CS"
    assert (word(0xCA, 1), word(0xD0), word(0x148), word(0x158)) == (0, 0x1000, 0x40, 0x60000010), (
        "VMPL, EFER, CR4, CR0"
    )
    assert (word(0x160), word(0x168), word(0x170), word(0x178)) == (0x400, 0xFFFF0FF0, 2, 0), "DR7, DR6, RFLAGS, RIP"
    assert (word(0x268), word(0x3B0), word(0x3E8)) == (0x0007040600070406, 1, 1), "PAT, SEV_FEATURES, XCR0"
    assert (word(0x408, 4), word(0x40C, 2), word(0x410, 2)) == (0x1F80, 0x5555, 0x40), "MXCSR, FTW, FCW"


def test_termination_by_the_page() -> None:
    guest = Bare()
    with pytest.raises(Terminated):
        guest.run(lambda cpu: Ghcb(cpu, PLACE.ghcb).terminate(GeneralReason.SNP_FEATURES, 1 << 13, "a bit"))
    assert guest.requests[0].fields == {"code": 0x8000FFFE, "info1": 2 << 4, "info2": 1 << 13}
