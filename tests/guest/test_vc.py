"""The #VC handler row by row: what it tells the hypervisor, what it makes of the answer, and which answers end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import GuestException, Hlt
from snpbook.hardware.guest_cpu import GuestCpu
from tests.guest.bare import DATA, DEVICE, NOWHERE, PLACE, Answer, Bare, Body
from tests.hardware.guests import PAGE

MSR = 0x123456
"""None that the guest has of its own, and outside of the permission map."""
MMIO = DEVICE * PAGE
BUFFER = PLACE.ghcb + 0x800
MSR_PERMISSIONS = 0xB00000


def port(number: int, size: int, *, is_in: bool = False, string: bool = False) -> int:
    """EXITINFO1 of a port access, from the sheet: port, 64-bit addresses, size, REP and string, segment, direction."""
    word = number << 16 | 1 << 9 | {1: 1, 2: 2, 4: 4}[size] << 4 | is_in
    return word | string << 3 | string << 2 | (0 if is_in or not string else 3) << 10


def words(**fields: int) -> dict[str, int]:
    return {"info1": 0, "info2": 0, **fields}


Row = tuple[int, Body, dict[str, int], Answer, Any]
ROWS: dict[str, Row] = {
    "RDMSR": (0x7C, lambda cpu: _(cpu.rdmsr(MSR)), words(code=0x7C, rcx=MSR), Answer({"rax": 0x11, "rdx": 0x22}),
              0x22_0000_0011),
    "WRMSR": (0x7C, lambda cpu: _(cpu.wrmsr(MSR, 0x5_0000_0006)), words(code=0x7C, info1=1, rcx=MSR, rax=6, rdx=5),
              Answer(), None),
    "IN 8": (0x7B, lambda cpu: _(cpu.port_in(0x71)), words(code=0x7B, info1=port(0x71, 1, is_in=True)),
             Answer({"rax": 0xABCDEF12}), 0x12),
    "IN 16": (0x7B, lambda cpu: _(cpu.port_in(0x71, 2)), words(code=0x7B, info1=port(0x71, 2, is_in=True)),
              Answer({"rax": 0xABCDEF12}), 0xEF12),
    "IN 32": (0x7B, lambda cpu: _(cpu.port_in(0x71, 4)), words(code=0x7B, info1=port(0x71, 4, is_in=True)),
              Answer({"rax": 0x99_ABCDEF12}), 0xABCDEF12),
    "OUT 16": (0x7B, lambda cpu: _(cpu.port_out(0x80, 0x1234, 2)), words(code=0x7B, info1=port(0x80, 2), rax=0x1234),
               Answer(), None),
    "RDTSC": (0x6E, lambda cpu: _(cpu.rdtsc()), words(code=0x6E), Answer({"rax": 1, "rdx": 2}), 0x2_0000_0001),
    "RDTSCP": (0x87, lambda cpu: _(cpu.rdtscp()), words(code=0x87), Answer({"rax": 1, "rdx": 2, "rcx": 3}),
               (0x2_0000_0001, 3)),
    "RDPMC": (0x6F, lambda cpu: _(cpu.rdpmc(7)), words(code=0x6F, rcx=7), Answer({"rax": 8}), 8),
    "WBINVD": (0x89, lambda cpu: _(cpu.wbinvd()), words(code=0x89), Answer(), None),
    "write DR7": (0x37, lambda cpu: _(cpu.load(dr7=0x403)), words(code=0x37, rax=0x403), Answer(), None),
    "MMIO read": (0, lambda cpu: _(cpu.read(MMIO + 0x30, 4)),
                  words(code=0x80000001, info1=MMIO + 0x30, info2=4, scratch=BUFFER), Answer(buffer=b"\1\2\3\4\5"),
                  b"\1\2\3\4"),
    "MMIO write": (0, lambda cpu: _(cpu.write(MMIO + 8, b"12345678")),
                   words(code=0x80000002, info1=MMIO + 8, info2=8, scratch=BUFFER), Answer(), None),
    "VMMCALL": (0x81, lambda cpu: call(cpu), words(code=0x81, rax=12, rbx=1, rcx=2, rdx=3, rsi=4, cpl=0),
                Answer({"rax": 9}), 9),
}  # fmt: skip


async def _(operation: Any) -> Any:
    return await operation


async def call(cpu: GuestCpu) -> int:
    await cpu.load(rax=12, rbx=1, rcx=2, rdx=3, rsi=4)
    await cpu.vmmcall()
    (found,) = await cpu.look("rax")
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("name", list(ROWS))
def test_each_event(name: str) -> None:
    code, body, expected, answer, result = ROWS[name]
    guest = Bare(*filter(None, [code]))
    assert guest.run(body, answer) == result
    (request,) = guest.requests
    assert request.fields == expected
    assert request.page[0xFFA:0x1000] == b"\2\0\0\0\0\0", "version 2, usage 0"


def test_what_goes_out_by_the_buffer() -> None:
    guest = Bare()
    guest.run(ROWS["MMIO write"][1])
    assert guest.requests[0].buffer[:9] == b"12345678\0"


@pytest.mark.parametrize(("size", "pieces"), [(1, [2032, 968]), (2, [1016, 1016, 968]), (4, [508] * 5 + [460])])
def test_strings_go_by_as_much_as_the_buffer_holds(size: int, pieces: list[int]) -> None:
    count = sum(pieces)

    async def out(cpu: GuestCpu) -> None:
        await cpu.write(DATA, bytes(range(250)) * (count * size // 250 + 1))
        await cpu.port_string(0x3F8, DATA, count, size, is_in=False)

    guest = Bare(0x7B)
    guest.run(out)
    assert [each.fields["info2"] for each in guest.requests] == pieces
    assert {each.fields["info1"] for each in guest.requests} == {port(0x3F8, size, string=True)}
    told = b"".join(each.buffer[: piece * size] for each, piece in zip(guest.requests, pieces, strict=True))
    assert told == guest.get(DATA, count * size)


def test_a_string_comes_in() -> None:
    guest = Bare(0x7B)

    async def body(cpu: GuestCpu) -> bytes:
        await cpu.port_string(0x1F0, DATA, 3, 2, is_in=True)
        data: bytes = await cpu.read(DATA, 8)
        return data

    guest.put(DATA, b"xxxxxxxx")
    assert guest.run(body, Answer(buffer=b"abcdefgh")) == b"abcdefxx", "no byte more than asked for"
    assert guest.requests[0].fields == words(code=0x7B, info1=port(0x1F0, 2, is_in=True, string=True), info2=3,
                                             scratch=BUFFER)  # fmt: skip


@pytest.mark.parametrize("name", ["monitor", "mwait"])
def test_monitor_tells_nothing(name: str) -> None:
    guest = Bare(0x8A, 0x8B)
    guest.run(lambda cpu: _(cpu.monitor(0x1234) if name == "monitor" else cpu.mwait()))
    assert not guest.requests


def test_dr7_is_what_the_guest_wrote() -> None:
    async def body(cpu: GuestCpu) -> list[int]:
        found = [await cpu.read_dr7()]
        await cpu.load(dr7=0x3)
        return [*found, await cpu.read_dr7()]

    guest = Bare(0x27, 0x37)
    assert guest.run(body, Answer({"rax": 0x77})) == [0x400, 0x403]
    assert len(guest.requests) == 1


def test_the_upper_half_of_dr7_is_gp_without_an_exit() -> None:
    guest = Bare(0x37)
    assert guest.run(caught(lambda cpu: cpu.load(dr7=1 << 32))) == (13, 0)
    assert not guest.requests


def caught(act: Callable[[GuestCpu], Any]) -> Body:
    async def body(cpu: GuestCpu) -> tuple[int, int] | None:
        try:
            await act(cpu)
        except GuestException as exception:
            return exception.vector, exception.error
        return None

    return body


def test_the_calling_areas_address_stays_inside() -> None:
    """MSR C001_F000 is read as 0 where there is no SVSM, and never asked for or written."""

    async def body(cpu: GuestCpu) -> int:
        await cpu.wrmsr(0xC001F000, 5)
        value: int = await cpu.rdmsr(0xC001F000)
        return value

    guest = Bare(0x7C)
    assert guest.run(body) == 0
    assert not guest.requests


# Answers.

GP, UD = 1 << 31 | 3 << 8 | 13, 1 << 31 | 3 << 8 | 6


@pytest.mark.parametrize(("info2", "exception"), [(GP, (13, 0)), (UD, (6, 0)), (GP | 1 << 11 | 0x18 << 32, (13, 0x18))])
def test_gp_and_ud_are_taken_by_the_instruction(info2: int, exception: tuple[int, int]) -> None:
    guest = Bare(0x7C)
    assert guest.run(caught(lambda cpu: cpu.rdmsr(MSR)), Answer({"info1": 1, "info2": info2})) == exception


@pytest.mark.parametrize("info2", [0, GP & ~(1 << 31), 1 << 31 | 3 << 8 | 14, 1 << 31 | 3 << 8 | 29, 1 << 31 | 13])
def test_no_other_exception_is_taken(info2: int) -> None:
    guest = Bare(0x7C)
    with pytest.raises(Terminated):
        guest.run(caught(lambda cpu: cpu.rdmsr(MSR)), Answer({"info1": 1, "info2": info2}))
    assert guest.ended_with == (0, 0)


OUTPUTS = {"RDMSR": ["rax", "rdx"], "IN 8": ["rax"], "RDTSCP": ["rax", "rdx", "rcx"], "RDPMC": ["rax", "rdx"],
           "VMMCALL": ["rax"]}  # fmt: skip
MISSING = [(name, field) for name, fields in OUTPUTS.items() for field in [*fields, "info1", "info2"]]


@pytest.mark.parametrize(("name", "missing"), MISSING)
def test_an_output_that_is_not_marked_ends_the_guest(name: str, missing: str) -> None:
    code, body, _, answer, _ = ROWS[name]
    marked = [field for field in ("info1", "info2", "rax", "rcx", "rdx") if field != missing]
    guest = Bare(code)
    with pytest.raises(Terminated):
        guest.run(body, Answer(answer.fields, marked))
    assert guest.ended_with == (0, 0)


@pytest.mark.parametrize(("name", "info1"), [*((name, 2) for name in ROWS), ("RDMSR", 3), ("IN 8", 0xFFFFFFFF)])
def test_a_refusal_ends_the_guest(name: str, info1: int) -> None:
    code, body, *_ = ROWS[name]
    guest = Bare(*filter(None, [code]))
    with pytest.raises(Terminated):
        guest.run(body, Answer({"info1": info1, "info2": 5}))
    assert guest.ended_with == (0, 0)


# Exit codes that do not belong there.


def inject(guest: Bare, body: Body, code: int) -> Any:
    """Halt the guest before `body`, and enter it with a #VC of the hypervisor's own."""

    async def halted(cpu: GuestCpu) -> Any:
        await cpu.hlt()
        return await body(cpu)

    guest.start(halted)
    assert guest.bench.run() == Hlt()
    guest.bench.set_vmcb(event_injection=1 << 31 | 1 << 11 | 3 << 8 | 29 | code << 32)
    return guest.go_on(Answer({"rax": 0x666, "rbx": 0x666, "rcx": 0x666, "rdx": 0x666}))


