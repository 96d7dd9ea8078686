"""AP creation: what is refused, when a good request takes effect, and that the new save area is what VMRUN enters."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from snpbook.spec.uapi_kvm import MpState
from tests.host.askers import CODE, INFO1, INFO2, PAGE, RAX, Asker, fails, ghcb, infos, snp

CREATION = 0x80000013
ON_INIT, CREATE, DESTROY = 0, 1, 2
VMSA_GPA, OTHER_GPA = 0x701000, 0x705000
"""Private pages of the guest, none of them at a 2 MB boundary."""
GP = 1 << 31 | 3 << 8 | 13
NO_VMSA = (1 << 64) - 1


def info(request: int, apic_id: int = 1) -> int:
    return apic_id << 32 | request


def ask(asker: Asker, request: int, gpa: int = VMSA_GPA, apic_id: int = 1, features: int = 1) -> tuple[int, int]:
    fields = {CODE: CREATION, INFO1: info(request, apic_id), INFO2: gpa, RAX: features}
    return infos(asker.page(ghcb(fields)))


async def save_area(cpu: GuestCpu, gpa: int = VMSA_GPA, **fields: int) -> None:
    """A save area as Linux makes one: registers at INIT, then RMPADJUST with the VMSA bit for VMPL1."""
    offsets = {"efer": 0x0D0, "cr0": 0x158, "rip": 0x178, "rflags": 0x170, "sev_features": 0x3B0, "vmpl": 0x0CA}
    values = {"efer": 0x1000, "cr0": 0x60000010, "rip": 0xFFF0, "rflags": 2, "sev_features": 1, **fields}
    page = bytearray(PAGE)
    for name, value in values.items():
        struct.pack_into("<B" if name == "vmpl" else "<Q", page, offsets[name], value)
    await cpu.write(gpa, bytes(page))
    codes = await cpu.rmpadjust(gpa, 1, vmpl=1, permissions=0, vmsa=True)
    assert not codes.any()


@pytest.fixture
def two() -> Asker:
    """A guest with two vCPUs, of which the second has never run."""
    return Asker(vcpus=2)


async def _hello(cpu: GuestCpu) -> tuple[int, ...]:
    found: tuple[int, ...] = await cpu.look("cr0", "sev_features")
    return found


def run_second(asker: Asker) -> Any:
    asker.number = 1
    try:
        return asker.drive(_hello)
    finally:
        asker.number = 0


# Refusals.


def refused(asker: Asker, request: int, **options: int) -> None:
    """Linux 6.12: an invalid input, and the target untouched."""
    target = asker.vmm.vcpus[-1]
    before = (target.vmsa, target.mp_state, dict(target.queued))
    assert ask(asker, request, **options) == (2, 5)
    assert (target.vmsa, target.mp_state, target.queued) == before


@pytest.mark.parametrize("request_", [ON_INIT, CREATE])
@pytest.mark.parametrize(
    "options",
    [
        {"apic_id": 7}, {"gpa": VMSA_GPA + 8}, {"gpa": 1 << 52 | VMSA_GPA}, {"gpa": 0x600000}, {"gpa": 0},
        {"features": 1 | 1 << 3}, {"features": 1 | 1 << 4},
    ],
    ids=["APIC ID", "no page", "too far", "erratum", "page 0", "restricted injection", "alternate injection"],
)  # fmt: skip
def test_refused(request_: int, options: dict[str, int]) -> None:
    refused(snp(), request_, **{"apic_id": 0, **options})


@pytest.mark.parametrize("request_", [3, 7, 1 << 16 | CREATE, 2 << 16 | DESTROY, 1 << 31])
def test_another_request(request_: int) -> None:
    """Linux compares all 32 bits: a VMPL other than 0 is an unknown request."""
    refused(snp(), request_, apic_id=0)


def test_only_the_injection_mode_of_the_features_counts(two: Asker) -> None:
    assert ask(two, CREATE, features=1 << 5 | 1 << 9) == (0, 0)


def test_destroying_asks_for_no_registers(two: Asker) -> None:
    fields = {CODE: CREATION, INFO1: info(DESTROY), INFO2: 0}
    assert infos(two.page(ghcb(fields))) == (0, 0)


# The v7 series.


def test_the_v7_series_stops_the_target_of_a_refused_request() -> None:
    asker = Asker("rfc-v7", vcpus=2)
    target = asker.vmm.vcpus[1]
    assert ask(asker, CREATE, apic_id=7) == (1, GP)
    assert not target.queued, "there is no target"
    assert ask(asker, CREATE, gpa=0x600000) == (1, GP)
    asker.number = 1
    with fails(errno.EAGAIN):
        asker.enter()
    assert (target.vmsa, target.mp_state) == (None, MpState.HALTED)
    assert target.control().vmsa_pa == NO_VMSA


def test_the_v7_series_wants_rax_also_to_destroy() -> None:
    fields = {CODE: CREATION, INFO1: info(DESTROY, 0), INFO2: 0}
    assert infos(snp("rfc-v7").page(ghcb(fields))) == (2, 4)


# Good requests.


@pytest.mark.parametrize("era", ["rfc-v7", "mainline", "svsm-host"])
def test_a_second_vcpu_starts_in_its_new_save_area(era: str) -> None:
    asker = Asker(era, vcpus=2)
    target = asker.vmm.vcpus[1]
    first = target.vmsa
    asker.number = 1
    with fails(errno.EAGAIN):
        asker.enter()
    asker.number = 0
    asker.drive(save_area)
    assert ask(asker, CREATE) == (0, 0)
    assert target.vmsa == first, "only queued"
    assert target.mp_state is MpState.RUNNABLE
    assert run_second(asker) == (0x60000010, 1)
    assert target.vmsa != first
    assert not target.queued


def test_a_save_area_for_init_waits_for_it(two: Asker) -> None:
    target = two.vmm.vcpus[1]
    first = target.vmsa
    two.drive(save_area)
    assert ask(two, ON_INIT) == (0, 0)
    two.number = 1
    with fails(errno.EAGAIN):
        two.enter()
    assert target.vmsa == first
    two.vmm.process.ioctl(two.vmm.handles[1].fd, 0x4004AE99, bytearray(b"\4\0\0\0"))  # INIT and SIPI
    assert run_second(two) == (0x60000010, 1)
    assert target.vmsa != first


def test_the_last_request_counts(two: Asker) -> None:
    two.drive(save_area)
    two.drive(lambda cpu: save_area(cpu, OTHER_GPA, cr0=0x10))
    assert ask(two, CREATE) == (0, 0)
    assert ask(two, CREATE, gpa=OTHER_GPA) == (0, 0)
    assert run_second(two) == (0x10, 1)


def test_destroyed_and_created_again(two: Asker) -> None:
    target = two.vmm.vcpus[1]
    two.drive(save_area)
    ask(two, CREATE)
    run_second(two)
    assert ask(two, DESTROY, gpa=0) == (0, 0)
    two.number = 1
    for _ in range(2):
        with fails(errno.EAGAIN):
            two.enter()
    two.number = 0
    assert (target.vmsa, target.mp_state) == (None, MpState.HALTED)
    assert ask(two, CREATE) == (0, 0)
    assert run_second(two) == (0x60000010, 1)


def test_what_is_no_save_area_fails_at_vmrun(two: Asker) -> None:
    """KVM takes any page; VMRUN refuses one without the VMSA bit."""

    async def plain(cpu: GuestCpu) -> None:
        await cpu.write(OTHER_GPA, bytes(PAGE))

    two.drive(plain)
    assert ask(two, CREATE, gpa=OTHER_GPA) == (0, 0)
    two.number = 1
    two.vcpu.executor.start(_hello)
    with fails(errno.EINVAL):
        two.enter()
    assert two.reason == 9, "FAIL_ENTRY"


@pytest.mark.parametrize("gpa", [0x40001000, 0x7FFFFFFFF000])
def test_a_page_that_nobody_has_leaves_the_vcpu_without_one(two: Asker, gpa: int) -> None:
    target = two.vmm.vcpus[1]
    assert ask(two, CREATE, gpa=gpa) == (0, 0)
    two.number = 1
    with fails(errno.EAGAIN):
        two.enter()
    assert (target.vmsa, target.mp_state) == (None, MpState.HALTED)


def test_a_page_that_is_not_there_yet_gets_memory(two: Asker) -> None:
    """Nobody has touched it: KVM allocates it, and VMRUN finds no save area there."""
    gpa = 0x701000
    slot = two.vm.slots.of(gpa >> 12)
    two.vmm.process.fallocate(two.vmm.blocks[0].private_fd, 3, gpa, PAGE)
    assert slot.private.pages.peek(slot.offsets(range(gpa >> 12, (gpa >> 12) + 1)))[0] == 0
    ask(two, CREATE, gpa=gpa)
    two.number = 1
    with fails(errno.EINVAL):
        two.enter()
    assert slot.private.pages.peek(slot.offsets(range(gpa >> 12, (gpa >> 12) + 1)))[0] != 0


def test_a_vcpu_can_replace_its_own_save_area(two: Asker) -> None:
    """Its answer is in the GHCB before the old one goes."""

    async def program(cpu: GuestCpu) -> None:
        await save_area(cpu)
        await cpu.write(two.ghcb, ghcb({CODE: CREATION, INFO1: info(CREATE, 0), INFO2: VMSA_GPA, RAX: 1}))
        await cpu.wrmsr(Msr.GHCB, two.ghcb)
        await cpu.vmgexit()

    first = two.vcpu.vmsa
    two.drive(program)
    assert two.vcpu.vmsa != first
    assert infos(two.vmm.read(two.ghcb, PAGE)) == (0, 0)
