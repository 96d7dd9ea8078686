"""tools/testing/selftests/kvm/x86_64/sev_migrate_tests.c, whose threads are here every order of the locks' steps."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.host.steps import Steps
from tests.host.scheduler import DeadlockError, Run, interleavings
from tests.host.selftests.harness import DEFAULT_VM, ENABLE_CAP, Vcpu, fails
from tests.host.selftests.sev import COPY_FROM, ES, ES_INIT, INIT, MOVE_FROM, UPDATE_VMSA, SevHost

NR_VCPUS = 4
MIRROR_COMMANDS = (4, 16, 17, 18)


class Vms(SevHost):
    """sev_vm_create and aux_vm_create, and their end."""

    def __init__(self) -> None:
        super().__init__()
        self._vcpus: dict[int, list[Vcpu]] = {}

    def aux(self, vcpus: int = NR_VCPUS) -> int:
        vm = self.vm(DEFAULT_VM)
        self._vcpus[vm] = [self.vcpu(vm, number) for number in range(vcpus)]
        return vm

    def sev_vm(self, es: bool, vcpus: int = NR_VCPUS, updated: bool = True) -> int:
        vm = self.vm(DEFAULT_VM)
        self.op(vm, ES_INIT if es else INIT)
        self._vcpus[vm] = [self.vcpu(vm, number) for number in range(vcpus)]
        self.start(vm, ES if es else 0)
        if es and updated:
            self.op(vm, UPDATE_VMSA)
        return vm

    def add_vcpus(self, vm: int) -> None:
        self._vcpus[vm] += [self.vcpu(vm, number) for number in range(NR_VCPUS)]

    def move(self, to: int, source: int) -> None:
        self.enable(to, MOVE_FROM, source)

    def mirror(self, to: int, source: int) -> None:
        self.enable(to, COPY_FROM, source)

    def moving(self, to: int, source: int, cap: int = MOVE_FROM) -> Steps[int]:
        return self.process.calling(to, ENABLE_CAP, bytearray(struct.pack("<IIQ", cap, 0, source).ljust(0x68, b"\0")))

    def free(self, vm: int) -> None:
        """kvm_vm_free."""
        for vcpu in self._vcpus.pop(vm):
            vcpu.free()
        self.process.close(vm)

    def left(self) -> tuple[int, int]:
        """VMs of the kernel, and guests that the firmware still has."""
        return len(self.system.host.kvm.vms), len(self.system.processor.legacy.guests)


@pytest.fixture
def host() -> Vms:
    return Vms()


@pytest.mark.parametrize("es", [False, True], ids=["sev", "sev_es"])
def test_sev_migrate_from(host: Vms, es: bool) -> None:
    source, targets = host.sev_vm(es), [host.aux() for _ in range(3)]
    at = source
    for target in targets:
        host.move(target, at)
        at = target
    with fails(errno.EIO):
        host.move(source, targets[-1])
    for vm in (source, *targets):
        host.free(vm)
    assert host.left() == (0, 0)


PAIRS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "circle": lambda n: [(i, (i + 1) % n) for i in range(n)],
    "to and fro": lambda n: [(i, (i + 1) % n) for i in range(n - 1)] + [(1, 0)],
    "from one": lambda n: [(i, 0) for i in range(1, n)],
    "to one": lambda n: [(0, i) for i in range(1, n)],
}


@pytest.mark.parametrize("cap", [MOVE_FROM, COPY_FROM], ids=["move", "mirror"])
@pytest.mark.parametrize("pairs", list(PAIRS))
def test_sev_migrate_locking(pairs: str, cap: int) -> None:
    """locking_test_thread, three threads on three SEV VMs: crossing moves in every order, and nobody waits for ever.

    As in the C file every move is refused, the VMs being SEV guests all; nothing stays claimed or locked.
    """
    host = Vms()
    vms = [host.sev_vm(False, vcpus=1) for _ in range(3)]
    wanted = PAIRS[pairs](3)

    def world() -> tuple[None, list[Steps[int]]]:
        return None, [host.moving(vms[to], vms[source], cap) for to, source in wanted]

    outcomes, count = set(), 0
    for _, run in interleavings(world):
        outcomes |= set(run.outcome)
        count += 1
    assert count >= 8, "the moves mix"
    assert outcomes == {-errno.EBUSY, -errno.EINVAL}
    for to, source in wanted:
        with fails(errno.EINVAL):
            host.enable(vms[to], cap, vms[source])


@pytest.mark.parametrize("sources", [1, 2])
def test_moves_that_could_succeed(sources: int) -> None:
    """Two moves away from one guest, or one of two to a third: in every order one has it, and no key is lost."""

    def world() -> tuple[Vms, list[Steps[int]]]:
        host = Vms()
        guests = [host.sev_vm(False, vcpus=0) for _ in range(sources)]
        free = [host.aux(vcpus=0) for _ in range(3 - sources)]
        pairs = [(to, source) for to in free for source in guests]
        return host, [host.moving(to, source) for to, source in pairs]

    def check(host: Vms, run: Run) -> None:
        guests = [vm for vm in host.system.host.kvm.vms if vm.sev is not None]
        assert len(guests) == sources
        assert len({vm.asid for vm in guests}) == sources
        assert run.outcome.count(0) <= 1
        assert set(run.outcome) <= {0, -errno.EBUSY, -errno.EIO, -errno.EINVAL}
        assert not any(vm.migrating or vm.lock.held for vm in host.system.host.kvm.vms)

    winners = set()
    for host, run in interleavings(world):
        check(host, run)
        winners |= {number for number, result in run.results.items() if result == 0}
    assert winners == {0, 1}


def test_the_scheduler_would_see_a_deadlock(host: Vms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the claims before the locks two crossing moves do wait for each other."""
    from contextlib import ExitStack

    from snpbook.host.kvm import migration

    def locked(vm: Any, source: Any) -> Any:
        with ExitStack() as held:
            held.enter_context((yield from vm.lock.hold()))
            held.enter_context((yield from source.lock.hold()))
            return held.pop_all()

    monkeypatch.setattr(migration, "_both", locked)
    one, two = (host.sev_vm(False, vcpus=0) for _ in range(2))
    with pytest.raises(DeadlockError, match=r"lock kvm->lock"):
        list(interleavings(lambda: (None, [host.moving(one, two), host.moving(two, one)])))


