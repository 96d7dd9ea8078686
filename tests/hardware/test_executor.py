"""Guest programs: where they lose the processor, what they go on with, and that their results are their place."""

from typing import Any

import numpy as np
import pytest

from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import GuestException, Hlt, Npf, Shutdown, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.hardware.operations import Operation
from snpbook.spec.msr import Msr
from tests.hardware.guests import ASID, PAGE, Bench


async def busy(cpu: GuestCpu) -> Any:
    """A bit of everything."""
    await cpu.write(0x10, b"hello")
    await cpu.vmgexit()
    codes, unchanged = await cpu.pvalidate(PAGE, 2)
    try:
        await cpu.read(5 * PAGE, 1)
    except GuestException as exception:
        await cpu.load(rsi=exception.vector, rdi=exception.error)
    await cpu.wrmsr(Msr.GHCB, 0x5_0000_1234)
    await cpu.hlt()
    return codes.tolist(), unchanged.tolist(), await cpu.read(0x10, 5), await cpu.rdmsr(Msr.GHCB)


def bench(**bits: int) -> Bench:
    result = Bench()
    result.give(0, 0x900)
    for gfn in (1, 2):
        result.give(gfn, 0x900 + gfn, validated=0)
    result.give(5, 0x905, validated=0)
    return result


def test_a_program_from_exit_to_exit() -> None:
    guest = bench()
    guest.start(busy)
    assert guest.run() == Vmgexit()
    assert guest.read_vmsa().rip == 2
    assert guest.run() == Hlt()
    assert guest.executor.busy
    vmsa = guest.read_vmsa()
    assert (vmsa.rip, vmsa.rsi, vmsa.rdi, vmsa.cr2) == (7, 29, 0x404, 5 * PAGE)
    assert (vmsa.rcx, vmsa.rdx, vmsa.rax) == (Msr.GHCB, 5, 0x1234)  # the operands of WRMSR
    assert guest.read_vmcb().ghcb_gpa == 0x5_0000_1234
    assert guest.run() == Hlt()
    assert not guest.executor.busy
    assert guest.executor.outcome == ([0, 0], [False, False], b"hello", 0x5_0000_1234)
    assert guest.run() == Hlt()  # nothing to run


