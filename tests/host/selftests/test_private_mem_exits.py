"""tools/testing/selftests/kvm/x86_64/private_mem_kvm_exits_test.c: one page at 3 GiB of a SW_PROTECTED VM."""

import errno

from snpbook.hardware.guest_cpu import GuestCpu
from tests.host.selftests.harness import EXIT_MEMORY_FAULT, GUEST_MEMFD, PAGE, SW_PROTECTED_VM, Host, Vcpu, fails

GPA, SLOT = 0xC0000000, 10


async def repeatedly_read(cpu: GuestCpu) -> None:
    while True:
        await cpu.read(GPA, 1)
        await cpu.hlt()


def check_exit(vcpu: Vcpu) -> None:
    with fails(errno.EFAULT):
        vcpu.run()
    assert vcpu.reason == EXIT_MEMORY_FAULT
    assert vcpu.exit("<QQQ") == (8, GPA, PAGE)


def test_private_access_memslot_deleted() -> None:
    host = Host()
    vm = host.vm(SW_PROTECTED_VM)
    vcpu = host.vcpu(vm)
    address = host.mmap(PAGE)
    host.region2(vm, SLOT, GPA, PAGE, address, flags=GUEST_MEMFD, fd=host.memfd(vm, PAGE))
    host.attributes(vm, GPA, PAGE)
    vcpu.program(repeatedly_read)
    vcpu.run()
    host.region2(vm, SLOT, GPA, 0, 0)
    host.region2(vm, 0, 0, PAGE, host.mmap(PAGE))
    check_exit(vcpu)


def test_private_access_memslot_not_private() -> None:
    host = Host()
    vm = host.vm(SW_PROTECTED_VM)
    vcpu = host.vcpu(vm)
    host.region2(vm, SLOT, GPA, PAGE, host.mmap(PAGE))
    host.attributes(vm, GPA, PAGE)
    vcpu.program(repeatedly_read)
    check_exit(vcpu)