def test_sev_migrate_parameters(host: Vms) -> None:
    sev, es, plain, unencrypted = host.sev_vm(False), host.sev_vm(True), host.aux(), host.sev_vm(True, updated=False)
    few = host.aux(vcpus=2)
    for to, source in ((es, sev), (sev, es), (few, es), (host.aux(), unencrypted), (host.aux(), plain), (plain, plain)):
        with fails(errno.EINVAL):
            host.move(to, source)


@pytest.mark.parametrize("es", [False, True], ids=["sev", "sev_es"])
def test_sev_mirror(host: Vms, es: bool) -> None:
    source, mirror = host.sev_vm(es), host.aux(vcpus=0)
    host.mirror(mirror, source)
    host.add_vcpus(mirror)
    if es:
        host.op(mirror, UPDATE_VMSA)
    for number in set(range(103)) - set(MIRROR_COMMANDS):
        with fails(errno.EINVAL):
            host.op(mirror, number, bytes(0x60))
    assert host.state(mirror) == 1
    host.free(source)
    assert host.state(mirror) == 1
    host.free(mirror)
    assert host.left() == (0, 0)


def test_sev_mirror_parameters(host: Vms) -> None:
    sev, es, none, with_vcpus = host.sev_vm(False), host.sev_vm(True), host.aux(vcpus=0), host.aux()
    for to, source in ((sev, sev), (sev, es), (es, sev), (none, with_vcpus), (none, none)):
        with fails(errno.EINVAL):
            host.mirror(to, source)
    for source in (sev, es):
        with fails(errno.EINVAL):
            host.mirror(with_vcpus, source)


@pytest.mark.parametrize("first", ["mirror", "owner"])
@pytest.mark.parametrize("ends", ["mirror", "owner"])
def test_sev_move_copy(host: Vms, first: str, ends: str) -> None:
    """A mirror and its owner move on in turn; they end in either order, and nothing is left."""
    vms = {"owner": host.sev_vm(False), "mirror": host.aux(vcpus=0)}
    host.mirror(vms["mirror"], vms["owner"])
    order = ("mirror", "owner") if first == "mirror" else ("owner", "mirror")
    for _ in range(2):
        for name in order:
            old, vms[name] = vms[name], host.aux(vcpus=0)
            host.move(vms[name], old)
            host.free(old)
    for vm in vms.values():
        assert host.state(vm) == 1
    host.free(vms.pop(ends))
    (last,) = vms.values()
    assert host.state(last) == 1
    host.free(last)
    assert host.left() == (0, 0)
    assert host.system.host.memory.pinned == 0
