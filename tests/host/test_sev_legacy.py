"""The launch of SEV and SEV-ES guests through KVM, with SNP on and off, against an owner with arithmetic of his own."""

from __future__ import annotations

import errno
import struct
from hashlib import sha256
from typing import Any

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.process import Advice, MapFlags, Protection
from snpbook.spec.status import Status
from snpbook.spec.vmsa import VMSA
from tests.firmware.legacy_owner import Owner
from tests.host.sev_hosts import DEFAULT, ENCRYPT_OP, MIB, PAGE, SET_REGION, SEV, SEV_ES, STRANGE, Handle, Host, refused

LAUNCH_START, UPDATE_DATA, UPDATE_VMSA, SECRET, MEASURE, FINISH = 2, 3, 4, 5, 6, 7
STATUS, DECRYPT, ENCRYPT, REPORT = 16, 17, 18, 20
LUPDATE, LSECRET, RUNNING = 1, 2, 3
SNP_OFF: dict[str, Any] = {"modules": {"kvm_amd": "sev_snp=0"}, "cmdline": "iommu=off"}


def sev_vm(host: Host, kind: int = SEV, pages: int = 16) -> tuple[Handle, int]:
    """An initialised guest with memory at 0, which user space sees at the address."""
    vm = host.vm(kind)
    vm.init2()
    memory = host.process.mmap(pages * PAGE)
    host.process.store(memory, b"".join(bytes([(n + 1) % 256]) * PAGE for n in range(pages)))
    host.process.ioctl(vm.fd, SET_REGION, bytearray(struct.pack("<IIQQQ", 0, 0, 0, pages * PAGE, memory)))
    return vm, memory


def start(vm: Handle, policy: int = 0, **changes: Any) -> int:
    """LAUNCH_START: the handle."""
    fields = {"handle": 0, "dh": 0, "dh_len": 0, "session": 0, "session_len": 0} | changes
    payload = struct.pack(
        "<IIQI4xQI4x",
        fields["handle"],
        policy,
        fields["dh"],
        fields["dh_len"],
        fields["session"],
        fields["session_len"],
    )
    handle: int = struct.unpack_from("<I", vm.op(LAUNCH_START, payload, changes.get("sev_fd")))[0]
    return handle


def update(vm: Handle, address: int, size: int) -> None:
    vm.op(UPDATE_DATA, struct.pack("<QI4x", address, size))


def blob(vm: Handle, number: int, address: int, size: int, nonce: bytes | None = None) -> int:
    """LAUNCH_MEASURE and GET_ATTESTATION_REPORT: the length that comes back."""
    head = b"" if nonce is None else nonce
    back = vm.op(number, head + struct.pack("<QI4x", address, size))
    returned: int = struct.unpack_from("<I", back, len(head) + 8)[0]
    return returned


def status(vm: Handle) -> tuple[int, int, int]:
    return struct.unpack("<III", vm.op(STATUS, bytes(12)))


def debug(vm: Handle, number: int, source: int, target: int, size: int) -> None:
    vm.op(number, struct.pack("<QQI4x", source, target, size))


@pytest.fixture(params=["snp on", "snp off"])
def host(request: pytest.FixtureRequest) -> Host:
    made = Host(**(SNP_OFF if request.param == "snp off" else {}))
    assert made.kernel.ccp.snp_initialised == (request.param == "snp on")
    return made


