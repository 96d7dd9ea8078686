"""What the host of an SVSM serves beyond Linux 6.12, all of it unconfirmed: VMPLs, the doorbell page, APIC IDs."""

from __future__ import annotations

import struct

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from tests.host.askers import CODE, INFO1, INFO2, PAGE, RAX, Asker, ghcb, infos, snp, u64
from tests.host.test_ap_creation import VMSA_GPA, save_area

RUN_VMPL, DOORBELL, APIC_IDS, CREATION = 0x80000018, 0x80000014, 0x80000017, 0x80000013
NONE = (1 << 64) - 1


@pytest.fixture
def svsm() -> Asker:
    return Asker("svsm-host", vcpus=2)


async def _lower(cpu: GuestCpu) -> None:
    """VMPL2's save area, and its right to a page for its GHCB (which is shared: no right is asked)."""
    await save_area(cpu, vmpl=2)


def create(asker: Asker, request: int, vmpl: int = 2, apic_id: int = 0, gpa: int = VMSA_GPA) -> tuple[int, int]:
    fields = {CODE: CREATION, INFO1: apic_id << 32 | vmpl << 16 | request, INFO2: gpa, RAX: 1}
    return infos(asker.page(ghcb(fields)))


# VMPLs.


def test_a_guest_runs_its_lower_level_and_comes_back(svsm: Asker) -> None:
    """On-INIT creation, then run VMPL by the MSR protocol; the lower level asks for VMPL 0 again."""
    seen: list[tuple[int, ...]] = []

    async def program(cpu: GuestCpu) -> int:
        await _lower(cpu)
        await cpu.write(svsm.ghcb, ghcb({CODE: CREATION, INFO1: 2 << 16, INFO2: VMSA_GPA, RAX: 1}))
        await cpu.wrmsr(Msr.GHCB, svsm.ghcb)
        await cpu.vmgexit()
        assert infos(await cpu.read(svsm.ghcb, PAGE)) == (0, 0)
        await cpu.wrmsr(Msr.GHCB, 2 << 32 | 0x016)
        await cpu.vmgexit()
        seen.append(await cpu.look("vmpl", "cr0"))
        await cpu.wrmsr(Msr.GHCB, 0x016)
        await cpu.vmgexit()
        seen.append(await cpu.look("vmpl", "cr0"))
        answer: int = await cpu.rdmsr(Msr.GHCB)
        return answer

    zero = svsm.vcpu.vmsa
    assert svsm.drive(program) == 0x017, "VMPL 0 finds the answer to its own request"
    (low, low_cr0), (high, high_cr0) = seen
    assert (low, low_cr0, high) == (2, 0x60000010, 0)
    assert high_cr0 != low_cr0
    assert (svsm.vcpu.vmpl, svsm.vcpu.vmsa) == (0, zero)


def test_each_level_has_its_own_ghcb(svsm: Asker) -> None:
    async def program(cpu: GuestCpu) -> tuple[int, int]:
        await _lower(cpu)
        await cpu.write(svsm.ghcb, ghcb({CODE: CREATION, INFO1: 2 << 16, INFO2: VMSA_GPA, RAX: 1}))
        await cpu.wrmsr(Msr.GHCB, svsm.ghcb)
        await cpu.vmgexit()
        await cpu.wrmsr(Msr.GHCB, 2 << 32 | 0x016)
        await cpu.vmgexit()
        fresh: int = await cpu.rdmsr(Msr.GHCB)
        await cpu.wrmsr(Msr.GHCB, 0x7000 | 0x012)
        await cpu.vmgexit()
        await cpu.wrmsr(Msr.GHCB, 0x016)
        await cpu.vmgexit()
        back: int = await cpu.rdmsr(Msr.GHCB)
        return fresh, back

    assert svsm.drive(program) == (0, 0x017)
    assert svsm.vcpu.ghcb_registered == svsm.ghcb >> 12
    assert svsm.vcpu.parked[2].ghcb_registered == 7


def test_run_vmpl_by_its_event(svsm: Asker) -> None:
    for vmpl in (1, 3, 4, 1 << 31):
        assert infos(svsm.event(RUN_VMPL, vmpl)) == (2, 0), "nothing there"
    assert infos(svsm.event(RUN_VMPL, 0)) == (0, 0)


def test_a_level_that_is_created_at_once_runs_next(svsm: Asker) -> None:
    seen: list[int] = []

    async def program(cpu: GuestCpu) -> None:
        await _lower(cpu)
        await cpu.write(svsm.ghcb, ghcb({CODE: CREATION, INFO1: 2 << 16 | 1, INFO2: VMSA_GPA, RAX: 1}))
        await cpu.wrmsr(Msr.GHCB, svsm.ghcb)
        await cpu.vmgexit()
        seen.extend(await cpu.look("vmpl"))

    svsm.drive(program)
    assert seen == [2]


@pytest.mark.parametrize(("vmpl", "apic_id"), [(4, 0), (15, 1), (0, 0)])
def test_refused_creations(svsm: Asker, vmpl: int, apic_id: int) -> None:
    """A VMPL that is none, and VMPL 0 of the caller itself."""
    assert create(svsm, 1, vmpl, apic_id) == (2, 5)


# The doorbell page and the list of APIC IDs.


def test_doorbell() -> None:
    asker = snp("svsm-host")
    for request, gpa, expected in [
        (0, 0, (0, NONE)), (2, 0, (0, NONE)), (1, 0x9000, (0, 0x9000)), (2, 0, (0, 0x9000)), (1, 0x9008, (2, 5)),
        (1, 1 << 40, (2, 5)), (2, 0, (0, 0x9000)), (3, 0, (0, NONE)), (2, 0, (0, NONE)), (4, 0, (2, 5)),
    ]:  # fmt: skip
        assert infos(asker.event(DOORBELL, request, gpa)) == expected, (request, gpa)


def test_apic_ids(svsm: Asker) -> None:
    buffer = 0x100000
    answer = svsm.event(APIC_IDS, buffer, rax=0)
    assert (infos(answer), u64(answer, RAX)) == ((0, 0), 1), "too few pages"
    answer = svsm.event(APIC_IDS, buffer, rax=3)
    assert (infos(answer), u64(answer, RAX)) == ((0, 0), 3)
    assert svsm.vmm.read(buffer, 16) == struct.pack("<4I", 2, 0, 1, 0)
    for gpa in (buffer + 8, 1 << 40):
        assert infos(svsm.event(APIC_IDS, gpa, rax=1)) == (2, 5)


@pytest.mark.parametrize("code", [0x80000015, 0x80000016, 0x8000001A, 0x8000001B, 0x8000001C, 0x8000001D])
def test_interrupts_by_the_host_are_refused(code: int) -> None:
    assert infos(snp("svsm-host").event(code)) == (2, 6)