@pytest.mark.parametrize("code", [0x72, 0x7C, 0x7B, 0x6E, 0x400, 0x404, 0x76, 0x81, 0x27, 0x37, 0x999])
def test_an_injected_vc_at_another_instruction_ends_the_guest(code: int) -> None:
    """The hypervisor lies about what the guest does, to have its registers written."""

    async def body(cpu: GuestCpu) -> None:
        await cpu.invlpg(0)

    guest = Bare()
    with pytest.raises(Terminated):
        inject(guest, body, code)
    assert guest.ended_with == (0, 0)
    assert not guest.requests


def test_an_injected_debug_exception_goes_to_its_own_handler() -> None:
    """#DB comes as #VC 0x41; nothing is asked of the hypervisor."""
    guest = Bare()
    inject(guest, lambda cpu: _(cpu.rdtsc()), 0x41)
    assert not guest.requests


@pytest.mark.parametrize("act", ["invd", "not validated"])
def test_what_no_handler_does_ends_the_guest(act: str) -> None:
    guest = Bare(0x76)
    guest.bench.give(0x1F, 0x91F, validated=0)
    with pytest.raises(Terminated):
        guest.run(lambda cpu: _(cpu.invd() if act == "invd" else cpu.read(0x1F000, 8)))
    assert guest.ended_with == (0, 0)
    assert not guest.requests


