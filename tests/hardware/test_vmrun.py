"""VMRUN: each consistency check by itself, what goes back into VMSA and VMCB, and what is left alone."""

from typing import Any

import numpy as np
import pytest

from snpbook.hardware.executor import GuestCpu
from snpbook.hardware.exits import GeneralProtection, Hlt, Invalid, Npf, Vmgexit
from snpbook.hardware.instructions import NewState
from snpbook.spec.msr import Msr
from snpbook.spec.vmcb import ExitCode
from snpbook.spec.vmsa import VMSA
from tests.hardware.guests import ASID, PAGE, VMCB_PAGE, VMSA_PAGE, Bench


async def nothing(cpu: GuestCpu) -> None:
    await cpu.load(rax=7)


def entry(bench: Bench, clear: int = 0, add: int = 0) -> None:
    """Change bits of the VMSA page's entry."""
    raw = bench.machine.rmp.load(range(VMSA_PAGE, VMSA_PAGE + 1)).copy()
    raw[0, 0] = int(raw[0, 0]) & ~clear | add
    bench.machine.rmp.store(range(VMSA_PAGE, VMSA_PAGE + 1), raw)


def unlock(bench: Bench) -> None:
    for core in bench.machine.cores:
        core.set_by_bios({Msr.HWCR: 0})


REFUSALS: dict[str, tuple[Any, str]] = {
    "no nested paging": (lambda b: b.set_vmcb(nested_paging=0), "nested paging, SEV and SEV-ES"),
    "no SEV": (lambda b: b.set_vmcb(sev=0), "nested paging, SEV and SEV-ES"),
    "no SEV-ES": (lambda b: b.set_vmcb(sev_es=0), "nested paging, SEV and SEV-ES"),
    "SMM open": (unlock, "HWCR.SmmLock"),
    "ASID 0": (lambda b: b.set_vmcb(asid=0), "ASID is in use"),
    "ASID too high": (lambda b: b.set_vmcb(asid=510), "ASID is in use"),
    "ASID of no guest": (lambda b: b.set_vmcb(asid=6), "ASID is in use"),
    "guest gone": (lambda b: b.machine.runnable.clear(), "ASID is in use"),
    "not covered": (lambda b: b.set_vmcb(vmsa_pa=b.machine.rmp.entries * PAGE), "covered by the RMP"),
    "not assigned": (lambda b: b.set_vmcb(vmsa_pa=0x30 * PAGE), "VMSA page is the guest's"),
    "no longer assigned": (lambda b: entry(b, clear=1), "VMSA page is the guest's"),
    "another's": (lambda b: b.assign(VMSA_PAGE, 1, asid=6, vmsa=1), "VMSA page is the guest's"),
    "immutable": (lambda b: entry(b, add=1 << 2), "VMSA page is mutable"),
    "no VMSA mark": (lambda b: entry(b, clear=1 << 61), "marked as a VMSA"),
    "SNP not active": (lambda b: b.set_vmsa(sev_features=0), "without SNPActive"),
    "no such VMPL": (lambda b: b.set_vmsa(vmpl=4), "VMPL exists"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_inconsistent_states_are_refused(name: str) -> None:
    spoil, rule = REFUSALS[name]
    bench = Bench()
    bench.start(nothing)
    spoil(bench)
    before, vmsa = bench.read_vmcb(), bench.machine.dram.read(VMSA_PAGE * PAGE, PAGE)
    exit_ = bench.run()
    assert isinstance(exit_, Invalid)
    assert rule in exit_.rule
    assert bench.read_vmcb() == before.replace(exit_code=ExitCode.INVALID)
    assert bench.machine.dram.read(VMSA_PAGE * PAGE, PAGE) == vmsa
    assert bench.executor.results == []


def test_snp_active_needs_snp_on() -> None:
    bench = Bench(snp=False)
    bench.start(nothing)
    exit_ = bench.run()
    assert isinstance(exit_, Invalid)
    assert "SNPEn" in exit_.rule


def test_the_state_that_passes() -> None:
    bench = Bench()
    bench.start(nothing)
    assert bench.run() == Hlt()
    assert bench.read_vmsa().rax == 7


@pytest.mark.parametrize("spa", [VMCB_PAGE * PAGE + 8, -PAGE, 64 << 20])
def test_the_vmcb_is_a_page(spa: int) -> None:
    bench = Bench()
    with pytest.raises(GeneralProtection, match="address of a page of memory"):
        bench.cpu.vmrun(spa, bench.executor, "vcpu0")


def test_a_vmcb_in_a_page_of_a_guest() -> None:
    bench = Bench()
    bench.cpu.rmpupdate(range(VMCB_PAGE, VMCB_PAGE + 1), range(1), NewState(assigned=True, asid=6))
    with pytest.raises(GeneralProtection, match="VMCB page is the hypervisor's"):
        bench.run()


def test_a_vmcb_address_that_is_no_number() -> None:
    bench = Bench()
    with pytest.raises(TypeError, match=r"vmcb_spa = 1\.0: an integer"):
        bench.cpu.vmrun(1.0, bench.executor, "vcpu0")  # type: ignore[arg-type]


def test_exits_in_the_vmcb() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.read(0x5000, 1)
        await cpu.vmgexit()

    bench = Bench()
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Npf)
    vmcb = bench.read_vmcb()
    assert (vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2) == (0x400, int(exit_.error), 0x5000)
    bench.give(5, 0x905)
    assert bench.run() == Vmgexit()
    vmcb = bench.read_vmcb()
    assert (vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2) == (0x403, 0, 0)
    bench.run()
    assert bench.read_vmcb().exit_code == 0x78


def test_what_the_layouts_do_not_name_stays() -> None:
    """Intercepts in the VMCB, reserved bytes of the VMSA: nobody knows them here, and nobody loses them."""
    bench = Bench()
    bench.machine.dram.write(VMCB_PAGE * PAGE, b"\xa5" * 0x10)
    offset = 0x380
    assert VMSA.reserved_mask >> 8 * offset & 1
    bench.machine.encryption.write(ASID, VMSA_PAGE * PAGE + offset, b"\x5a" * 16)
    bench.start(nothing)
    bench.run()
    assert bench.machine.dram.read(VMCB_PAGE * PAGE, 0x10) == b"\xa5" * 0x10
    assert bench.machine.encryption.read(ASID, VMSA_PAGE * PAGE + offset, 16) == b"\x5a" * 16


def test_the_host_sees_no_register() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rax=0x1122334455667788, rbx=0x1122334455667788)

    bench = Bench()
    bench.start(program)
    bench.run()
    secret = (0x1122334455667788).to_bytes(8, "little")
    whole = bench.cpu.read(0, bench.machine.dram.size)
    assert secret not in whole
    assert secret in bench.machine.encryption.read_pages(ASID, np.array([VMSA_PAGE], np.uint64)).tobytes()