def test_pvalidate_in_two_halves_is_pvalidate() -> None:
    """The fault comes between two pages; the program sees one result."""

    async def program(cpu: GuestCpu) -> Any:
        codes, unchanged = await cpu.pvalidate(0, 4)
        return codes.tolist(), unchanged.tolist()

    outcomes = []
    for missing in ((), (2,), (0, 1, 3)):
        guest = Bench()
        for gfn in range(4):
            if gfn not in missing:
                guest.give(gfn, 0x900 + gfn, validated=int(gfn == 1))
        guest.start(program)
        exits = []
        while guest.executor.busy:
            exits.append(guest.run())
            if isinstance(exits[-1], Npf):
                gfn = exits[-1].gpa // PAGE
                assert [guest.machine.rmp.entry(0x900 + g).validated for g in range(gfn)] == [1] * gfn
                guest.give(gfn, 0x900 + gfn, validated=int(gfn == 1))
        assert [exit_.gpa // PAGE for exit_ in exits if isinstance(exit_, Npf)] == list(missing)
        assert guest.counts.pvalidates == 4
        outcomes.append(guest.executor.outcome)
    assert outcomes == [([0] * 4, [False, True, False, False])] * 3


def test_results_lead_a_fresh_program_to_the_same_place() -> None:
    """Fed with the results, a new coroutine goes on as the old one does, and the machine is not touched meanwhile."""
    first, second = bench(), bench()
    for guest in (first, second):
        guest.start(busy)
        guest.run()
        guest.run()
    before = second.machine.dram.read(0, second.machine.dram.size)
    results, second.executor = list(second.executor.results), CoroutineExecutor()
    second.executor.start(busy, results)
    assert second.executor.results == results
    assert second.machine.dram.read(0, second.machine.dram.size) == before
    for guest in (first, second):
        assert guest.run() == Hlt()
    assert first.executor.outcome == second.executor.outcome
    same = first.machine.dram, second.machine.dram
    assert same[0].read(0, same[0].size) == same[1].read(0, same[1].size)


def test_an_exception_that_nobody_handles_ends_the_vcpu() -> None:
    async def at_once(cpu: GuestCpu) -> None:
        await cpu.read(5 * PAGE, 1)

    async def later(cpu: GuestCpu) -> None:
        try:
            await cpu.read(5 * PAGE, 1)
        except GuestException as exception:
            kept = exception
        await cpu.load(rax=1)
        raise kept

    for program in (at_once, later):
        guest = bench()
        guest.start(program)
        exit_ = guest.run()
        assert isinstance(exit_, Shutdown)
        assert "vector 29, error 0x404, address 0x5000" in exit_.reason
        assert not guest.executor.busy
        guest.start(busy)  # and the vCPU can be used again


def test_a_program_that_gives_up_and_one_that_is_wrong() -> None:
    async def gives_up(cpu: GuestCpu) -> None:
        await cpu.load(rax=1)
        raise ProgramFailure("no more")

    async def wrong(cpu: GuestCpu) -> None:
        await cpu.load(vmpl=1)

    guest = bench()
    guest.start(gives_up)
    assert guest.run() == Hlt()
    assert isinstance(guest.executor.outcome, ProgramFailure)
    guest.start(wrong)
    with pytest.raises(ValueError, match="vmpl: not a register that software loads"):
        guest.run()
    assert not guest.executor.busy


def test_one_program_at_a_time() -> None:
    guest = bench()
    guest.start(busy)
    with pytest.raises(RuntimeError, match="still runs a program"):
        guest.start(busy)


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda cpu: cpu.read(-1, 4), ValueError, "address = -0x1, size = 0x4: outside the 64-bit address space"),
    (lambda cpu: cpu.read(0, -4), ValueError, "size = -0x4: outside"),
    (lambda cpu: cpu.read(2**64 - 1, 2), ValueError, "outside the 64-bit address space"),
    (lambda cpu: cpu.read(0.5, 2), TypeError, r"address = 0\.5: an integer"),
    (lambda cpu: cpu.write(-5, b"x"), ValueError, "outside the 64-bit"),
    (lambda cpu: cpu.pvalidate(8, 1), ValueError, "address = 0x8: PVALIDATE takes a page"),
    (lambda cpu: cpu.pvalidate(0, 1.0), TypeError, r"count = 1\.0: an integer"),
    (lambda cpu: cpu.pvalidate(PAGE, -1), ValueError, "count = -1: pages from"),
    (lambda cpu: cpu.pvalidate(2**63, 1 << 60), ValueError, "outside the 64-bit"),
    (lambda cpu: cpu.pvalidate(0, 1, validate="no"), TypeError, "validate = 'no': True or False"),
    (lambda cpu: cpu.pvalidate(0, 1, large=2), TypeError, "large = 2: True or False"),
    (lambda cpu: cpu.rmpadjust(0, 1, vmpl=1, permissions=1, vmsa=1), TypeError, "vmsa = 1: True or False"),
    (lambda cpu: cpu.rmpadjust(0, 1, vmpl=256, permissions=1), ValueError, "vmpl = 0x100: the operand holds 8 bits"),
    (lambda cpu: cpu.write(0, "abc"), TypeError, "data = 'abc': bytes"),
    (lambda cpu: cpu.write(0, [1, 2]), TypeError, r"data = \[1, 2\]: bytes"),
    (lambda cpu: cpu.cpuid(1.5), TypeError, r"leaf = 1\.5: an integer"),
    (lambda cpu: cpu.cpuid(0, -1), ValueError, "subleaf = -0x1: the operand holds 32 bits"),
    (lambda cpu: cpu.rdmsr(1.5), TypeError, r"msr = 1\.5: an integer"),
    (lambda cpu: cpu.wrmsr(Msr.GHCB, 1 << 64), ValueError, "value = 0x10000000000000000: a register holds 64 bits"),
    (lambda cpu: cpu.wrmsr(-1, 0), ValueError, "msr = -0x1: a register holds 64 bits"),
    (lambda cpu: cpu.port_in(0x60, 3), ValueError, "port = 0x60, size = 3: 16 bits, and 1, 2 or 4 bytes"),
    (lambda cpu: cpu.port_in(0xFFFF, 2), ValueError, "port = 0xffff, size = 2"),
    (lambda cpu: cpu.port_out(-1, 0), ValueError, "port = -0x1"),
    (lambda cpu: cpu.port_in(0x60, "1"), TypeError, "size = '1': an integer"),
    (lambda cpu: cpu.port_out(0x60, -1), ValueError, "value = -0x1: the operand holds 8 bits"),
    (lambda cpu: cpu.port_out(5, 1 << 20, 1), ValueError, "value = 0x100000: the operand holds 8 bits"),
    (lambda cpu: cpu.port_out(5, 1 << 16, 2), ValueError, "value = 0x10000: the operand holds 16 bits"),
    (lambda cpu: cpu.port_out(0.5, 0), TypeError, r"port = 0\.5: an integer"),
    (lambda cpu: cpu.set_handler(256, None), ValueError, "vector = 256: 0 to 255"),
    (lambda cpu: cpu.set_handler(-1, None), ValueError, "vector = -1"),
    (lambda cpu: cpu.look("eax"), ValueError, "eax: no register of a VMSA"),
    (lambda cpu: cpu.load(rax=-1), ValueError, "rax = -0x1: a register holds 64 bits"),
    (lambda cpu: cpu.load(sev_features=0), ValueError, "sev_features: not a register"),
    (lambda cpu: cpu.load(rip=5), ValueError, "rip: not a register"),
    (lambda cpu: cpu.load(eax=5), ValueError, "eax: not a register"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_operands_that_no_instruction_has(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(GuestCpu())


def test_an_operation_names_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="Operation has no step"):
        Operation().step(Bench().core())


def test_keys_differ_from_guest_to_guest() -> None:
    """What one guest writes another guest's core cannot read as plaintext, even where the host maps it."""
    guest = bench()
    guest.start(busy)
    guest.run()
    other = bytes(range(1, guest.machine.product.memory_key_size + 1))
    guest.machine.encryption.install(ASID + 1, other)
    pages = np.array([0x900], np.uint64)
    mine, theirs = (guest.machine.encryption.read_pages(asid, pages).tobytes() for asid in (ASID, ASID + 1))
    assert mine[0x10:0x15] == b"hello"
    assert theirs[0x10:0x15] != b"hello"


def test_touching_goes_on_where_it_stopped() -> None:
    """One byte at each end of a page; a page that is not there is an exit, one that is not validated an exception."""
    guest = Bench()
    for gfn in (0, 1, 3):
        guest.give(gfn, 0x900 + gfn)

    async def program(cpu: GuestCpu) -> Any:
        await cpu.touch(0, 4)
        try:
            await cpu.touch(5 * PAGE, 1)
        except GuestException as exception:
            return exception.vector, exception.error

    guest.start(program)
    fault = guest.run()
    assert isinstance(fault, Npf)
    assert (fault.gpa, fault.count) == (2 * PAGE, 1)
    assert guest.run() == fault, "it stands where it was"
    guest.give(2, 0x902)
    guest.give(5, 0x905, validated=0)
    assert guest.run() == Hlt()
    assert guest.executor.outcome == (29, 0x404)
