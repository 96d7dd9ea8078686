"""VMRUN: each consistency check by itself, what goes back into save area and VMCB, and what is left alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import Exit, GeneralProtection, Hlt, Invalid, Npf, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.spec.msr import Msr
from snpbook.spec.vmcb import ExitCode
from snpbook.spec.vmsa import VMSA
from tests.hardware.guests import ASID, PAGE, VMCB_PAGE, VMSA_PAGE, Bench
from tests.hardware.kinds import AnyBench

BUSY, IDLE_REQUIRED = -2 % 2**64, -3 % 2**64
AVIC, SMT = 1 << 31, 1 << 15


async def nothing(cpu: GuestCpu) -> None:
    await cpu.load(rbx=7)


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


@pytest.mark.parametrize(
    ("spa", "core", "error", "text"),
    [
        (1.0, 0, TypeError, r"vmcb_spa = 1\.0: an integer"),
        (VMCB_PAGE * PAGE, 2, ValueError, "core = 2: one of the machine's 2, not in guest mode"),
        (VMCB_PAGE * PAGE, -1, ValueError, "core = -1"),
        (VMCB_PAGE * PAGE, 0.5, TypeError, r"core = 0\.5: an integer"),
    ],
)
def test_operands_that_no_core_has(spa: Any, core: Any, error: type[Exception], text: str) -> None:
    bench = Bench()
    with pytest.raises(error, match=text):
        bench.cpu.vmrun(spa, bench.executor, "vcpu0", core)


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


@pytest.mark.parametrize("feature", [0, 1 << 10])
def test_vmgexit_parameter(feature: int) -> None:
    """With the feature the hypervisor sees RAX and CPL; the VMCB's own fields stay as they were without it."""

    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rax=0x1234)
        await cpu.vmgexit()

    bench = AnyBench(features=1 | feature)
    bench.set_vmcb(vmgexit_rax=5, vmgexit_cpl=3)
    bench.start(program)
    assert bench.run() == Vmgexit()
    vmcb = bench.read_vmcb()
    assert (vmcb.vmgexit_rax, vmcb.vmgexit_cpl) == ((0x1234, 0) if feature else (5, 3))


def test_what_the_layouts_do_not_name_stays() -> None:
    """Reserved bytes of VMCB and VMSA: nobody knows them here, and nobody loses them."""
    bench = Bench()
    bench.machine.dram.write(VMCB_PAGE * PAGE + 0x3E0, b"\xa5" * 0x20)
    offset = 0x380
    assert VMSA.reserved_mask >> 8 * offset & 1
    bench.machine.encryption.write(ASID, VMSA_PAGE * PAGE + offset, b"\x5a" * 16)
    bench.start(nothing)
    bench.run()
    assert bench.machine.dram.read(VMCB_PAGE * PAGE + 0x3E0, 0x20) == b"\xa5" * 0x20
    assert bench.machine.encryption.read(ASID, VMSA_PAGE * PAGE + offset, 16) == b"\x5a" * 16


class Busybody:
    """An executor that lets a test look at the machine while its guest runs on a core."""

    def __init__(self, act: Callable[[GuestCore], None]) -> None:
        self.act = act

    def run(self, core: GuestCore) -> Exit:
        self.act(core)
        core.registers["rbx"] = 0x77
        return Hlt()


def test_any_executor_runs_from_the_vmsa_and_back() -> None:
    """VMSA in, VMSA out: the hand-over is the page and nothing else."""
    bench = Bench()
    bench.set_vmsa(rax=0x55, rcx=0x66)
    seen = []
    executor = Busybody(lambda core: seen.append((core.registers["rax"], core.registers["rcx"], core.physical.number)))
    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, executor, "vcpu0", 1) == Hlt()
    assert seen == [(0x55, 0x66, 1)]
    assert bench.read_vmsa().rbx == 0x77


def test_pages_are_in_use_while_the_guest_runs() -> None:
    """RMPUPDATE from another core answers FAIL_INUSE for VMCB, VMSA and AVIC page, and no longer after the exit."""
    bench = AnyBench("snp")
    bench.vmcb |= {"virtual_interrupt": AVIC, "avic_backing_page": 0x40 * PAGE}
    bench.set_vmcb()
    codes: list[list[int]] = []
    pages = [VMCB_PAGE, VMSA_PAGE, 0x40, 0x41]

    def update(core: GuestCore | None = None) -> None:
        new = NewState(assigned=True, asid=9)
        codes.append([int(bench.cpu.rmpupdate(range(p, p + 1), range(0x50, 0x51), new)[0]) for p in pages])

    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(update), "vcpu0") == Hlt()
    assert codes == [[3, 3, 3, 0]]
    assert bench.machine.in_use == set()
    update()
    assert codes[1] == [0, 0, 0, 0]


def test_debug_status_tells_of_a_thread_in_a_guest() -> None:
    bench = Bench()
    seen: list[list[int]] = []
    cores = bench.machine.cores
    watch = Busybody(lambda _: seen.append([core.rdmsr(Msr.DEBUG_STATUS) for core in cores]))
    bench.cpu.vmrun(VMCB_PAGE * PAGE, watch, "vcpu0", 1)
    assert seen == [[0, 4]]
    assert [core.rdmsr(Msr.DEBUG_STATUS) for core in cores] == [0, 0]


def test_vmrun_wakes_its_core() -> None:
    """A thread that runs guests is no idle sibling, even when it was halted before."""
    bench = AnyBench(features=1 | SMT)
    for core in (0, 1):
        bench.cpu.hlt(core)
    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu0", 1) == Hlt()
    exit_ = bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu0", 0)
    assert exit_.code == IDLE_REQUIRED


@pytest.mark.parametrize("name", ["genoa", "turin"])
def test_guest_sev_features_are_told_where_the_field_exists(name: str) -> None:
    bench = AnyBench(name=name, features=1 | 1 << 5)
    bench.set_vmcb(guest_sev_features=0x77)
    bench.start(nothing)
    assert bench.run() == Hlt()
    assert bench.read_vmcb().guest_sev_features == (0x77 if name == "genoa" else 0x21)


def test_tlb_control_reaches_the_core() -> None:
    bench = AnyBench("plain")
    bench.memory(5, 0x905)
    bench.memory(6, 0x906)

    async def read(cpu: GuestCpu) -> Any:
        return await cpu.read(0x5000, 1)

    for page, control in ((0x905, 0), (0x906, 0), (0x906, 3)):
        bench.map(5, page)
        bench.machine.dram.write(page * PAGE, bytes([page & 0xFF]))
        bench.set_vmcb(tlb_control=control)
        bench.start(read)
        bench.run()
        assert bench.executor.outcome == (b"\x05" if not control else b"\x06")


def test_a_core_in_a_guest_enters_no_other() -> None:
    bench = Bench()

    def again(core: GuestCore) -> None:
        with pytest.raises(ValueError, match="core = 0: one of the machine's 2, not in guest mode"):
            bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu1", 0)
        exit_ = bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu1", 1)
        assert isinstance(exit_, Invalid)
        assert exit_.code == ExitCode.BUSY  # the VMSA runs already

    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(again), "vcpu0") == Hlt()


def test_a_program_that_breaks_leaves_guest_mode() -> None:
    async def wrong(cpu: GuestCpu) -> None:
        await cpu.load(vmpl=1)

    bench = Bench()
    bench.start(wrong)
    with pytest.raises(ValueError, match="vmpl"):
        bench.run()
    assert bench.machine.in_use == set()
    assert not bench.machine.cores[0].in_guest


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
