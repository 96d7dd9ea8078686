"""tools/testing/selftests/kvm/pre_fault_memory_test.c: a slot of 2 MiB and a page, shared and private."""

import errno
import struct

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from tests.host.selftests.harness import (
    DEFAULT_VM,
    EXIT_HLT,
    GUEST_MEMFD,
    MIB,
    PAGE,
    PRE_FAULT,
    SW_PROTECTED_VM,
    Host,
    Vcpu,
    fails,
)

GPA, SIZE = 1 << 32, 2 * MIB + PAGE


def pre_fault(vcpu: Vcpu, offset: int, size: int, error: int, left: int) -> None:
    """The call again for what is left, as long as it succeeds: how it ends, and what is left then."""
    gpa = GPA + offset
    while True:
        data = bytearray(struct.pack("<QQQ40x", gpa, size, 0))
        try:
            vcpu.host.process.ioctl(vcpu.fd, PRE_FAULT, data)
            result = 0
        except OSError as failure:
            result = failure.errno or 0
        before, (gpa, size) = size, struct.unpack_from("<QQ", data)
        if result or not size or before == size:
            break
    assert (result, size) == (error, left)


@pytest.mark.parametrize(("kind", "private"), [(DEFAULT_VM, False), (SW_PROTECTED_VM, False), (SW_PROTECTED_VM, True)])
def test_pre_fault_memory(kind: int, private: bool) -> None:
    host = Host()
    vm = host.vm(kind)
    vcpu = host.vcpu(vm)
    flags, fd = (GUEST_MEMFD, host.memfd(vm, SIZE)) if private else (0, 0)
    host.region2(vm, 1, GPA, SIZE, host.mmap(SIZE), flags=flags, fd=fd)
    if private:
        host.attributes(vm, GPA, SIZE)
    pre_fault(vcpu, 0, 2 * MIB, 0, 0)
    absent = errno.ENOENT
    pre_fault(vcpu, 2 * MIB, 2 * PAGE, absent, PAGE)
    pre_fault(vcpu, SIZE, PAGE, absent, PAGE)

    async def program(cpu: GuestCpu) -> str:
        for offset in range(0, SIZE, PAGE):
            await cpu.read(GPA + offset, 1)
        return "done"

    vcpu.program(program)
    assert vcpu.run() == EXIT_HLT
    assert vcpu.outcome == "done"


def test_bad_ranges() -> None:
    host = Host()
    vm = host.vm()
    vcpu = host.vcpu(vm)
    host.region2(vm, 1, GPA, SIZE, host.mmap(SIZE))
    wrapping = -PAGE & (1 << 64) - 1
    bad = [(GPA + 1, PAGE, 0), (GPA, PAGE + 1, 0), (GPA, 0, 0), (GPA, PAGE, 1), (wrapping, 2 * PAGE, 0)]
    for gpa, size, flags in bad:
        with fails(errno.EINVAL):
            host.process.ioctl(vcpu.fd, PRE_FAULT, struct.pack("<QQQ40x", gpa, size, flags))