@pytest.mark.parametrize("kind", [SEV, SEV_ES])
def test_a_whole_launch_with_its_owner(host: Host, kind: int) -> None:
    policy, owner = 4 * (kind == SEV_ES), Owner()
    vm, memory = sev_vm(host, kind)
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    pdh, _ = host.certificates()
    dh, session = owner.certificate(), owner.session(pdh, policy)
    free = host.free
    handle = start(
        vm, policy, dh=host.put(dh, 2), dh_len=len(dh), session=host.put(session, 3), session_len=len(session)
    )
    assert handle == 1
    assert status(vm) == (1, policy, LUPDATE)
    update(vm, memory + PAGE, 3 * PAGE)
    measured = b"".join(bytes([n]) * PAGE for n in (2, 3, 4))
    assert host.process.load(memory, PAGE) == b"\1" * PAGE
    assert host.process.load(memory + PAGE, PAGE) != b"\2" * PAGE
    if kind == SEV_ES:
        areas = []
        for number in (0, 1):
            state = vm.vm.vcpus[number].state.replace(rip=0x100 + number, dr0=5)
            vm.vm.vcpus[number].state = state
            areas.append(bytes(state.replace(dr0=0)))
        vm.op(UPDATE_VMSA)
        measured += b"".join(areas)
    place = host.put(bytes(0x30), 5)
    assert blob(vm, MEASURE, place, 0x30) == 0x30
    mac, nonce = struct.unpack("<32s16s", host.process.load(place, 0x30))
    version = host.kernel.ccp.version
    assert version is not None
    assert mac == owner.measure(version, policy, sha256(measured).digest(), nonce)
    assert status(vm)[2] == LSECRET
    header, sealed = owner.packet(b"the disk's key".ljust(32, b"\0"), 1, mac)
    inject = struct.pack(
        "<QI4xQI4xQI4x", host.put(header, 6), 0x34, memory + 2 * PAGE + 64, 32, host.put(sealed, 7), 32
    )
    vm.op(SECRET, inject)
    frame = int(host.process.space.frames(range((memory >> 12) + 2, (memory >> 12) + 3))[0])
    read = host.system.machine.encryption.read
    assert read(vm.vm.asid, (frame << 12) + 64, 14) == b"the disk's key"
    vm.op(FINISH)
    assert status(vm)[2] == RUNNING
    report = host.put(bytes(0xD0), 5)
    assert blob(vm, REPORT, report, 0xD0, b"m" * 16) == 0xD0
    found = host.process.load(report, 0xD0)
    assert (found[:16], found[16:48]) == (b"m" * 16, sha256(measured).digest())
    assert host.free == free
    assert host.kernel.memory.pinned == 0


def test_lengths_are_told(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm)
    with refused(errno.EIO, Status.INVALID_LENGTH):
        blob(vm, MEASURE, memory, 0)
    assert vm.error == Status.INVALID_LENGTH
    assert struct.unpack_from("<I", host.process.load(host.scratch, 16), 8)[0] == 0x30
    blob(vm, MEASURE, memory, 0x30)
    with refused(errno.EIO, Status.INVALID_LENGTH):
        blob(vm, REPORT, memory, 0, bytes(16))
    assert struct.unpack_from("<I", host.process.load(host.scratch, 32), 24)[0] == 0xD0
    with refused(errno.EINVAL):
        blob(vm, REPORT, memory, 0x4001, bytes(16))


def test_what_start_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, memory = sev_vm(host)
    free = host.free
    for changes in ({"dh": memory}, {"session": memory}, {"dh": memory, "dh_len": 0x4001}):
        with refused(errno.EINVAL):
            start(vm, **changes)
    with refused(errno.EFAULT):
        start(vm, dh=0x5000, dh_len=2084)
    for sev_fd in (host.kvm_fd, 99):
        with refused(errno.EBADF):
            start(vm, sev_fd=sev_fd)
    assert vm.error == STRANGE
    with refused(errno.EIO, Status.INVALID_GUEST):
        start(vm, handle=77)
    assert vm.error == Status.INVALID_GUEST
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.ACTIVATE, Status.DF_FLUSH_REQUIRED)
        with refused(errno.EIO, Status.DF_FLUSH_REQUIRED):
            start(vm)
    assert (vm.sev.handle, host.guests, host.free) == (0, 0, free)
    assert start(vm) == 1


