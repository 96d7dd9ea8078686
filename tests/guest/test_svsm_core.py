"""The SVSM's core protocol from its guest's side: each call, each check, and what the RMP says afterwards."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.system import Guest
from tests.guest.svsm_world import (
    ADDRESS,
    AREA,
    ATTEST,
    BUFFER,
    BUSY,
    CODE,
    CORE,
    CPUID,
    CREATE,
    DELETE,
    FIRST_VMSA,
    IGNORE,
    OK,
    PARAMETER,
    PVALIDATE,
    REMAP,
    REQUEST,
    SECRETS,
    SIZE_MISMATCH,
    SPARE,
    STATE,
    TABLES,
    UNCHANGED,
    UNSUPPORTED_CALL,
    UNSUPPORTED_PROTOCOL,
    VALIDATE,
    VTPM,
    call,
    calls,
    enter,
    frame,
    fresh,
    give_page,
    pvalidate,
    rights,
    run,
)  # fmt: skip
from tests.machines import PAGE, private_bytes
from tests.sampling import sampled

GUEST = [0xF, 0, 0xF, 0]
OWN = [0xF, 0, 0, 0]
BEYOND = 1 << 40
OURS = (TABLES, SECRETS, CPUID, STATE, FIRST_VMSA, CODE)
PENDING = "call_pending is taken back"


# The calling area.


def test_only_a_pending_call_is_served() -> None:
    async def body(cpu: GuestCpu) -> list[Any]:
        found: list[Any] = [await enter(cpu, 0x1234, 1, 2, 3)]
        await cpu.write(AREA, b"\1")
        await enter(cpu, 6, 1)
        return [*found, await cpu.read(AREA, 3), await cpu.look("rax", "rcx")]

    untouched, area, served = run(fresh(), body)
    assert untouched == (0x1234, 1, 2, 3)
    assert area == bytes(3), PENDING
    assert served == (0, 1 << 32 | 1)


def test_what_is_not_supported() -> None:
    wanted = [(CORE, 4), (CORE, 5), (CORE, 8), (CORE, 0xFFFFFFFF), (ATTEST, 2), (VTPM, 2)]
    assert calls(fresh(), *wanted) == [UNSUPPORTED_CALL] * len(wanted)
    assert calls(fresh(), (3, 0), (4, 1), (5, 0), (0xFFFFFFFF, 0)) == [UNSUPPORTED_PROTOCOL] * 4


def test_protocols_and_versions() -> None:
    async def body(cpu: GuestCpu) -> list[int]:
        asked = [(p, v) for p in range(6) for v in (0, 1, 2)]
        return [(await call(cpu, CORE, 6, p << 32 | v))[1] for p, v in asked]

    both = [0, 1 << 32 | 1, 0]
    assert run(fresh(), body) == [*both, *both, *both, *[0] * 9]


def test_there_is_no_virtual_top_of_memory() -> None:
    async def body(cpu: GuestCpu) -> list[Any]:
        return [await call(cpu, CORE, 7, 1, 7, 8), (await call(cpu, CORE, 7, 1 << 30))[0]]

    assert run(fresh(), body) == [(OK, 0, 7, 8), REQUEST]


# REMAP_CA.


def test_the_calling_area_moves() -> None:
    new = SPARE * PAGE

    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(new, b"\xff" * 16)
        found = [(await call(cpu, CORE, REMAP, new))[0], await cpu.read(new, 16)]
        found.append((await call(cpu, CORE, REMAP, new, area=new))[0])
        await cpu.write(AREA, b"\1")
        await enter(cpu, 6, 1)
        found.append((await cpu.read(AREA, 1), await pvalidate(cpu, AREA, at=new + 64, area=new)))
        return found

    code, cleared, again, old = run(fresh(), body)
    assert (code, again) == (OK, OK)
    assert cleared == bytes(8) + b"\xff" * 8
    assert old == (b"\1", (OK, 1)), "the old one is no calling area: not looked at, and an ordinary page"


@pytest.mark.parametrize(
    ("area", "code"),
    [(SPARE * PAGE + 8, PARAMETER), (0x301 * PAGE, ADDRESS), (BEYOND, ADDRESS), ((1 << 64) - PAGE, ADDRESS)]
    + [(page, ADDRESS) for page in sampled(OURS, 2)],
)
def test_a_calling_area_that_cannot_be(area: int, code: int) -> None:
    """Not a page, not validated, beyond RAM, the SVSM's own: refused, and the old one goes on."""

    async def body(cpu: GuestCpu) -> list[int]:
        await pvalidate(cpu, 0x301 * PAGE)
        return [(await call(cpu, CORE, REMAP, area))[0], (await call(cpu, CORE, 6, 1))[0]]

    guest = fresh()
    before = private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)
    assert run(guest, body) == [code, OK]
    assert (private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)) == before


