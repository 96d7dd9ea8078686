"""SNP_LAUNCH_UPDATE of Linux and of the v7 series: every errno, and what is left when a page fails."""

from __future__ import annotations

import errno
import struct
from hashlib import sha384

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.host.sev_hosts import ATTRIBUTES, ENCRYPT_OP, PAGE, SNP, STRANGE, Handle, Host, refused
from tests.host.test_sev_snp_launch import snp_vm

VALID, OURS, ABSENT = PageState.GUEST_VALID, PageState.HYPERVISOR, -1
PAGES = 16
RECLAIM = Command.SNP_PAGE_RECLAIM
ADD = Command.SNP_LAUNCH_UPDATE


def launching(host: Host, private: int = PAGES) -> tuple[Handle, int]:
    """A guest in LAUNCH with a slot at gfn 0x10, its first pages private: the VM, and a source buffer."""
    vm = snp_vm(host)
    vm.add_private_memory(PAGES, gfn=0x10)
    if private:
        vm.make_private(range(0x10, 0x10 + private))
    vm.snp_start()
    source = host.process.mmap((PAGES + 1) * PAGE)
    host.process.store(source, b"".join(bytes([n]) * PAGE for n in range(PAGES)))
    return vm, source


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def guest(host: Host) -> tuple[Handle, int]:
    return launching(host)


def digest(vm: Handle) -> bytes:
    """The launch digest as the firmware has it."""
    found: bytes = vm.host.system.processor.context(vm.sev.gctx or 0).launch_digest
    return found


def chain(*pages: tuple[int, int, bytes]) -> bytes:
    """The digest of pages given as (gfn, type, contents), from the tables of the ABI."""
    value = bytes(48)
    for gfn, kind, contents in pages:
        hashed = sha384(contents).digest() if kind == 1 else bytes(48)
        info = value + hashed + (0x70).to_bytes(2, "little") + bytes([kind, 0, 0, 0, 0, 0])
        value = sha384(info + (gfn << 12).to_bytes(8, "little")).digest()
    return value


def states(vm: Handle, count: int = PAGES) -> list[int]:
    return vm.states(range(0x10, 0x10 + count))


# Linux.