def test_a_handle_that_cannot_be_told_is_undone(host: Host) -> None:
    """The structure lies in memory that may only be read."""
    vm, _ = sev_vm(host)
    process = host.process
    fd = process.memfd_create()
    process.ftruncate(fd, PAGE)
    process.store(process.mmap(PAGE, flags=MapFlags.SHARED, fd=fd), bytes(40))
    readable = process.mmap(PAGE, Protection.READ, MapFlags.SHARED, fd)
    with refused(errno.EFAULT):
        process.ioctl(vm.fd, ENCRYPT_OP, bytearray(struct.pack("<IIQII", 2, 0, readable, 0, host.sev_fd)))
    assert (vm.sev.handle, host.guests) == (0, 0)
    assert start(vm) == 1


def test_what_update_data_refuses(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm)
    for address, size, number in ((memory, 0, errno.EINVAL), (0x5000, 2 * PAGE, errno.ENOMEM)):
        with refused(number):
            update(vm, address, size)
    for address, size, why in ((memory + 8, 16, Status.INVALID_ADDRESS), (memory, 24, Status.INVALID_LENGTH)):
        with refused(errno.EIO, why):
            update(vm, address, size)
    host.process.capabilities, host.process.memlock = frozenset(), PAGE
    with refused(errno.ENOMEM):
        update(vm, memory, 2 * PAGE)
    update(vm, memory, PAGE)
    assert host.kernel.memory.pinned == host.process.locked == 0


def test_scattered_memory_is_one_command_for_each_piece(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm)
    process = host.process
    process.madvise(memory + 4 * PAGE, PAGE, Advice.DONTNEED)
    hole = host.kernel.memory.allocate(1)
    process.store(memory + 4 * PAGE, b"\5" * PAGE)
    recorder = host.system.record()
    update(vm, memory + 16, 8 * PAGE - 32)
    sizes = [e.arguments["len"] for e in recorder.events if getattr(e, "name", "") == "LAUNCH_UPDATE_DATA"]
    host.kernel.memory.release(hole)
    assert sum(sizes) == 8 * PAGE - 32
    assert len(sizes) >= 3


def test_a_secret_needs_one_piece(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm)
    process = host.process
    process.madvise(memory + PAGE, PAGE, Advice.DONTNEED)
    hole = host.kernel.memory.allocate(1)
    process.store(memory + PAGE, bytes(PAGE))
    host.kernel.memory.release(hole)
    header = host.put(bytes(0x34), 6)
    with refused(errno.EINVAL):
        vm.op(SECRET, struct.pack("<QI4xQI4xQI4x", header, 0x34, memory + PAGE - 16, 32, header, 32))
    with refused(errno.EINVAL):
        vm.op(SECRET, struct.pack("<QI4xQI4xQI4x", header, 0x34, memory, 32, 0, 32))
    with refused(errno.EINVAL):
        vm.op(SECRET, struct.pack("<QI4xQI4xQI4x", header, 0x34, memory, 0, header, 32))
    assert host.kernel.memory.pinned == 0


def test_registers_are_taken_once_and_only_with_sev_es(host: Host) -> None:
    plain, _ = sev_vm(host)
    with refused(errno.ENOTTY):
        plain.op(UPDATE_VMSA)
    vm, _ = sev_vm(host, SEV_ES)
    vm.create_vcpu()
    start(vm, 4)
    vcpu = vm.vm.vcpus[0]
    reset, vcpu.state = vcpu.state, vcpu.state.replace(dr7=0x455)
    with refused(errno.EINVAL):
        vm.op(UPDATE_VMSA)
    vcpu.state = reset
    vm.op(UPDATE_VMSA)
    with refused(errno.EINVAL):
        vm.op(UPDATE_VMSA)


@pytest.mark.parametrize(("kind", "mxcsr"), [(DEFAULT, 0), (SEV_ES, 0x1F80)])
def test_guests_of_type_0_have_no_x87_state_in_their_registers(kind: int, mxcsr: int) -> None:
    """So that measurements change with INIT2."""
    host = Host()
    vm = host.vm(kind)
    if kind == DEFAULT:
        vm.op(1)
    else:
        vm.init2()
    vm.create_vcpu()
    start(vm, 4)
    vm.op(UPDATE_VMSA)
    page = host.system.machine.encryption.read(vm.vm.asid, vm.vm.vcpus[0].vmsa_page << 12, PAGE)
    assert VMSA.unpack(page).mxcsr == mxcsr