# PVALIDATE.


def test_validation_zeroes_before_it_grants() -> None:
    pages = [page * PAGE for page in (SPARE, SPARE + 1, SPARE + 5)]

    async def body(cpu: GuestCpu) -> list[Any]:
        for page in pages:
            await cpu.write(page, b"old")
        found: list[Any] = [await pvalidate(cpu, *pages)]
        found.append([rights(guest, page) for page in pages])
        found.append(await pvalidate(cpu, *(page | VALIDATE for page in pages)))
        return [*found, [await cpu.read(page, 3) for page in pages]]

    guest = fresh()
    assert run(guest, body) == [(OK, 3), [(OWN, False, False)] * 3, (OK, 3), [bytes(3)] * 3]
    assert [rights(guest, page) for page in pages] == [(GUEST, False, True)] * 3


def test_a_rescinded_page_is_not_there() -> None:
    async def body(cpu: GuestCpu) -> int:
        await pvalidate(cpu, SPARE * PAGE)
        cpu.set_handler(29, None)
        try:
            await cpu.read(SPARE * PAGE, 1)
        except GuestException as fault:
            return fault.error
        return 0

    assert run(fresh(), body) == 0x404


BAD_ENTRIES = {
    "reserved bits": [(1 << bit, PARAMETER) for bit in range(4, 12)],
    "size": [(2, PARAMETER), (3, PARAMETER)],
    "2 MB alignment": [(SPARE * PAGE | 1 | VALIDATE, PARAMETER)],
    "the SVSM's": [(page | VALIDATE, ADDRESS) for page in OURS] + [(page, ADDRESS) for page in OURS],
    "in use": [(AREA, ADDRESS), (AREA | VALIDATE | IGNORE, ADDRESS), (0x800000 | 1, ADDRESS)],
    "beyond RAM": [(12 << 20, ADDRESS), (BEYOND | VALIDATE, ADDRESS), (0xFFFFFFFFFFFFF000, ADDRESS)],
    "so already": [(SPARE * PAGE | VALIDATE, UNCHANGED), (0x302 * PAGE, UNCHANGED)],
    "another size": [(0x200000 | 1, SIZE_MISMATCH), (0x200000 | 1 | IGNORE, SIZE_MISMATCH)],
}


@pytest.mark.parametrize(
    ("entry", "code"), [each for group in BAD_ENTRIES.values() for each in (group[0], *sampled(group[1:], 1))]
)
def test_entries_that_are_refused(entry: int, code: int) -> None:
    """Those before it are done, those behind it are not, and `next` names it."""

    async def body(cpu: GuestCpu) -> Any:
        await pvalidate(cpu, *(page * PAGE for page in (0x302, 0x310, 0x311)))
        return await pvalidate(cpu, 0x310 * PAGE | VALIDATE, entry, 0x311 * PAGE | VALIDATE)

    guest = fresh()
    own = {page: rights(guest, page) for page in (SECRETS, STATE, FIRST_VMSA, AREA)}
    assert run(guest, body) == (code, 1)
    assert rights(guest, 0x310 * PAGE) == (GUEST, False, True)
    assert rights(guest, 0x311 * PAGE) == (OWN, False, False)
    assert {page: rights(guest, page) for page in own} == own