def test_pages_are_copied_measured_and_encrypted(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    assert vm.snp_update(0x10, source, 3 * PAGE) == (0x13, source + 3 * PAGE, 0)
    assert vm.error == STRANGE
    assert states(vm, 4) == [VALID, VALID, VALID, ABSENT]
    assert vm.private.prepared[:4].tolist() == [True, True, True, False]
    assert digest(vm) == chain(*((0x10 + n, 1, bytes([n]) * PAGE) for n in range(3)))
    frame = int(vm.private.pages.peek(range(2, 3))[0])
    read = vm.host.system.machine.encryption.read
    assert read(vm.vm.asid, frame << 12, PAGE) == b"\2" * PAGE


def test_zero_pages_take_no_source_and_keep_the_address(guest: tuple[Handle, int]) -> None:
    vm, _ = guest
    assert vm.snp_update(0x10, 0x5000, 2 * PAGE, kind=3) == (0x12, 0x5000, 0)
    assert digest(vm) == chain((0x10, 3, b""), (0x11, 3, b""))


def test_a_source_need_not_be_aligned(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    vm.snp_update(0x10, source + 8, PAGE)
    assert digest(vm) == chain((0x10, 1, bytes(PAGE - 8) + b"\1" * 8))


def test_without_a_launch(host: Host) -> None:
    vm = host.vm(SNP)
    with refused(errno.EINVAL):
        vm.snp_update(0x10, 0, PAGE)
    vm.init2()
    with refused(errno.EINVAL):
        vm.snp_update(0x10, 0, PAGE)


def test_what_kvm_itself_refuses(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    for size in (1, PAGE - 1, PAGE + 1):
        with refused(errno.EINVAL):
            vm.snp_update(0x10, source, size)
    for kind in (0, 2, 7, 255):
        with refused(errno.EINVAL):
            vm.snp_update(0x10, source, PAGE, kind)
    for flag in range(16):
        with refused(errno.EINVAL):
            vm.snp_update(0x10, source, PAGE, flags=1 << flag)
    for gfn in (0, 0xF, 0x10 + PAGES, 1 << 40, (1 << 64) - 1):
        with refused(errno.EINVAL):
            vm.snp_update(gfn, source, PAGE)
    assert set(states(vm)) == {ABSENT}
    assert vm.error == STRANGE


def test_a_slot_without_a_private_file(host: Host, guest: tuple[Handle, int]) -> None:
    vm, source = guest
    plain = host.process.mmap(PAGE)
    host.process.ioctl(vm.fd, 0x4020AE46, bytearray(struct.pack("<IIQQQ", 1, 0, 0x100 * PAGE, PAGE, plain)))
    with refused(errno.EINVAL):
        vm.snp_update(0x100, source, PAGE)


def test_nothing_to_do_does_nothing(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    assert vm.snp_update(0x10, source, 0) == (0x10, source, 0)
    assert set(states(vm)) == {ABSENT}


def test_the_length_ends_with_the_slot(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    last = 0x10 + PAGES - 1
    assert vm.snp_update(last, source, 3 * PAGE) == (last + 1, source + PAGE, 2 * PAGE)


CAUSES = ["shared", "prepared", "assigned", "source", "poisoned", "memory", "firmware", "rmpupdate", "closed", "fd"]
"""What may befall a page; the last two befall a call."""


@pytest.mark.parametrize(("cause", "first"), [*((each, 0) for each in CAUSES), *((each, 3) for each in CAUSES[:-2])])
@pytest.mark.parametrize("step", [None, 2])
def test_a_page_that_fails(
    cause: str, first: int, step: int | None, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO for the first page of the call, whatever it was; otherwise 0, and the pages before it are done."""
    host.kernel.step_pages = step
    vm, source = launching(host)
    gmem = vm.private
    status, after = None, OURS
    sev_fd = host.sev_fd
    with monkeypatch.context() as patch:
        match cause:
            case "shared":
                vm.make_private(range(0x10 + first, 0x11 + first), private=False)
            case "prepared":
                vm.snp_update(0x10 + first, source, PAGE)
                after = VALID
            case "assigned":
                frame = int(gmem.pages.get(range(first, first + 1))[0])
                host.kernel.ccp.convert(range(frame, frame + 1))
                after = PageState.FIRMWARE
            case "source":
                host.process.munmap(source + first * PAGE, PAGE)
            case "poisoned":
                gmem.fail(range(first, first + 1))
            case "memory":
                patch.setattr(host.kernel.memory, "_free", [range(9000, 9000 + first)] if first else [])
                after = ABSENT
            case "firmware":
                host.spoil(patch, ADD, Status.INVALID_PAGE_STATE, after=first)
                status = Status.INVALID_PAGE_STATE
            case "rmpupdate":
                frame = int(gmem.pages.get(range(first, first + 1))[0])
                host.system.machine.in_use.add(frame)
            case "closed":
                descriptors = [fd for fd, file in host.process._files.items() if file is gmem]
                host.process.close(descriptors[0])
            case "fd":
                sev_fd = host.kvm_fd
        digest_before = digest(vm)
        if first:
            assert vm.snp_update(0x10, source, 6 * PAGE) == (0x10 + first, source + first * PAGE, (6 - first) * PAGE)
            assert vm.error == STRANGE
        with refused(errno.EIO, status):
            vm.snp_update(0x10 + first, source + first * PAGE, PAGE, sev_fd=sev_fd)
        assert vm.error == (status or 0)
        if cause == "memory":
            patch.undo()
    if cause == "closed":
        assert digest(vm) == digest_before
        return
    assert states(vm, first + 1) == [VALID] * first + [after]
    assert not vm.vm.bugged
    if cause in ("source", "memory", "firmware", "rmpupdate", "fd"):
        host.system.machine.in_use.clear()
        host.process.munmap(source, (PAGES + 1) * PAGE)
        fresh = host.process.mmap(PAGE)
        assert vm.snp_update(0x10 + first, fresh, PAGE)[2] == 0, "a failed page may be tried again"


def test_after_finish_the_firmware_refuses(guest: tuple[Handle, int]) -> None:
    vm, source = guest
    vm.snp_finish()
    with refused(errno.EIO, Status.INVALID_GUEST_STATE):
        vm.snp_update(0x10, source, PAGE)
    assert vm.error == Status.INVALID_GUEST_STATE
    assert states(vm, 1) == [OURS]


def test_a_cpuid_page_comes_back_as_the_firmware_wants_it(host: Host, guest: tuple[Handle, int]) -> None:
    vm, source = guest
    entry = (0x80000008).to_bytes(4, "little") + bytes(20) + (0xFFFF).to_bytes(4, "little") + bytes(20)
    page = ((1).to_bytes(4, "little") + bytes(12) + entry).ljust(PAGE, b"\0")
    host.process.store(source, page)
    before = digest(vm)
    with refused(errno.EIO, Status.INVALID_PARAM):
        vm.snp_update(0x10, source, PAGE, kind=6)
    told = host.process.load(source, PAGE)
    assert told != page
    assert (digest(vm), states(vm, 1)) == (before, [OURS])
    assert vm.snp_update(0x10, source, PAGE, kind=6)[2] == 0, "as corrected it passes"


def test_other_pages_and_other_refusals_are_not_handed_back(
    host: Host, guest: tuple[Handle, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, source = guest
    written: list[int] = []
    real = host.process.space.copy_out

    def copy_out(address: int, data: bytes) -> None:
        written.append(address)
        real(address, data)

    monkeypatch.setattr(host.process.space, "copy_out", copy_out)
    for kind, status in ((6, Status.INVALID_PAGE_STATE), (1, Status.INVALID_PARAM), (6, Status.INVALID_PARAM)):
        with monkeypatch.context() as patch:
            host.spoil(patch, ADD, status)
            written.clear()
            with refused(errno.EIO, status):
                vm.snp_update(0x10, source, PAGE, kind=kind)
        assert (source in written) == (kind == 6 and status is Status.INVALID_PARAM)


def test_a_page_that_does_not_come_back_bugs_the_vm(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.kernel.step_pages = 1
    vm, source = launching(host)
    with monkeypatch.context() as patch:
        host.spoil(patch, ADD, Status.INVALID_PAGE_STATE, after=2)
        host.spoil(patch, RECLAIM, Status.INVALID_PAGE_STATE)
        vm.snp_update(0x10, source, 4 * PAGE)
    frame = int(vm.private.pages.peek(range(2, 3))[0])
    assert [list(run) for run in host.kernel.ccp.leaks.listed] == [[frame]]
    for call in (vm.snp_finish, vm.snp_start, vm.create_vcpu):
        with refused(errno.EIO):
            call()


def test_runs_and_single_pages_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for step in (None, 1, 3):
        host = Host()
        host.kernel.step_pages = step
        vm, source = launching(host)
        with monkeypatch.context() as patch:
            host.spoil(patch, ADD, Status.INVALID_PAGE_STATE, after=5)
            left = vm.snp_update(0x10, source, 9 * PAGE)
        prepared = vm.private.prepared.tolist()
        ends.append((left[0], left[2], digest(vm), states(vm, 6), prepared, host.system.processor.guest_count))
    assert ends[0] == ends[1] == ends[2]


def test_others_run_between_pages_but_for_those_who_need_the_locks(host: Host) -> None:
    """Another sub-command waits for kvm->lock, a conversion for slots_lock; a hole in what is done is punched."""
    host.kernel.step_pages = 1
    vm, source = launching(host)
    gmem = vm.private
    payload = struct.pack("<QQQBBHI32x", 0x10, source, 4 * PAGE, 1, 0, 0, 0)
    command, steps = vm.start_op(101, payload)
    places = 0
    for step in steps:
        if step.name != "launch update: pages":
            continue
        places += 1
        others = [host.process.calling(vm.fd, ENCRYPT_OP, bytearray(command))]
        others.append(host.process.calling(vm.fd, ATTRIBUTES, bytearray(struct.pack("<QQQQ", 0x10000, PAGE, 0, 0))))
        assert all(next(other).blocked for other in others)
        if places == 3:
            gmem.punch(range(1))
    assert places == 4
    assert states(vm, 5) == [ABSENT, VALID, VALID, VALID, ABSENT]
    assert not any(lock.held for lock in (vm.vm.lock, vm.vm.slots_lock))


# The v7 series.


@pytest.fixture
def series() -> tuple[Handle, int]:
    vm = snp_vm(Host("rfc-v7"))
    shared, _ = vm.add_private_memory(PAGES, gfn=0x10)
    vm.host.process.store(shared, b"".join(bytes([n]) * PAGE for n in range(PAGES)))
    vm.snp_start()
    return vm, shared


def private_of(vm: Handle) -> list[bool]:
    found: list[bool] = vm.vm.is_private(range(0x10, 0x10 + 6)).tolist()
    return found


def test_series_pages_by_their_shared_side(series: tuple[Handle, int]) -> None:
    vm, shared = series
    vm.snp_update_v7(shared + PAGE, 2 * PAGE)
    assert vm.error == 0
    assert states(vm, 4) == [ABSENT, VALID, VALID, ABSENT]
    assert private_of(vm) == [False, True, True, False, False, False]
    assert digest(vm) == chain((0x11, 1, b"\1" * PAGE), (0x12, 1, b"\2" * PAGE))


def test_series_errors_before_any_page(series: tuple[Handle, int]) -> None:
    vm, shared = series
    early = snp_vm(vm.host)
    with refused(errno.EINVAL):
        early.snp_update_v7(shared, PAGE)
    with refused(errno.EINVAL):
        vm.snp_update_v7(0x5000, PAGE)
    vm.snp_update_v7(shared, 0)
    plain = vm.host.vm(0)
    with refused(errno.ENOTTY):
        plain.snp_update_v7(shared, PAGE)
    with refused(errno.EIO, Status.INVALID_PARAM):
        vm.snp_update_v7(shared, PAGE, kind=7)


def test_series_an_assigned_page_is_efault_and_nothing_is_undone(series: tuple[Handle, int]) -> None:
    vm, shared = series
    vm.make_private(range(0x13, 0x14))
    with refused(errno.EFAULT):
        vm.snp_update_v7(shared, 6 * PAGE)
    assert states(vm, 3) == [VALID, VALID, VALID]
    assert private_of(vm) == [False, False, False, True, False, False]


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("cause", ["firmware", "rmpupdate", "memory"])
def test_series_a_failure_gives_the_whole_call_back(
    cause: str, step: int | None, series: tuple[Handle, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, shared = series
    host, before = vm.host, digest(vm)
    host.kernel.step_pages = step
    binding = vm.private
    number, status = errno.EFAULT, None
    with monkeypatch.context() as patch:
        match cause:
            case "firmware":
                host.spoil(patch, ADD, Status.INVALID_PAGE_STATE, after=3)
                number, status = errno.EIO, Status.INVALID_PAGE_STATE
            case "rmpupdate":
                host.system.machine.in_use.add(int(binding.file.pages.get(range(3, 4))[0]))
            case "memory":
                patch.setattr(host.kernel.memory, "_free", [range(9000, 9003)])
                number = errno.ENOMEM
        with refused(number, status):
            vm.snp_update_v7(shared, 6 * PAGE)
    assert vm.error == (status or STRANGE)
    assert not set(states(vm)) & {VALID, PageState.PRE_GUEST}
    assert not any(private_of(vm))
    assert digest(vm) != before, "three pages were measured: that stays"


def test_series_a_page_that_does_not_come_back_is_leaked(
    series: tuple[Handle, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal that began it stays the answer, and the VM is bugged."""
    vm, shared = series
    vm.host.kernel.step_pages = 1
    with monkeypatch.context() as patch:
        vm.host.spoil(patch, ADD, Status.INVALID_PAGE_STATE, after=1)
        vm.host.spoil(patch, RECLAIM, Status.INVALID_PAGE_STATE)
        with refused(errno.EIO, Status.INVALID_PAGE_STATE):
            vm.snp_update_v7(shared, 3 * PAGE)
    assert vm.vm.bugged
    assert vm.host.kernel.ccp.leaks.count == 1


def test_series_does_not_hand_a_cpuid_page_back(series: tuple[Handle, int]) -> None:
    vm, shared = series
    bad = (65).to_bytes(4, "little").ljust(PAGE, b"\0")
    vm.host.process.store(shared, bad)
    with refused(errno.EIO, Status.INVALID_PARAM):
        vm.snp_update_v7(shared, PAGE, kind=6)
    assert vm.host.process.load(shared, PAGE) == bad


def test_series_certificates(series: tuple[Handle, int]) -> None:
    vm, _ = series
    room = vm.host.process.mmap(8 * PAGE)

    def certs(number: int, address: int, size: int) -> int:
        returned: int = struct.unpack_from("<QQ", vm.op(number, struct.pack("<QQ", address, size)))[1]
        return returned

    with refused(errno.ENOENT):
        certs(26, room, PAGE)
    vm.host.process.store(room, b"certificate")
    certs(27, room, 11)
    with refused(errno.EINVAL):
        certs(26, room, PAGE - 1)
    needed = struct.unpack_from("<QQ", vm.host.process.load(vm.host.scratch, 16))[1]
    assert needed == PAGE
    assert certs(26, room + PAGE, 2 * PAGE) == PAGE
    assert vm.host.process.load(room + PAGE, PAGE) == b"certificate".ljust(PAGE, b"\0")
    with refused(errno.EINVAL):
        certs(27, room, 0x5001)
    certs(27, room, 0)
    with refused(errno.ENOENT):
        certs(26, room, PAGE)
    early, plain = snp_vm(vm.host), vm.host.vm(0)
    for other, number in ((early, errno.EINVAL), (plain, errno.ENOTTY)):
        for op in (26, 27):
            with refused(number):
                other.op(op, bytes(16))
