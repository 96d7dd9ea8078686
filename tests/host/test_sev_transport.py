"""A SEV guest goes from one host to another: SEND_* and RECEIVE_*, with their checks and length queries."""

from __future__ import annotations

import errno
import struct

import pytest

from snpbook.spec.status import Status
from snpbook.vendor.sev_ca import SevCa
from tests.host.sev_hosts import PAGE, SET_REGION, SEV, Handle, Host, refused
from tests.host.test_sev_legacy import FINISH, MEASURE, blob, start, status, update

SEND_START, SEND_DATA, SEND_FINISH, SEND_CANCEL = 8, 9, 11, 21
RECEIVE_START, RECEIVE_DATA, RECEIVE_FINISH = 12, 13, 15
RUNNING, SUPDATE, SENT = 3, 4, 6
CERT = 2084


def guest(host: Host) -> tuple[Handle, int]:
    """An initialised guest with four pages of memory."""
    vm = host.vm(SEV)
    vm.init2()
    memory = host.process.mmap(4 * PAGE)
    host.process.ioctl(vm.fd, SET_REGION, bytearray(struct.pack("<IIQQQ", 0, 0, 0, 4 * PAGE, memory)))
    return vm, memory


def running(host: Host) -> tuple[Handle, int, bytes]:
    """A guest that has been launched with some memory."""
    vm, memory = guest(host)
    text = bytes(range(256)) * 16 * 4
    host.process.store(memory, text)
    start(vm)
    update(vm, memory, 4 * PAGE)
    blob(vm, MEASURE, host.put(bytes(0x30)), 0x30)
    vm.op(FINISH)
    return vm, memory, text


def send_start(vm: Handle, target: Host, session: int, size: int = 0x80, skip: str = "") -> tuple[int, int]:
    """SEND_START with all that the target can show: policy and session length as they come back."""
    host, (pdh, chain) = vm.host, target.certificates()
    ca = SevCa("milan")
    platform, amd = chain[: 2 * CERT] + ca.sign_cek(chain[2 * CERT :]), ca.chain
    fields: list[int] = []
    for name, data, page in (("pdh", pdh, 2), ("platform", platform, 4), ("amd", amd, 8)):
        fields += [0, 0] if name == skip else [host.put(data, page), len(data)]
    payload = struct.pack("<I4xQI4xQI4xQI4xQI4x", 0, *fields, session, size)
    back = vm.op(SEND_START, payload)
    return struct.unpack_from("<I", back)[0], struct.unpack_from("<I", back, 0x40)[0]


def packet(header: int, header_size: int, address: int, size: int, body: int, body_size: int) -> bytes:
    return struct.pack("<QI4xQI4xQI4x", header, header_size, address, size, body, body_size)


def test_a_guest_moves_page_by_page() -> None:
    source, target = Host(), Host(seed="the other chip")
    vm, memory, text = running(source)
    session, header, body = (source.put(bytes(PAGE), page) for page in (11, 12, 13))
    assert send_start(vm, target, session) == (0, 0x80)
    assert status(vm)[2] == SUPDATE
    other, there = guest(target)
    pdh = source.certificates()[0]
    keys = source.process.load(session, 0x80)
    begin = struct.pack("<IIQI4xQI4x", 0, 0, target.put(pdh, 2), CERT, target.put(keys, 3), 0x80)
    assert struct.unpack_from("<I", other.op(RECEIVE_START, begin))[0] == 1
    for at in range(0, 4 * PAGE, PAGE):
        vm.op(SEND_DATA, packet(header, 0x34, memory + at, PAGE, body, PAGE))
        data = (source.process.load(header, 0x34), source.process.load(body, PAGE))
        places = (target.put(data[0], 6), target.put(data[1], 7))
        other.op(RECEIVE_DATA, packet(places[0], 0x34, there + at, PAGE, places[1], PAGE))
    vm.op(SEND_FINISH)
    assert status(vm)[2] == SENT
    other.op(RECEIVE_FINISH)
    assert status(other)[2] == RUNNING
    frames = target.process.space.frames(range(there >> 12, (there >> 12) + 4)).tolist()
    read = target.system.machine.encryption.read
    assert b"".join(read(other.vm.asid, frame << 12, PAGE) for frame in frames) == text
    for host in (source, target):
        assert host.kernel.memory.pinned == 0


def test_a_send_can_be_cancelled() -> None:
    host = Host()
    vm, _, _ = running(host)
    session = host.put(bytes(PAGE), 11)
    send_start(vm, Host(seed="the other chip"), session)
    vm.op(SEND_CANCEL)
    assert status(vm)[2] == RUNNING
    with refused(errno.EIO, Status.INVALID_GUEST_STATE):
        vm.op(SEND_FINISH)


def test_lengths_of_0_ask_for_them() -> None:
    host = Host()
    vm, memory, _ = running(host)
    with refused(errno.EIO, Status.INVALID_LENGTH):
        vm.op(SEND_START, bytes(0x48))
    assert struct.unpack_from("<I", host.process.load(host.scratch, 0x48), 0x40)[0] == 0x80
    send_start(vm, Host(seed="the other chip"), host.put(bytes(PAGE), 11))
    for payload in (packet(0, 0, memory, PAGE, 0, PAGE), packet(0, 0x34, memory, PAGE, 0, 0)):
        with refused(errno.EIO, Status.INVALID_LENGTH):
            vm.op(SEND_DATA, payload)
        assert vm.error == Status.INVALID_LENGTH
        back = host.process.load(host.scratch, 0x30)
        assert struct.unpack_from("<I", back, 8)[0] == 0x34


def test_what_send_start_refuses() -> None:
    host, target = Host(), Host(seed="the other chip")
    vm, _, _ = running(host)
    session = host.put(bytes(PAGE), 11)
    for missing in ("pdh", "platform", "amd"):
        with refused(errno.EINVAL):
            send_start(vm, target, session, skip=missing)
    for address, size in ((0, 0x80), (session, 0x4001)):
        with refused(errno.EINVAL):
            send_start(vm, target, address, size)
    with refused(errno.EIO, Status.INVALID_LENGTH):
        send_start(vm, target, session, 0x81)


@pytest.mark.parametrize("number", [SEND_DATA, RECEIVE_DATA])
def test_packets_lie_in_one_page_and_have_addresses(number: int) -> None:
    host = Host()
    vm, memory, _ = running(host)
    good = (host.scratch, 0x34, memory, 64, host.scratch, 64)
    for place, value in ((0, 0), (2, 0), (3, 0), (4, 0), (3, PAGE + 1), (2, memory + PAGE - 32)):
        changed = [value if index == place else each for index, each in enumerate(good)]
        with refused(errno.EINVAL):
            vm.op(number, packet(*changed))


def test_receive_start_needs_certificate_and_session() -> None:
    host = Host()
    vm, memory = guest(host)
    for fields in (
        (0, CERT, memory, 0x80),
        (memory, 0, memory, 0x80),
        (memory, CERT, 0, 0x80),
        (memory, CERT, memory, 0),
    ):
        with refused(errno.EINVAL):
            vm.op(RECEIVE_START, struct.pack("<IIQI4xQI4x", 0, 0, *fields))