def test_the_first_bad_page_of_a_run_stops_it() -> None:
    """Pages 0x320 to 0x327, of which 0x324 is valid: those behind it are left as they were."""
    run_of = range(0x320, 0x328)

    async def body(cpu: GuestCpu) -> list[Any]:
        await pvalidate(cpu, *(page * PAGE for page in run_of if page != 0x324))
        found: list[Any] = [await pvalidate(cpu, *(page * PAGE | VALIDATE for page in run_of))]
        found.append([rights(guest, page * PAGE)[2] for page in run_of])
        found.append(await pvalidate(cpu, *(page * PAGE | VALIDATE | IGNORE for page in run_of), next_=4))
        found.append([rights(guest, page * PAGE)[2] for page in run_of])
        await pvalidate(cpu, 0x322 * PAGE)
        found.append(await pvalidate(cpu, *(page * PAGE for page in run_of)))
        found.append([rights(guest, page * PAGE)[2] for page in run_of])
        return [*found, await pvalidate(cpu, *(page * PAGE | IGNORE for page in run_of), next_=2)]

    guest = fresh()
    yes, no = True, False
    assert run(guest, body) == [
        (UNCHANGED, 4), [yes] * 5 + [no] * 3, (OK, 8), [yes] * 8, (UNCHANGED, 2), [no] * 3 + [yes] * 5, (OK, 8),
    ]  # fmt: skip
    assert [rights(guest, page * PAGE) for page in run_of] == [(OWN, False, False)] * 8


BAD_LISTS = {
    "not aligned": (BUFFER + 4, 1, 0, PARAMETER), "none": (BUFFER, 0, 0, PARAMETER), "done": (BUFFER, 2, 2, PARAMETER),
    "beyond its end": (BUFFER, 2, 3, PARAMETER), "one too many": (BUFFER, 511, 0, PARAMETER),
    "across the page": (0x301 * PAGE - 16, 2, 0, PARAMETER), "the SVSM's": (STATE, 1, 0, ADDRESS),
    "beyond RAM": (BEYOND, 1, 0, ADDRESS), "not validated": (0x302 * PAGE, 1, 0, ADDRESS),
    "a save area": (FIRST_VMSA, 1, 0, ADDRESS),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(BAD_LISTS, 5))
def test_lists_that_are_refused(name: str) -> None:
    at, count, next_, code = BAD_LISTS[name]

    async def body(cpu: GuestCpu) -> int:
        await pvalidate(cpu, 0x302 * PAGE)
        if code == PARAMETER:
            await cpu.write(at, struct.pack("<HHI", count, next_, 0))
        return (await call(cpu, CORE, PVALIDATE, at))[0]

    guest = fresh()
    before = private_bytes(guest, STATE, PAGE)
    assert run(guest, body) == code
    assert private_bytes(guest, STATE, PAGE) == before


def test_a_full_list() -> None:
    """510 entries, then the last one of them alone."""

    async def body(cpu: GuestCpu) -> list[Any]:
        pages = [page * PAGE for page in range(0x400, 0x400 + 510)]
        return [await pvalidate(cpu, *pages), await pvalidate(cpu, *pages, next_=509)]

    assert run(fresh(), body) == [(OK, 510), (UNCHANGED, 509)]


def test_a_page_of_the_svsm_that_the_host_passes_off_as_the_guests() -> None:
    """The attack that COCONUT-SVSM describes: VMPCK0 lies in a page that the host gives to another address."""
    guest = fresh()
    key = private_bytes(guest, SECRETS + 0x20, 32)
    assert any(key)

    async def take(cpu: GuestCpu) -> Any:
        return await pvalidate(cpu, SPARE * PAGE)

    async def look(cpu: GuestCpu) -> Any:
        return await pvalidate(cpu, SPARE * PAGE | VALIDATE), await cpu.read(SPARE * PAGE, PAGE)

    run(guest, take)
    give_page(guest.vmm.vm, frame(guest, SECRETS), SPARE)
    code, seen = run(guest, look)
    assert code == (OK, 1)
    assert key not in seen
    assert seen == bytes(PAGE)


