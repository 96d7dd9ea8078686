"""Two kernels and what they do with private memory, the RMP and its faults, seen from outside.

As in `test_eras`, what is expected stands here by hand, from the documents: rfc-v7, mainline.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.host.page_fault import Oops, Sigbus, store_as_kernel
from snpbook.host.refusal import KernelError
from snpbook.spec.process import Advice
from tests.host.era_probes import OK, V7, Observed, Probes, new_guest, tried, world
from tests.host.race_world import drive, host_of
from tests.host.sev_hosts import DEFAULT, MIB, PAGE, SEV, Host

probe = Probes()


@probe("sev_private_memory", v7=OK, mainline=errno.EINVAL)
def _(era: str) -> Observed:
    host, _ = host_of(era)
    vm = host.vm(DEFAULT if era == V7 else SEV)
    vm.op(0 if era == V7 else 22, bytes(48))
    return tried(lambda: vm.add_private_memory(4))


@probe("private_pages_zeroed", v7=b"\xaa" * 8, mainline=bytes(8))
def _(era: str) -> Observed:
    """Memory that another process has left: a guest without encryption reads what its private page holds."""
    host, _ = host_of(era)
    vm = host.vm(DEFAULT if era == V7 else 1)
    vm.add_private_memory(4)
    vcpu = vm.create_vcpu()
    dirty = [host.process.mmap(PAGE) for _ in range(512)]
    for address in dirty:
        host.process.store(address, b"\xaa" * PAGE)
    for address in dirty:
        host.process.munmap(address, PAGE)
    vm.make_private(range(4))

    async def program(cpu: GuestCpu) -> bytes:
        data: bytes = await cpu.read(PAGE, 8)
        return data

    executor = vm.vm.vcpus[0].executor
    executor.start(program)
    drive(host.process.calling(vcpu, 0xAE80))
    return executor.outcome


@probe("rmp_at_attributes", v7=512, mainline=0)
def _(era: str) -> Observed:
    """Free memory that setting the attribute takes: a page for each. The RMP itself is not in a process's reach."""
    host, _ = host_of(era)
    vm = new_guest(host)
    vm.add_private_memory(512)
    before = host.kernel.memory.free
    vm.make_private(range(512))
    return before - host.kernel.memory.free


@probe("private_fault_errors", v7=errno.ELOOP, mainline=errno.ENOMEM)
def _(era: str) -> Observed:
    """Memory is full when a private page is first touched: the guest of v7 faults for ever, which the model ends."""
    made = world(era)
    made.punch(range(2, 4))

    async def program(cpu: GuestCpu) -> None:
        await cpu.pvalidate(3 * PAGE, 1)

    made.executor.start(program)
    taken = made.kernel.memory.take(made.kernel.memory.free)
    try:
        return drive(made.running())
    finally:
        for page in taken.tolist():
            made.kernel.memory.release(range(page, page + 1))


# The RMP.


@probe("rmp_2m", v7=[0], mainline=[6])
def _(era: str) -> Observed:
    """PVALIDATE of 2 MB, on a host whose files have huge pages: 6 is a size mismatch, the entry is of 4 KB."""
    host = Host(era)
    host.kernel.shmem_huge = True
    vm = new_guest(host)
    shared, _ = vm.add_private_memory(1024)
    vcpu = vm.create_vcpu()
    host.process.store(shared + 2 * MIB, bytes(PAGE))
    vm.snp_start()
    if era == V7:
        vm.snp_update_v7(shared + 2 * MIB, PAGE)
    else:
        vm.make_private(range(512, 513))
        vm.snp_update(512, shared + 2 * MIB, PAGE)
    vm.snp_finish()
    vm.make_private(range(512))

    async def program(cpu: GuestCpu) -> list[int]:
        codes, _ = await cpu.pvalidate(0, 1, large=True)
        return [int(code) for code in codes]

    executor = vm.vm.vcpus[0].executor
    executor.start(program)
    drive(host.process.calling(vcpu, 0xAE80))
    return executor.outcome


@probe(
    "direct_map",
    v7=("#PF: error_code(0x0002) - not-present page", OK),
    mainline=("#PF: error_code(0x80000003) - RMP violation", OK),
)
def _(era: str) -> Observed:
    """The kernel writes where a launched page is, which it says in its log, and again when the page is its own."""
    made = world(era)
    spa = int(made.vm.private.pages.peek(range(1))[0]) * PAGE
    with pytest.raises(Oops):
        store_as_kernel(made.kernel, spa, b"x")
    told = [line for line in made.kernel.log.lines if "error_code" in line][-1]
    made.punch(range(1))
    return told, tried(lambda: store_as_kernel(made.kernel, spa, b"x"))


@probe("host_rmp_fault_handled", v7=("stored", "SIGBUS"), mainline=(errno.EFAULT, errno.EFAULT))
def _(era: str) -> Observed:
    """A process writes beside an assigned page of a huge page of its own, then to that page."""
    host = Host(era)
    address = host.process.mmap(2 * MIB)
    host.process.madvise(address, 2 * MIB, Advice.HUGEPAGE)
    host.process.store(address, bytes(PAGE))
    frame = host.process.space.frames(range(address // PAGE, address // PAGE + 1))
    assert not host.kernel.cpu.rmpupdate(frame, np.zeros(1, np.uint64), NewState(assigned=True, asid=3)).any()

    def ends(place: int) -> Observed:
        try:
            host.process.store(place, b"x")
        except Sigbus:
            return "SIGBUS"
        except KernelError as error:
            return error.errno
        return "stored"

    return ends(address + 5 * PAGE), ends(address)


@pytest.mark.parametrize("name", list(probe))
def test_probe(name: str) -> None:
    probe.check(name)