def test_debugging_at_every_alignment(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm)
    text = bytes(range(256)) * 48
    host.process.store(memory, text)
    update(vm, memory, 3 * PAGE)
    room = host.process.mmap(4 * PAGE)
    for offset, target, size in ((0, 0, 3 * PAGE), (5, 0, 100), (0, 3, 4097), (4090, 4090, 20), (16, 32, 48)):
        host.process.store(room, bytes(4 * PAGE))
        debug(vm, DECRYPT, memory + offset, room + target, size)
        assert host.process.load(room + target, size) == text[offset : offset + size]
        assert host.process.load(room + target + size, 16) == bytes(16), "and nothing more"
    whole = bytearray(text)
    for offset, size in ((0, 32), (7, 3), (4000, 200), (8191, 1)):
        host.process.store(room, b"\xee" * size)
        debug(vm, ENCRYPT, room, memory + offset, size)
        whole[offset : offset + size] = b"\xee" * size
        debug(vm, DECRYPT, memory, room + PAGE, 3 * PAGE)
        assert host.process.load(room + PAGE, 3 * PAGE) == whole
    for source, target, size in ((memory, room, 0), (memory, 0, 16), ((1 << 64) - 8, room, 16)):
        with refused(errno.EINVAL):
            debug(vm, DECRYPT, source, target, size)
    with refused(errno.ENOMEM):
        debug(vm, DECRYPT, 0x5000, room, 16)
    assert host.kernel.memory.pinned == 0


def test_a_policy_against_debugging(host: Host) -> None:
    vm, memory = sev_vm(host)
    start(vm, policy=1)
    for number in (DECRYPT, ENCRYPT):
        with refused(errno.EIO, Status.POLICY_FAILURE):
            debug(vm, number, memory, memory + PAGE, 16)


def test_teardown_gives_everything_back(host: Host) -> None:
    host.vm(SEV).close()
    before, free = host.table(), host.free
    vm, memory = sev_vm(host, SEV_ES)
    vm.create_vcpu()
    host.process.ioctl(vm.fd, 0x8010AEBB, bytearray(struct.pack("<QQ", memory, 8 * PAGE)))
    start(vm, 4)
    update(vm, memory, 8 * PAGE)
    vm.op(UPDATE_VMSA)
    assert host.kernel.memory.pinned == 8
    vm.close()
    host.process.munmap(memory, 16 * PAGE)
    assert (host.table(), host.free, host.guests, host.kernel.memory.pinned) == (before, free, 0, 0)
    assert host.kernel.kvm.asids.reclaimable.nonzero()[0].tolist() == [1]


def test_private_slots_of_the_series_are_filled_from_their_shared_side() -> None:
    host = Host("rfc-v7")
    vm = host.vm(DEFAULT)
    vm.op(0)
    shared, _ = vm.add_private_memory(8)
    text = bytes(range(256)) * 64
    host.process.store(shared, text)
    start(vm)
    update(vm, shared + PAGE, 2 * PAGE)
    assert vm.vm.is_private(range(4)).tolist() == [False, True, True, False]
    assert host.process.load(shared, 4 * PAGE) == text, "the shared side stays as it was"
    binding: Any = vm.private
    frame = int(binding.file.pages.peek(range(2, 3))[0])
    assert host.system.machine.encryption.read(vm.vm.asid, frame << 12, PAGE) == text[2 * PAGE : 3 * PAGE]
    with refused(errno.EINVAL):
        update(vm, 0x5000, PAGE)


def test_much_memory_is_few_commands() -> None:
    host = Host(installed=256 * MIB)
    vm, memory = sev_vm(host, pages=2048)
    start(vm)
    recorder = host.system.record()
    update(vm, memory, 2048 * PAGE)
    names = [getattr(event, "name", "") for event in recorder.events]
    assert names.count("LAUNCH_UPDATE_DATA") <= 4