# CREATE_VCPU and DELETE_VCPU.

VMSA, CAA = 0x305000, 0x306000


def vmsa(vmpl: int = 2, efer: int = 0x1000, features: int = 1) -> bytes:
    page = bytearray(PAGE)
    page[0xCA] = vmpl
    struct.pack_into("<Q", page, 0xD0, efer)
    struct.pack_into("<Q", page, 0x3B0, features)
    struct.pack_into("<Q", page, 0x158, 0x60000010)
    return bytes(page)


async def create(cpu: GuestCpu, content: bytes | None = None, at: int = VMSA, area: int = CAA, apic_id: int = 1) -> int:
    if content is not None:
        await cpu.write(at, content)
    return (await call(cpu, CORE, CREATE, at, area, apic_id))[0]


def test_a_save_area_is_out_of_reach_until_it_is_deleted() -> None:
    async def body(cpu: GuestCpu) -> list[Any]:
        found: list[Any] = [await create(cpu, vmsa()), rights(guest, VMSA), await pvalidate(cpu, VMSA)]
        found.append(await pvalidate(cpu, CAA))
        found.append((await call(cpu, CORE, DELETE, VMSA))[0])
        found.append(rights(guest, VMSA))
        await cpu.write(VMSA, b"ordinary")
        found.append((await call(cpu, CORE, DELETE, VMSA))[0])
        return [*found, await pvalidate(cpu, VMSA, CAA)]

    guest = fresh()
    assert run(guest, body) == [
        OK, ([0xF, 0, 1, 0], True, True), (ADDRESS, 0), (ADDRESS, 0), OK, (GUEST, False, True), PARAMETER, (OK, 2),
    ]  # fmt: skip


BAD_AREAS: dict[str, tuple[dict[str, Any], int]] = {
    "VMPL0": ({"content": vmsa(vmpl=0)}, PARAMETER), "VMPL1": ({"content": vmsa(vmpl=1)}, PARAMETER),
    "VMPL3": ({"content": vmsa(vmpl=3)}, PARAMETER), "SVME off": ({"content": vmsa(efer=0)}, PARAMETER),
    "more features": ({"content": vmsa(features=1 | 1 << 3)}, PARAMETER),
    "no SNP": ({"content": vmsa(features=0)}, PARAMETER), "no processor": ({"apic_id": 2}, PARAMETER),
    "no such id": ({"apic_id": 0xFFFFFFFF}, PARAMETER), "not a page": ({"at": VMSA + 8}, ADDRESS),
    "calling area no page": ({"area": CAA + 8}, ADDRESS), "one page": ({"area": VMSA}, ADDRESS),
    "the first save area": ({"at": FIRST_VMSA}, ADDRESS), "state": ({"at": STATE}, ADDRESS),
    "calling area in the SVSM": ({"area": SECRETS}, ADDRESS), "beyond RAM": ({"at": BEYOND}, ADDRESS),
    "calling area beyond RAM": ({"area": BEYOND}, ADDRESS), "a calling area": ({"at": AREA}, ADDRESS),
    "another's calling area": ({"area": AREA}, ADDRESS), "not validated": ({"at": 0x302 * PAGE}, ADDRESS),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(BAD_AREAS, 8))
