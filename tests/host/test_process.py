"""The kernel's surface: descriptors, open, the conventions of ioctl, limits, and the end of a process."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.host.files import Argument, Call, File
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Step, Steps
from snpbook.spec.process import Capability
from snpbook.trace import Ioctl, SystemCall
from tests.host.sev_hosts import CREATE_VCPU, CREATE_VM, MIB, PAGE, SEV, Host, refused
from tests.host.vms import ERAS, memory_map, new_vm

REG_REGION, UNREG_REGION = 0x8010AEBB, 0x8010AEBC
RUN, MMAP_SIZE = 0xAE80, 0xAE04
SHARED, PRIVATE, FIXED, ANONYMOUS = 1, 2, 0x10, 0x20


class Probe(File):
    """A file whose one ioctl copies in and out."""

    device = "probe"

    def __init__(self) -> None:
        super().__init__()
        self.released, self.admitted = list[bool](), True
        self.seen = b""

    def admit(self, process: Process) -> None:
        if not self.admitted:
            raise KernelError(errno.EIO, "admitted")

    def calls(self) -> Mapping[int, Call]:
        return {1: Call("SWAP", _swap), 2: Call("FAIL", _fail), 3: Call("SLOW", _slow), 4: Call("NUMBER", _number)}

    def release(self) -> None:
        self.released.append(True)


def _swap(file: Probe, process: Process, argument: Argument) -> int:
    data = argument.read(8)
    argument.write(data[::-1])
    return 7


def _fail(file: Probe, process: Process, argument: Argument) -> int:
    argument.write(b"\xff" * 4)
    raise KernelError(errno.EBUSY, "always")


def _slow(file: Probe, process: Process, argument: Argument) -> Steps[int]:
    yield Step("first")
    argument.write(b"slow")
    yield Step("second")
    return 0


def _number(file: Probe, process: Process, argument: Argument) -> int:
    return argument.number if not argument.null else 99


@cache
def host_of_all() -> Host:
    """One host for all examples and tests that leave it as it was."""
    return Host()


@pytest.fixture
def host() -> Host:
    return host_of_all()


@pytest.fixture
def process(host: Host) -> Iterator[Process]:
    process = host.kernel.process()
    yield process
    process.exit()


# Descriptors.


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=40))
def test_the_lowest_free_number(steps: list[tuple[bool, int]]) -> None:
    process, model = host_of_all().kernel.process(), dict[int, Probe]()
    for opens, number in steps:
        if opens:
            file = Probe()
            expected = min(set(range(3, 60)) - set(model))
            assert process.install(file) == expected
            model[expected] = file
        elif number in model:
            process.close(number)
            assert model.pop(number).released == [True]
        else:
            with refused(errno.EBADF):
                process.close(number)
    for number, file in model.items():
        assert process.file(number) is file
        assert not file.released


def test_the_last_reference_releases(process: Process) -> None:
    file = Probe()
    first, second = process.install(file), process.install(file)
    other = process.kernel.process()
    third = other.install(file)
    process.close(first)
    other.exit()
    assert not file.released
    with refused(errno.EBADF):
        other.file(third)
    process.close(second)
    assert file.released == [True]


def test_no_descriptor_is_ebadf_everywhere(process: Process) -> None:
    for call in (
        lambda: process.close(9),
        lambda: process.ioctl(9, 1),
        lambda: process.mmap(PAGE, flags=SHARED, fd=9),
        lambda: process.ftruncate(9, PAGE),
        lambda: process.fallocate(9, 0, 0, PAGE),
        lambda: process.fstat(9),
        lambda: process.read(9, 1),
        lambda: process.write(9, b""),
        lambda: process.pread(9, 1, 0),
        lambda: process.pwrite(9, b"", 0),
    ):
        with refused(errno.EBADF):
            call()


def test_what_a_device_cannot_do(process: Process) -> None:
    fd = process.open("/dev/kvm")
    for number, call in (
        (errno.EINVAL, lambda: process.read(fd, 1)),
        (errno.EINVAL, lambda: process.write(fd, b"x")),
        (errno.ENODEV, lambda: process.mmap(PAGE, flags=SHARED, fd=fd)),
        (errno.EINVAL, lambda: process.ftruncate(fd, PAGE)),
        (errno.ENODEV, lambda: process.fallocate(fd, 0, 0, PAGE)),
        (errno.EINVAL, lambda: process.ioctl(fd, 0x1234)),
    ):
        with refused(number):
            call()


def test_open(host: Host) -> None:
    process = host.kernel.process()
    with refused(errno.ENOENT):
        process.open("/dev/sgx_enclave")
    other = host.kernel.process(root=False)
    for path in ("/dev/sev", "/dev/kvm"):
        assert process.open(path, os.O_RDONLY) >= 3
        with refused(errno.EACCES):
            other.open(path)
    assert process.file(3).flags == os.O_RDONLY


# ioctl.


def test_a_bytearray_is_changed_in_place_also_by_a_failure(process: Process) -> None:
    fd = process.install(Probe())
    buffer = bytearray(b"abcdefgh-rest")
    assert process.ioctl(fd, 1, buffer) == 7
    assert buffer == b"hgfedcba-rest"
    with refused(errno.EBUSY):
        process.ioctl(fd, 2, buffer)
    assert buffer == b"\xff\xff\xff\xffdcba-rest"


def test_bytes_come_back_changed(process: Process) -> None:
    fd = process.install(Probe())
    given_ = b"abcdefgh"
    assert process.ioctl(fd, 1, given_) == b"hgfedcba"
    assert given_ == b"abcdefgh"
    with refused(errno.EFAULT):
        process.ioctl(fd, 1, b"short")


def test_a_number_may_be_an_address(process: Process) -> None:
    fd = process.install(Probe())
    assert process.ioctl(fd, 4, 5) == 5
    assert process.ioctl(fd, 4) == 99, "no argument is a null one"
    address = process.mmap(2 * PAGE)
    process.store(address + PAGE - 4, b"abcdefgh")
    assert process.ioctl(fd, 1, address + PAGE - 4) == 7
    assert process.load(address + PAGE - 4, 8) == b"hgfedcba"
    for bad in (1, address + 2 * PAGE - 4, address - 4, 2**64 - 4, -8):
        with refused(errno.EFAULT):
            process.ioctl(fd, 1, bad)
    assert process.load(address + 2 * PAGE - 4, 4) == bytes(4)


def test_who_may_call_comes_before_the_number(process: Process) -> None:
    file = Probe()
    fd = process.install(file)
    with refused(errno.ENOTTY):
        process.ioctl(fd, 77)
    file.admitted = False
    for number in (1, 77):
        with refused(errno.EIO):
            process.ioctl(fd, number, b"abcdefgh")


def test_a_call_holds_its_file(process: Process) -> None:
    file = Probe()
    fd, buffer = process.install(file), bytearray(4)
    steps = process.calling(fd, 3, buffer)
    assert next(steps).name == "first"
    process.close(fd)
    assert not file.released
    assert [step.name for step in steps] == ["second"]
    assert buffer == b"slow"
    assert file.released == [True]


def test_every_call_is_told_with_its_errno(host: Host, process: Process) -> None:
    log, fd = host.system.record(), process.install(Probe())
    process.ioctl(fd, 1, b"abcdefgh")
    for number in (2, 77):
        with pytest.raises(KernelError):
            process.ioctl(fd, number, b"abcdefgh")
    with pytest.raises(KernelError):
        process.munmap(1, PAGE)
    assert [(event.device, event.name, event.errno) for event in log.of(Ioctl)] == [
        ("probe", "SWAP", 0), ("probe", "FAIL", errno.EBUSY), ("probe", "0x4d", errno.ENOTTY),
    ]  # fmt: skip
    assert [(event.name, event.errno) for event in log.of(SystemCall)] == [("munmap", errno.EINVAL)]


# Another process, and a VM that is no more.


@ERAS
def test_a_vm_is_its_own_processs(era: str) -> None:
    host = Host(era)
    vm, other = new_vm(host, 8), host.kernel.process()
    vcpu = vm.create_vcpu()
    for fd, number in ((vm.fd, CREATE_VCPU), (vm.fd, 0x77), (vcpu, RUN), (vcpu, 0x77)):
        theirs = other.install(host.process.file(fd))
        with refused(errno.EIO):
            other.ioctl(theirs, number, 1)
    vm.vm.bug("a test says so")
    assert "kvm: a test says so" in host.kernel.dmesg
    for fd, number in ((vm.fd, CREATE_VCPU), (vm.fd, 0x77), (vcpu, RUN)):
        with refused(errno.EIO):
            host.process.ioctl(fd, number, 1)
    host.process.exit()
    assert host.kernel.kvm.vms, "the other process's descriptors hold it"
    other.exit()
    assert not host.kernel.kvm.vms


# Limits.


def _region(host: Host, process: Process, fd: int, address: int, size: int, call: int = REG_REGION) -> None:
    process.ioctl(fd, call, struct.pack("<QQ", address, size))


@pytest.mark.parametrize("capable", [False, True])
def test_registered_regions_count_against_the_limit(capable: bool) -> None:
    host = Host()
    capabilities = [Capability.IPC_LOCK] if capable else []
    process = host.kernel.process(root=False, capabilities=capabilities, memlock=8 * PAGE)
    kvm = process.install(host.process.file(host.kvm_fd))
    sev = process.install(host.process.file(host.sev_fd))
    vm = process.ioctl(kvm, CREATE_VM, SEV)
    scratch = process.mmap(PAGE)
    process.store(scratch, bytes(64))
    process.ioctl(vm, 0xC008AEBA, struct.pack("<IIQII", 22, 0, scratch, 0, sev))
    memory, before = process.mmap(16 * PAGE), memory_map(host.system)
    _region(host, process, vm, memory, 6 * PAGE)
    _region(host, process, vm, memory + 100, PAGE)  # two pages, one of them a second time
    assert process.locked == 8 * PAGE
    assert host.kernel.memory.pinned == 6
    if not capable:
        with refused(errno.ENOMEM):
            _region(host, process, vm, memory + 6 * PAGE, 1)
        assert host.kernel.memory.pinned == 6
    else:
        _region(host, process, vm, memory + 6 * PAGE, 1)
        assert process.locked == 9 * PAGE
        _region(host, process, vm, memory + 6 * PAGE, 1, UNREG_REGION)
    with refused(errno.EINVAL):
        _region(host, process, vm, memory, 5 * PAGE, UNREG_REGION)
    _region(host, process, vm, memory + 100, PAGE, UNREG_REGION)
    assert process.locked == 6 * PAGE
    process.munmap(memory, 16 * PAGE)
    assert host.kernel.memory.pinned == 6, "pages without a mapping stay where they are"
    assert host.kernel.memory.allocated >= before[2] + 6
    process.exit()
    assert host.kernel.memory.pinned == process.locked == 0


def test_a_region_that_names_a_page_twice_pins_it_twice() -> None:
    """Two mappings of one page side by side: unpinned as often, it is free once."""
    host = Host()
    before, process = memory_map(host.system), host.kernel.process()
    kvm, sev = process.open("/dev/kvm"), process.open("/dev/sev")
    vm = process.ioctl(kvm, CREATE_VM, SEV)
    scratch = process.mmap(PAGE)
    process.store(scratch, bytes(64))
    process.ioctl(vm, 0xC008AEBA, struct.pack("<IIQII", 22, 0, scratch, 0, sev))
    room = process.mmap(2 * PAGE)
    fd = process.memfd_create()
    process.ftruncate(fd, PAGE)
    for page in (0, 1):
        process.mmap(PAGE, flags=SHARED | FIXED, fd=fd, address=room + page * PAGE)
    process.store(room, b"once")
    assert process.load(room + PAGE, 4) == b"once"
    _region(host, process, vm, room, 2 * PAGE)
    assert host.kernel.memory.pinned == 1
    process.munmap(room, 2 * PAGE)
    process.close(fd)
    _region(host, process, vm, room, 2 * PAGE, UNREG_REGION)
    process.exit()
    assert memory_map(host.system)[1:] == before[1:]


# The end.


def test_a_mapped_vcpu_lives_on_without_its_descriptor() -> None:
    """kvm_run stays readable, and the VM alive, until the mapping goes."""
    host = Host()
    before = memory_map(host.system)
    process = host.kernel.process()
    kvm = process.open("/dev/kvm")
    vm = process.ioctl(kvm, CREATE_VM, 0)
    vcpu = process.ioctl(vm, CREATE_VCPU, 0)
    size = process.ioctl(kvm, MMAP_SIZE)
    shared = process.mmap(size, flags=SHARED, fd=vcpu)
    process.close(vm)
    process.close(vcpu)
    process.store(shared + 100, b"still there")
    assert process.load(shared + 100, 11) == b"still there"
    process.munmap(shared, PAGE)
    assert host.kernel.kvm.vms, "a part of the mapping is left"
    process.munmap(shared, size)
    assert not host.kernel.kvm.vms
    process.exit()
    assert memory_map(host.system) == before


@ERAS
def test_exit_gives_everything_back(era: str) -> None:
    host = Host(era)
    host.process.exit()
    before = memory_map(host.system)
    host.process = host.kernel.process()
    host.sev_fd, host.kvm_fd = host.process.open("/dev/sev"), host.process.open("/dev/kvm")
    host.scratch = host.process.mmap(16 * PAGE)
    process, vm = host.process, new_vm(host)
    vcpu = vm.create_vcpu()
    process.mmap(3 * PAGE, flags=SHARED, fd=vcpu)
    fd = process.memfd_create()
    process.ftruncate(fd, MIB)
    for flags in (PRIVATE | ANONYMOUS, SHARED | ANONYMOUS):
        process.store(process.mmap(MIB, flags=flags), b"x" * MIB)
    process.store(process.mmap(MIB, flags=SHARED, fd=fd), b"x" * MIB)
    process.fallocate(fd, 0, 0, MIB)
    vm.snp_start()
    vm.make_private(range(64))
    assert host.kernel.memory.allocated > before[2] + 3 * MIB // PAGE
    process.exit()
    assert memory_map(host.system) == before
    assert repr(process) == "Process(0 descriptors, AddressSpace(0 mappings, 0 pages))"
    process.exit()
