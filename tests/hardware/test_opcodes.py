"""RMP instructions as machine code: bytes, registers in and out, flags; equal to the reference on random machines."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.exits import GeneralProtection, GuestException, InvalidOpcode
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.opcodes import Registers, execute_guest, execute_host
from snpbook.spec.opcodes import RFlag, RmpInstruction, decode
from tests.hardware.guests import ASID, PAGE, Bench
from tests.hardware.raw import BYTES, compare

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
DIRTY = 0x5A5A_0000_0000_0000


def long_core(bench: Bench, **registers: int) -> Any:
    core = bench.core(efer=0x1500, **registers)
    core.registers["cs"] = core.registers["cs"].replace(attrib=0xA9B)
    return core


@given(rng=st.randoms(use_true_random=False))
def test_random_registers_equal_the_reference(rng: random.Random) -> None:
    for _ in range(4):
        compare(rng)


@pytest.mark.parametrize("name", BYTES)
def test_opcodes(name: str) -> None:
    code = bytes.fromhex(BYTES[name])
    found = decode(code + b"\x90")
    assert found is RmpInstruction[name]
    assert found.length == len(code) == 4
    assert found.flags == (PF | AF | ZF | SF | OF | (CF if name == "PVALIDATE" else 0))
    assert decode(code[:3]) is None


@pytest.mark.parametrize("code", ["", "f30f01d8", "0f01ff", "f00f01fe", "f20f01fc", "90f20f01fe"])
def test_other_code_is_none_of_them(code: str) -> None:
    assert decode(bytes.fromhex(code)) is None


def test_calls_of_the_hypervisor() -> None:
    found = [decode(bytes.fromhex(code)) for code in ("f30f01d990", "0f01d990")]
    assert [(call.name, call.length) for call in found if call] == [("VMGEXIT", 4), ("VMMCALL", 3)]


def test_pvalidate_and_its_carry() -> None:
    bench = Bench()
    bench.give(3, 0x903, validated=0)
    core = long_core(bench)
    first = execute_guest(core, RmpInstruction.PVALIDATE, 3 * PAGE, DIRTY, DIRTY | 1)
    second = execute_guest(core, RmpInstruction.PVALIDATE, 3 * PAGE, DIRTY, DIRTY | 1)
    assert first == Registers(0, DIRTY, DIRTY | 1, RFlag(ZF | PF))
    assert second == Registers(0, DIRTY, DIRTY | 1, RFlag(ZF | PF | CF))
    bench.give(0, 0x800)
    assert execute_guest(core, RmpInstruction.PVALIDATE, 0, 1, 1) == Registers(6, 1, 1, RFlag(PF))
    assert execute_guest(core, RmpInstruction.PVALIDATE, 3 * PAGE, 1, 1) == Registers(1, 1, 1, RFlag(0))


def test_pvalidate_in_32_bit_mode_takes_eax() -> None:
    bench = Bench()
    bench.give(3, 0x903, validated=0)
    rax = 7 << 32 | 3 * PAGE
    done = execute_guest(bench.core(), RmpInstruction.PVALIDATE, rax, 0, 1)
    assert done == Registers(0, 0, 1, RFlag(ZF | PF))
    fault = execute_guest(long_core(bench), RmpInstruction.PVALIDATE, rax, 0, 1)
    assert getattr(fault, "gpa", None) == rax


def test_rmpadjust_makes_a_vmsa_and_rmpquery_sees_it() -> None:
    bench = Bench("genoa")
    bench.give(3, 0x903)
    core = long_core(bench)
    rdx = 1 << 16 | 1 << 8 | 1
    assert execute_guest(core, RmpInstruction.RMPADJUST, 3 * PAGE, 0, rdx) == Registers(0, 0, rdx, RFlag(ZF | PF))
    entry = bench.machine.rmp.entry(0x903)
    assert (entry.vmsa, entry.vmpl0, entry.vmpl1) == (1, 15, 1)
    found = execute_guest(core, RmpInstruction.RMPQUERY, 3 * PAGE, DIRTY, DIRTY | 1)
    assert found == Registers(0, 0, rdx, RFlag(ZF | PF))
    refused = execute_guest(core, RmpInstruction.RMPQUERY, 3 * PAGE, DIRTY, DIRTY)
    assert refused == Registers(2, DIRTY, DIRTY, RFlag(0))


def test_the_vmpl0_probe_of_linux() -> None:
    """RMPADJUST on VMPL1 succeeds at VMPL0 alone."""
    bench = Bench()
    bench.give(3, 0x903, vmpl=0x0F0F0F0F)
    codes = []
    for vmpl in range(4):
        done = execute_guest(long_core(bench, vmpl=vmpl), RmpInstruction.RMPADJUST, 3 * PAGE, 0, 1 << 8 | 1)
        assert isinstance(done, Registers)
        codes.append(done.rax)
    assert codes == [0, 2, 2, 2]


def test_instructions_of_the_host_in_a_guest() -> None:
    bench = Bench("turin")
    core = long_core(bench)
    before = bench.machine.dram.read(0, bench.machine.dram.size)
    for name in ("RMPUPDATE", "PSMASH", "RMPREAD"):
        assert execute_guest(core, RmpInstruction[name], 0x600 * PAGE, 8, 9) == Registers(2, 8, 9, RFlag(0))
    assert execute_guest(core, RmpInstruction.PSMASH, 0x601 * PAGE, 8, 9) == Registers(1, 8, 9, RFlag(0))
    for core, vector in ((long_core(bench, cpl=3), 13), (bench.core(), 6)):
        fault = execute_guest(core, RmpInstruction.PSMASH, 0, 0, 0)
        assert isinstance(fault, GuestException)
        assert fault.vector == vector
    other = long_core(bench, sev_features=0)  # whoever has an ASID: they answer in other guests as well
    assert execute_guest(other, RmpInstruction.RMPUPDATE, 0, 8, 9) == Registers(2, 8, 9, RFlag(0))
    kept = bench.machine.dram.read(0, bench.machine.dram.size)
    assert kept[0x12 * PAGE :] == before[0x12 * PAGE :]


def test_rmpupdate_takes_its_operand_from_memory() -> None:
    bench = Bench("turin")
    bench.machine.dram.write(0x5008, bytes.fromhex("00100000000000000100000001000000"))
    done = execute_host(bench.cpu, RmpInstruction.RMPUPDATE, 0x40 * PAGE, 0x5008, 9)
    assert done == Registers(0, 0x5008, 9, RFlag(ZF | PF))
    assert bench.cpu.rmp_words(range(0x40, 0x41)).tolist() == [[0x0008000000001001, 0xF]]
    done = execute_host(bench.cpu, RmpInstruction.RMPREAD, 0x40 * PAGE, 0x6000, 9)
    assert done == Registers(0, 0x6000, 9, RFlag(ZF | PF))
    assert bench.cpu.read(0x6000, 16) == bench.cpu.read(0x5008, 16)
    bench.machine.in_use.add(0x40)
    assert execute_host(bench.cpu, RmpInstruction.RMPUPDATE, 0x40 * PAGE, 0x5008, 9).flags == PF


def test_what_an_entry_cannot_hold_is_refused() -> None:
    bench = Bench()
    for operand in ("00000000000008000100000001000000", "00100000000000000100000000040000"):
        bench.machine.dram.write(0x5000, bytes.fromhex(operand))
        assert execute_host(bench.cpu, RmpInstruction.RMPUPDATE, 0x40 * PAGE, 0x5000, 0).rax == 1
    assert bench.cpu.rmp_words(range(0x40, 0x41)).tolist() == [[0, 0]]


def test_psmash_of_a_2mb_page() -> None:
    bench = Bench()
    assert not bench.cpu.rmpupdate(range(0x600, 0x601), range(1), NewState(True, ASID, large=True)).any()
    assert execute_host(bench.cpu, RmpInstruction.PSMASH, 0x600 * PAGE, 1, 2) == Registers(0, 1, 2, RFlag(ZF | PF))
    assert execute_host(bench.cpu, RmpInstruction.PSMASH, 0x600 * PAGE, 1, 2) == Registers(7, 1, 2, RFlag(0))


@pytest.mark.parametrize("name", ["RMPUPDATE", "RMPREAD"])
def test_an_operand_outside_memory(name: str) -> None:
    bench = Bench("turin")
    for address in ((64 << 20) - 15, 1 << 63):
        with pytest.raises(GeneralProtection, match=f"{name}: RCX names 16 bytes of memory"):
            execute_host(bench.cpu, RmpInstruction[name], 0, address, 0)
    with pytest.raises(InvalidOpcode, match=f"{name} needs SYSCFG"):
        execute_host(Bench("turin", snp=False).cpu, RmpInstruction[name], 0, 1 << 63, 0)


def test_instructions_of_the_guest_on_the_host() -> None:
    for name in ("PVALIDATE", "RMPADJUST", "RMPQUERY"):
        with pytest.raises(InvalidOpcode, match=f"{name} is an SNP guest's instruction"):
            execute_host(Bench("genoa").cpu, RmpInstruction[name], 0, 0, 0)


@pytest.mark.parametrize(
    ("registers", "error", "text"),
    [
        ((1 << 64, 0, 0), ValueError, "rax = 0x10000000000000000: a register holds 64 bits"),
        ((0, -1, 0), ValueError, "rcx = -0x1: a register"),
        ((0, 0, 0.5), TypeError, r"rdx = 0\.5: an integer"),
    ],
)
def test_registers_hold_64_bits(registers: Any, error: type[Exception], text: str) -> None:
    bench = Bench()
    with pytest.raises(error, match=text):
        execute_host(bench.cpu, RmpInstruction.PSMASH, *registers)
    with pytest.raises(error, match=text):
        execute_guest(bench.core(), RmpInstruction.PVALIDATE, *registers)