def test_processors_that_are_refused(name: str) -> None:
    """Nothing is left behind: the page is the guest's, and the same request with good values succeeds."""
    options, code = BAD_AREAS[name]

    async def body(cpu: GuestCpu) -> list[int]:
        await pvalidate(cpu, 0x302 * PAGE)
        await cpu.write(VMSA, vmsa())
        return [await create(cpu, **options), await create(cpu, vmsa())]

    guest = fresh()
    own = {page: rights(guest, page) for page in (STATE, SECRETS, FIRST_VMSA, AREA)}
    assert run(guest, body) == [code, OK]
    assert {page: rights(guest, page) for page in own} == own


def test_a_page_is_used_once() -> None:
    async def body(cpu: GuestCpu) -> list[int]:
        first = await create(cpu, vmsa())
        again = [await create(cpu), await create(cpu, vmsa(), at=0x307000), await create(cpu, at=0x308000, area=VMSA)]
        return [first, *again, (await call(cpu, CORE, REMAP, VMSA))[0], (await call(cpu, CORE, REMAP, CAA))[0]]

    assert run(fresh(), body) == [OK, *[ADDRESS] * 5]


@pytest.mark.parametrize("page", sampled([VMSA, AREA, STATE, 0, SECRETS, BEYOND, FIRST_VMSA + 8], 4))
def test_what_is_no_save_area_cannot_be_deleted(page: int) -> None:
    assert calls(fresh(), (CORE, DELETE, page)) == [PARAMETER]


def test_the_first_save_area_stays_the_svsms() -> None:
    """A guest deletes its own processor: nobody runs it any more, and the page is not the guest's."""

    async def body(cpu: GuestCpu) -> None:
        await cpu.write(AREA, b"\1")
        await enter(cpu, DELETE, FIRST_VMSA)

    guest = fresh()
    with pytest.raises(RuntimeError, match="HLT"):
        run(guest, body)
    assert rights(guest, FIRST_VMSA) == (OWN, False, True)
    assert private_bytes(guest, FIRST_VMSA + 0x1F8, 8) == struct.pack("<Q", DELETE), "no answer: no registers are left"


def test_two_processors_at_once_is_busy() -> None:
    """Another processor holds the lock: the guest is to ask again, and nothing is done."""
    guest = fresh()
    lock = STATE + 1
    vm = guest.vmm.vm

    async def body(cpu: GuestCpu) -> list[Any]:
        return [await pvalidate(cpu, SPARE * PAGE), await create(cpu, vmsa()), (await call(cpu, CORE, REMAP, CAA))[0]]

    guest.system.machine.encryption.write(vm.asid, (frame(guest, STATE) << 12) + lock - STATE, b"\1")
    assert run(guest, body) == [(BUSY, 0), BUSY, BUSY]
    assert rights(guest, SPARE * PAGE) == (GUEST, False, True)


def processors_of(guest: Guest) -> list[int]:
    """The APIC IDs by number that the SVSM has noted."""
    raw = private_bytes(guest, STATE + 64 + 24 * 32, 256)
    return [number for number in struct.unpack("<64I", raw) if number != 0xFFFFFFFF]


def test_it_knows_its_processors() -> None:
    assert processors_of(fresh()) == [0, 1]


def test_a_save_area_of_the_guests_is_no_buffer() -> None:
    """What the SVSM writes for its guest must not become a processor's registers."""

    async def body(cpu: GuestCpu) -> list[Any]:
        found: list[Any] = [await create(cpu, vmsa())]
        before = private_bytes(guest, VMSA, PAGE)
        await cpu.write(BUFFER, struct.pack("<QQQQQQQQ", VMSA, PAGE, 0x300000, 64, 0x301000, PAGE, 0, 0))
        found.append((await call(cpu, ATTEST, 0, BUFFER))[0])
        found += [(await call(cpu, VTPM, 1, at))[0] for at in (VMSA, VMSA - 8)]
        found.append((await call(cpu, CORE, PVALIDATE, VMSA))[0])
        return [*found, private_bytes(guest, VMSA, PAGE) == before]

    guest = fresh()
    assert run(guest, body) == [OK, ADDRESS, ADDRESS, ADDRESS, ADDRESS, True]