@pytest.mark.parametrize("write", [False, True])
def test_encrypted_memory_is_no_mmio(write: bool) -> None:
    """The hypervisor puts a reserved bit into the nested entry of private memory, to be told what is in it."""
    guest = Bare()
    guest.bench.map(DATA >> 12, NOWHERE)
    with pytest.raises(Terminated, match="encrypted memory"):
        guest.run(lambda cpu: _(cpu.write(DATA, b"secret!!") if write else cpu.read(DATA, 8)))
    assert not guest.requests


def test_before_there_is_a_ghcb_only_cpuid_is_served() -> None:
    guest = Bare(0x7C)
    with pytest.raises(Terminated):
        guest.run(lambda cpu: _(cpu.rdmsr(MSR)), early=True)
    assert guest.ended_with == (0, 0)


@pytest.mark.parametrize("code", [0x6E, 0x87])
def test_a_secure_counter_that_is_intercepted_ends_the_guest(code: int) -> None:
    guest = Bare(code, features=1 | 1 << 9)
    with pytest.raises(Terminated):
        guest.run(lambda cpu: _(cpu.rdtsc() if code == 0x6E else cpu.rdtscp()))
    assert guest.ended_with == (1, 10)


def test_a_secure_counter_is_not_asked_of_the_hypervisor() -> None:
    """Its MSR, where that is intercepted, is read by RDTSC, and not written."""

    async def body(cpu: GuestCpu) -> tuple[int, int, int]:
        await cpu.wrmsr(0x10, 5)
        return await cpu.rdtsc(), await cpu.rdmsr(0x10), await cpu.rdtsc()

    guest = Bare(0x7C, features=1 | 1 << 9)
    guest.bench.machine.dram.write(MSR_PERMISSIONS, b"\xff" * 2 * PAGE)
    guest.bench.vmcb["msrpm_base_pa"] = MSR_PERMISSIONS
    guest.bench.set_vmcb()
    guest.bench.set_vmsa(sev_features=1 | 1 << 9, guest_tsc_scale=1 << 32)
    before, found, after = guest.run(body)
    assert before < found < after
    assert not guest.requests
