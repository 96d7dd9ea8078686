"""Intra-host migration and mirror VMs: the kernel's selftest sev_migrate_tests.c, and its checks one by one."""

from __future__ import annotations

import errno
import struct
from itertools import product
from typing import Any

import pytest

from snpbook.host.refusal import KernelError
from snpbook.host.steps import Steps
from tests.host.sev_hosts import (
    COPY_FROM,
    DEFAULT,
    ENABLE_CAP,
    MOVE_FROM,
    PAGE,
    SEV,
    SNP,
    STRANGE,
    Handle,
    Host,
    refused,
)
from tests.host.test_sev_legacy import UPDATE_VMSA, start, status

MIRROR_OPS = (4, 16, 17, 18)
VCPUS = 4


def guest(host: Host, es: bool, vcpus: int = VCPUS, encrypt: bool = True) -> Handle:
    """sev_vm_create: launched so far that its registers are taken."""
    vm = host.vm(DEFAULT)
    vm.op(int(es))
    for number in range(vcpus):
        vm.create_vcpu(number)
    start(vm, 4 * es)
    if es and encrypt:
        vm.op(UPDATE_VMSA)
    return vm


def aux(host: Host, vcpus: int = VCPUS) -> Handle:
    """aux_vm_create: of the default type, without SEV."""
    vm = host.vm(DEFAULT)
    for number in range(vcpus):
        vm.create_vcpu(number)
    return vm


def moving(target: Handle, source: Handle, cap: int = MOVE_FROM) -> Steps[int]:
    request = bytearray(struct.pack("<IIQ", cap, 0, source.fd).ljust(0x68, b"\0"))
    return target.host.process.calling(target.fd, ENABLE_CAP, request)


@pytest.fixture
def host() -> Host:
    return Host()


# test_sev_migrate_from


@pytest.mark.parametrize("es", [False, True])
def test_a_chain_of_moves_and_none_back(host: Host, es: bool) -> None:
    source, targets = guest(host, es), [aux(host) for _ in range(3)]
    asid, area = source.vm.asid, source.vm.vcpus[0].vmsa
    at = source
    for target in targets:
        target.enable(MOVE_FROM, at.fd)
        at = target
    with refused(errno.EIO):
        source.enable(MOVE_FROM, at.fd)
    assert (at.vm.asid, host.kernel.kvm.asids.charged["sev_es" if es else "sev"]) == (asid, 1)
    for number, vcpu in at.vm.vcpus.items():
        control = at.vmcb(number)
        assert (control.asid, control.sev, control.sev_es) == (asid, 1, int(es))
        assert vcpu.encrypted == es
        if es:
            assert control.vmsa_pa == vcpu.vmsa
    if es:
        assert at.vm.vcpus[0].vmsa == area
    assert status(at)[0] == 1
    for vm in (*targets, source):
        vm.close()
    assert host.guests == 0
    assert host.kernel.kvm.asids.reclaimable.sum() == 1


def test_pins_move_along(host: Host) -> None:
    source, target = guest(host, False), aux(host)
    memory = host.process.mmap(8 * PAGE)
    host.process.ioctl(source.fd, 0x8010AEBB, bytearray(struct.pack("<QQ", memory, 8 * PAGE)))
    target.enable(MOVE_FROM, source.fd)
    source.close()
    assert host.kernel.memory.pinned == 8
    target.close()
    assert host.kernel.memory.pinned == host.process.locked == 0


# test_sev_migrate_locking


def outcomes(tasks: list[Steps[int]], order: Any) -> list[int]:
    """Run tasks in steps, the next one as `order` says: the errno of each. A task that waits is passed over."""
    waiting: dict[int, Any] = {}
    alive, results = dict(enumerate(tasks)), [-1] * len(tasks)
    while alive:
        ready = [number for number in alive if number not in waiting or not waiting[number].blocked]
        assert ready, "a deadlock"
        number = ready[next(order) % len(ready)]
        try:
            waiting[number] = next(alive[number])
        except StopIteration:
            results[number] = 0
            del alive[number]
        except KernelError as error:
            results[number] = error.errno or 0
            del alive[number]
    return results


def sequence(digits: tuple[int, ...]) -> Any:
    yield from digits
    while True:
        yield 0


@pytest.mark.parametrize("cap", [MOVE_FROM, COPY_FROM])
def test_crossing_moves_never_wait_for_each_other(cap: int) -> None:
    """Every order of the steps of two moves between two guests, each the other's source."""
    host, seen = Host(), set()
    one, two = guest(host, False), guest(host, False)
    for digits in product(range(2), repeat=8):
        seen.add(tuple(outcomes([moving(one, two, cap), moving(two, one, cap)], sequence(digits))))
        assert not any(vm.vm.migrating or vm.vm.lock.held for vm in (one, two))
    assert seen == {(errno.EBUSY, errno.EBUSY), (errno.EBUSY, errno.EINVAL), (errno.EINVAL, errno.EBUSY),
                    (errno.EINVAL, errno.EINVAL)}  # fmt: skip


def test_three_moves_in_a_circle(host: Host) -> None:
    vms = [guest(host, False, vcpus=0) for _ in range(3)]
    for digits in product(range(3), repeat=6):
        tasks = [moving(vms[n], vms[(n + 1) % 3]) for n in range(3)]
        assert set(outcomes(tasks, sequence(digits))) <= {errno.EBUSY, errno.EINVAL}
        assert not any(vm.vm.migrating or vm.vm.lock.held for vm in vms)


