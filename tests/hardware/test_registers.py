"""Where registers are between exits: in the clear, encrypted, checked, XORed with a nonce, or left in the core."""

from typing import Any
from zlib import crc32

import pytest

from snpbook.hardware.exits import GuestException, Hlt, Invalid
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.msr import Msr
from tests.hardware.guests import ASID, PAGE, VMCB_PAGE, VMSA_PAGE, Bench
from tests.hardware.kinds import ES_VMSA_PAGE, AnyBench

KINDS = ["plain", "sev", "es", "snp"]
DEBUG_VIRTUALIZATION, SECURE_TSC, REG_PROT = 1 << 5, 1 << 9, 1 << 14
SECRET = 0x1122334455667788


async def secret(cpu: GuestCpu) -> None:
    await cpu.load(rax=SECRET, rbx=SECRET + 1, r15=SECRET + 2, cr2=SECRET + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_host_sees_of_a_guest(kind: str) -> None:
    """Without SEV-ES every register: RAX and CR2 in the VMCB, the others where the guest left them. With it, none."""
    bench = AnyBench(kind)
    bench.start(secret)
    assert bench.run() == Hlt()
    save = bench.cpu.read(VMCB_PAGE * PAGE + 0x400, 0xC00)
    word = [int.from_bytes(save[at : at + 8], "little") for at in (0x1F8, 0x240)]
    left = [bench.cpu.registers()[name] for name in ("rbx", "r15")]
    if kind in ("plain", "sev"):
        assert word == [SECRET, SECRET + 3]
        assert left == [SECRET + 1, SECRET + 2]
    else:
        assert save == bytes(0xC00)
        assert left == [0, 0]
        whole = bench.cpu.read(0, bench.machine.dram.size)
        assert not any((SECRET + i).to_bytes(8, "little") in whole for i in range(4))
        assert (bench.read_registers().rax, bench.read_registers().r15) == (SECRET, SECRET + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_host_changes_of_a_guest(kind: str) -> None:
    """Registers written between two exits: the guest's without SEV-ES, nobody's with it."""

    async def program(cpu: GuestCpu) -> Any:
        await cpu.load(rax=1, rbx=2)
        await cpu.pause()
        return await cpu.look("rax", "rbx")

    bench = AnyBench(kind)
    bench.intercept(0x77)
    bench.start(program)
    bench.run()
    bench.machine.dram.write(VMCB_PAGE * PAGE + 0x400 + 0x1F8, (0x55).to_bytes(8, "little"))
    rip = bench.read_vmcb().next_rip
    if kind in ("plain", "sev"):
        bench.machine.dram.write(VMCB_PAGE * PAGE + 0x400 + 0x178, rip.to_bytes(8, "little"))
    bench.cpu.registers()["rbx"] = 0x66
    bench.run()
    assert bench.executor.outcome == ((0x55, 0x66) if kind in ("plain", "sev") else (1, 2))


def test_registers_that_one_guest_leaves_the_next_one_finds() -> None:
    """Without SEV-ES nobody but host software keeps two guests' registers apart; another core has its own."""

    async def look(cpu: GuestCpu) -> Any:
        return await cpu.look("rbx", "dr0")

    first, found = AnyBench("sev"), []
    first.start(secret)
    first.run()
    for core in (0, 1):
        first.start(look)
        first.cpu.vmrun(VMCB_PAGE * PAGE, first.executor, "vcpu1", core)
        found.append(first.executor.outcome)
    assert found == [(SECRET + 1, 0), (0, 0)]


@pytest.mark.parametrize("features", [0, DEBUG_VIRTUALIZATION])
@pytest.mark.parametrize("kind", ["es", "snp"])
def test_breakpoints(kind: str, features: int) -> None:
    """DR0 to DR3 and their masks: swapped with the VMSA by DebugVirtualization, else the host's and left to it."""

    async def program(cpu: GuestCpu) -> Any:
        found = await cpu.look("dr0", "dr3_addr_mask")
        await cpu.load(dr0=0x1000, dr7=0x401)
        return found

    bench = AnyBench(kind, features=1 | features)
    bench.cpu.registers().update(dr0=0xAAAA, dr3_addr_mask=0xFF)
    bench.start(program)
    bench.run()
    saved, left = bench.read_registers(), bench.cpu.registers()
    if features:
        assert bench.executor.outcome == (0, 0)
        assert (saved.dr0, left["dr0"], left["dr3_addr_mask"]) == (0x1000, 0xAAAA, 0xFF)
    else:
        assert bench.executor.outcome == (0xAAAA, 0xFF)
        assert (saved.dr0, left["dr0"]) == (0, 0x1000)
    assert saved.dr7 == 0x401


# Secure TSC.


async def two_stamps(cpu: GuestCpu) -> Any:
    return await cpu.rdtsc(), await cpu.rdtsc()


@pytest.mark.parametrize("kind", KINDS)
def test_time_without_secure_tsc_is_the_hosts_to_shift(kind: str) -> None:
    bench = AnyBench(kind)
    bench.machine.tsc = 10**9
    bench.set_vmcb(tsc_offset=2**64 - 5 * 10**8)
    bench.start(two_stamps)
    bench.run()
    first, second = bench.executor.outcome
    assert first == 10**9 + 1000 - 5 * 10**8
    assert second == first + 1000
    if kind in ("es", "snp"):
        assert bench.read_registers().rdx == second >> 32


def test_secure_tsc_is_the_guests_own() -> None:
    """Scale 1.5 in 8.32 bits, offset from the VMSA; the VMCB's offset does not count, GUEST_TSC_FREQ is scaled too."""

    async def program(cpu: GuestCpu) -> Any:
        return await cpu.rdtsc(), await cpu.rdmsr(Msr.GUEST_TSC_FREQ)

    bench = AnyBench()
    bench.set_vmsa(sev_features=1 | SECURE_TSC, guest_tsc_scale=3 << 31, guest_tsc_offset=2**64 - 7)
    bench.set_vmcb(tsc_offset=12345)
    bench.machine.tsc = 2**40
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == ((2**40 + 1000) * 3 // 2 - 7, 3600)


def test_secure_tsc_of_one_machine_is_one_clock() -> None:
    """Every vCPU and every core reads the same counter."""
    bench = AnyBench()
    stamps = []
    for core in (0, 1, 0):
        bench.start(two_stamps)
        bench.cpu.vmrun(VMCB_PAGE * PAGE, bench.executor, "vcpu0", core)
        stamps += bench.executor.outcome
    assert stamps == sorted(set(stamps))


# The nonce.

BITMAP = {0x05: 0x80, 0x07: 0x88, 0x0C: 0xEE, 0x0D: 0xFF, 0x10: 0xF0, 0x19: 0x3F}
BITMAP |= dict.fromkeys(range(0x11, 0x19), 0xFF) | dict.fromkeys(range(0x26, 0x3F), 0xFF)


def words(bench: Bench) -> list[int]:
    page = bench.machine.encryption.read(ASID, VMSA_PAGE * PAGE, PAGE)
    return [int.from_bytes(page[at : at + 8], "little") for at in range(0, PAGE, 8)]


def test_protected_registers_by_an_independent_reading() -> None:
    """Every quadword of the bitmap is XORed with the nonce at 0x300, every other is as it is."""

    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rax=SECRET, rsp=SECRET + 1, r15=SECRET + 2, cr2=SECRET + 3)

    plain, protected = AnyBench(), AnyBench(features=1 | REG_PROT)
    for bench in (plain, protected):
        bench.start(program)
        bench.run()
    mine, theirs = words(plain), words(protected)
    nonce = theirs[0x300 // 8]
    assert nonce
    for number in range(512):
        if number * 8 in (0x300, 0x3B0):  # the nonce itself, SEV_FEATURES
            continue
        marked = BITMAP.get(number // 8, 0) >> number % 8 & 1
        assert theirs[number] == mine[number] ^ nonce * marked, hex(number * 8)
    assert theirs[0x1F8 // 8] != SECRET


@pytest.mark.parametrize("features", [0, REG_PROT])
def test_equal_registers_look_equal_only_without_the_nonce(features: int) -> None:
    """The host watches the ciphertext of RAX over exits: a dictionary without the feature, noise with it."""

    async def program(cpu: GuestCpu) -> Any:
        for value in (1, 2, 1, 2, 1):
            await cpu.load(rax=value)
            await cpu.hlt()
        return await cpu.look("rax")

    bench = AnyBench(features=1 | features)
    bench.start(program)
    seen = []
    for _ in range(5):
        bench.run()
        seen.append(bench.cpu.read(VMSA_PAGE * PAGE + 0x1F0, 16))
    assert len(set(seen)) == (5 if features else 2)
    bench.run()
    assert bench.executor.outcome == (1,)


def test_nonces_follow_from_the_boot() -> None:
    pages = []
    for _ in range(2):
        bench = AnyBench(features=1 | REG_PROT)
        bench.start(secret)
        bench.run()
        pages.append(words(bench))
    assert pages[0] == pages[1]
    before = Snapshot(machine=bench.machine, executor=bench.executor)
    bench.start(secret)
    bench.run()
    third = words(bench)
    assert third[0x300 // 8] != pages[1][0x300 // 8]
    before.restore()
    bench.start(secret)
    bench.run()
    assert words(bench) == third


# The checksum.


def test_the_checksum_follows_the_page() -> None:
    """CRC-32 of bytes 0 to 0xFBF, kept at every exit; a page from an earlier exit is refused."""

    async def program(cpu: GuestCpu) -> None:
        for value in range(3):
            await cpu.load(rax=value)
            await cpu.hlt()

    bench, pages = AnyBench("es"), []
    bench.start(program)
    for _ in range(2):
        bench.run()
        page = bench.machine.encryption.read(ASID, ES_VMSA_PAGE * PAGE, PAGE)
        assert bench.machine.vmsa_checksums == {ES_VMSA_PAGE: crc32(page[:0xFC0])}
        pages.append(bench.cpu.read(ES_VMSA_PAGE * PAGE, PAGE))
    bench.cpu.write(ES_VMSA_PAGE * PAGE, pages[0])
    assert isinstance(bench.run(), Invalid)
    bench.cpu.write(ES_VMSA_PAGE * PAGE, pages[1])
    assert bench.run() == Hlt()


def test_only_sev_es_pages_have_a_checksum() -> None:
    for kind in ("plain", "sev", "snp"):
        bench = AnyBench(kind)
        bench.start(secret)
        assert bench.run() == Hlt()
        assert bench.machine.vmsa_checksums == {}


def test_a_vmsa_without_svme_is_not_run() -> None:
    """How an SVSM takes a save area out of service while it serves the call of its vCPU."""
    bench = AnyBench()
    bench.set_vmsa(efer=0)
    exit_ = bench.run()
    assert isinstance(exit_, Invalid)
    assert exit_.rule == "EFER.SVME is set in the VMSA"


# VMPLs.

OTHER_VMSA = 0x13


def test_the_hypervisor_runs_another_vmpl_of_the_same_guest() -> None:
    """Two VMSAs of one ASID: the page's rights are those of the VMPL in the VMSA that runs."""
    bench = AnyBench()
    bench.assign(OTHER_VMSA, 0xFFFFFFFFE, vmsa=1)
    bench.machine.encryption.write(ASID, OTHER_VMSA * PAGE, bytes(0xCA) + b"\x02" + bytes(PAGE - 0xCB))
    bench.machine.encryption.write(ASID, OTHER_VMSA * PAGE + 0xD0, (0x1000).to_bytes(8, "little"))
    features = (1).to_bytes(8, "little")
    bench.machine.encryption.write(ASID, OTHER_VMSA * PAGE + 0x3B0, features)
    bench.give(5, 0x905, vmpl=0x0F)
    bench.give(6, 0x906, vmpl=0x03_0F | 0x01_00_00)

    async def read(cpu: GuestCpu) -> Any:
        try:
            return await cpu.read(0x6000, 1), await cpu.read(0x5000, 1)
        except GuestException as exception:
            return exception

    bench.start(read)
    assert bench.run() == Hlt()
    assert isinstance(bench.executor.outcome, tuple)
    bench.set_vmcb(vmsa_pa=OTHER_VMSA * PAGE)
    bench.start(read)
    exit_: Any = bench.run()
    assert exit_.code == 0x400
    assert (exit_.gpa, exit_.error >> 36 & 1, exit_.error >> 31 & 1) == (0x5000, 1, 1)
    bench.give(5, 0x907, vmpl=0x01_00_0F)
    assert bench.run() == Hlt()
    assert isinstance(bench.executor.outcome, tuple)


def test_a_vmsa_that_a_guest_has_made_runs() -> None:
    """RMPADJUST by VMPL0 with the VMSA bit makes a page runnable; without the bit it is refused."""

    async def make(cpu: GuestCpu, vmsa: bool) -> Any:
        await cpu.write(0x7000, bytes(0xCA) + b"\x02" + bytes(0x3B0 - 0xCB) + b"\x01" + bytes(PAGE - 0x3B1))
        await cpu.write(0x70D0, (0x1000).to_bytes(8, "little"))
        return (await cpu.rmpadjust(0x7000, 1, vmpl=2, permissions=1, vmsa=vmsa)).tolist()

    async def who(cpu: GuestCpu) -> Any:
        return await cpu.look("vmpl", "rip")

    bench = AnyBench()
    bench.give(7, 0x907)
    for vmsa in (False, True):
        bench.set_vmcb()
        bench.start(lambda cpu, vmsa=vmsa: make(cpu, vmsa))  # type: ignore[misc]
        assert bench.run() == Hlt()
        assert bench.executor.outcome == [0]
        bench.set_vmcb(vmsa_pa=0x907 * PAGE)
        bench.start(who)
        exit_ = bench.run()
        if vmsa:
            assert exit_ == Hlt()
            assert bench.executor.outcome == (2, 0)
        else:
            assert isinstance(exit_, Invalid)
            assert "marked as a VMSA" in exit_.rule
            bench.executor = type(bench.executor)()