def test_of_two_moves_from_one_source_at_most_one_succeeds() -> None:
    """And where one does, the keys are its destination's alone."""
    host, seen = Host(), set()
    source = guest(host, False, vcpus=0)
    for digits in product(range(2), repeat=7):
        targets = [aux(host, 0), aux(host, 0)]
        results = outcomes([moving(target, source) for target in targets], sequence(digits))
        seen.add(tuple(results))
        holders = [vm for vm in (source, *targets) if vm.vm.sev is not None]
        assert len(holders) == 1
        assert results.count(0) == (holders[0] is not source)
        source, others = holders[0], [vm for vm in (source, *targets) if vm is not holders[0]]
        for other in others:
            other.close()
    assert (0, errno.EBUSY) in seen
    assert (0, errno.EINVAL) in seen


def test_a_move_waits_for_a_sub_command_of_its_source(host: Host) -> None:
    source, target = guest(host, False), aux(host)
    with_lock = source.start_op(3, struct.pack("<QI4x", host.scratch + PAGE, PAGE))[1]
    while next(with_lock).name != "launch update: pages":
        pass
    move = moving(target, source)
    names = [next(move) for _ in range(3)]
    assert names[-1].blocked
    for _ in with_lock:
        pass
    assert outcomes([move], sequence(())) == [0]


# test_sev_migrate_parameters


def test_what_a_move_refuses(host: Host) -> None:
    plain, es, none = guest(host, False), guest(host, True), aux(host)
    raw = guest(host, True, encrypt=False)
    for target, source in (
        (es, plain), (plain, es), (none, aux(host)), (aux(host, 2), es), (none, raw), (none, none),
    ):  # fmt: skip
        with refused(errno.EINVAL):
            target.enable(MOVE_FROM, source.fd)
    for fd in (host.sev_fd, 99):
        with refused(errno.EBADF):
            none.enable(MOVE_FROM, fd)
    snp = host.vm(SNP)
    snp.init2()
    for target in (none, host.vm(SNP)):
        with refused(errno.EINVAL):
            target.enable(MOVE_FROM, snp.fd)
    typed = host.vm(SEV)
    with refused(errno.EINVAL):
        typed.enable(MOVE_FROM, plain.fd)
    assert not none.vm.migrating


# test_sev_mirror


@pytest.mark.parametrize("es", [False, True])
def test_a_mirror_takes_four_sub_commands(host: Host, es: bool) -> None:
    source, mirror = guest(host, es), host.vm(DEFAULT)
    mirror.enable(COPY_FROM, source.fd)
    for number in range(VCPUS):
        mirror.create_vcpu(number)
        assert mirror.vmcb(number).asid == source.vm.asid
    if es:
        mirror.op(UPDATE_VMSA)
        assert all(vcpu.encrypted for vcpu in mirror.vm.vcpus.values())
    for number in set(range(103)) - set(MIRROR_OPS):
        with refused(errno.EINVAL):
            mirror.op(number, bytes(0x48))
        assert mirror.error == STRANGE
    assert status(mirror)[0] == 1
    region = bytearray(struct.pack("<QQ", host.scratch, PAGE))
    for number in (0x8010AEBB, 0x8010AEBC):
        with refused(errno.EINVAL):
            host.process.ioctl(mirror.fd, number, region)


def test_what_a_mirror_refuses(host: Host) -> None:
    plain, es, none, mirror = guest(host, False), guest(host, True), aux(host, 0), aux(host, 0)
    mirror.enable(COPY_FROM, plain.fd)
    for target, source in (
        (none, none),
        (none, aux(host)),
        (plain, es),
        (es, plain),
        (aux(host), plain),
        (none, mirror),
    ):
        with refused(errno.EINVAL):
            target.enable(COPY_FROM, source.fd)
    for fd in (host.sev_fd, 99):
        with refused(errno.EBADF):
            none.enable(COPY_FROM, fd)


# test_sev_move_copy


@pytest.mark.parametrize("first", ["mirror", "owner"])
def test_a_mirror_and_its_owner_move_again_and_again(host: Host, first: str) -> None:
    owner, mirror = guest(host, False), host.vm(DEFAULT)
    mirror.enable(COPY_FROM, owner.fd)
    for _ in range(3):
        for which in ("mirror", "owner") if first == "mirror" else ("owner", "mirror"):
            old = mirror if which == "mirror" else owner
            new = aux(host)
            new.enable(MOVE_FROM, old.fd)
            old.close()
            if which == "mirror":
                mirror = new
            else:
                owner = new
            assert mirror.sev.mirror_of is owner.vm
        assert status(mirror)[0] == status(owner)[0] == 1


@pytest.mark.parametrize("order", ["owner first", "mirror first"])
def test_they_end_in_either_order(host: Host, order: str) -> None:
    aux(host, 0).close()
    free = host.free
    owner, mirror = guest(host, True), host.vm(DEFAULT)
    mirror.enable(COPY_FROM, owner.fd)
    mirror.create_vcpu()
    asid = owner.vm.asid
    for vm in (owner, mirror) if order == "owner first" else (mirror, owner):
        assert not host.kernel.kvm.asids.reclaimable[asid]
        vm.close()
    assert host.kernel.kvm.asids.reclaimable[asid]
    assert (host.guests, host.free, host.kernel.kvm.vms) == (0, free, [])
