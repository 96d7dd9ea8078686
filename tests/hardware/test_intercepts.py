"""Who answers an instruction: every instruction, kind of guest and intercept, against a table typed from the sheet."""

from collections.abc import Callable
from typing import Any

import pytest

from snpbook.hardware.exits import GuestException, Hlt, Intercepted, Npf, Shutdown, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from tests.hardware.guests import PAGE, VMCB_PAGE
from tests.hardware.kinds import AnyBench

KINDS = ["plain", "sev", "es", "snp"]
MAPS = 0x2000
"""First page of the permission maps that tests set up: MSRs, then ports."""

OPERATIONS: dict[str, tuple[int, Callable[[GuestCpu], Any]]] = {
    "CPUID": (0x72, lambda cpu: cpu.cpuid(0)),
    "RDMSR": (0x7C, lambda cpu: cpu.rdmsr(Msr.SYSCFG)),
    "WRMSR": (0x7C, lambda cpu: cpu.wrmsr(Msr.IBS_OP_CTL, 5)),
    "IN": (0x7B, lambda cpu: cpu.port_in(0x60)),
    "OUT": (0x7B, lambda cpu: cpu.port_out(0x3F8, 0x41)),
    "RDTSC": (0x6E, lambda cpu: cpu.rdtsc()),
    "WBINVD": (0x89, lambda cpu: cpu.wbinvd()),
    "INVLPG": (0x79, lambda cpu: cpu.invlpg(0x7000)),
    "MONITOR": (0x8A, lambda cpu: cpu.monitor(0x1000)),
    "MWAIT": (0x8B, lambda cpu: cpu.mwait()),
    "VMMCALL": (0x81, lambda cpu: cpu.vmmcall()),
    "MOV DR7": (0x37, lambda cpu: cpu.load(dr7=0x402)),
    "MOV from DR7": (0x27, lambda cpu: cpu.read_dr7()),
    "MOV CR4": (0x14, lambda cpu: cpu.load(cr4=0x20)),
    "PAUSE": (0x77, lambda cpu: cpu.pause()),
    "HLT": (0x78, lambda cpu: cpu.hlt()),
    "VMGEXIT": (0x81, lambda cpu: cpu.vmgexit()),
}
AUTOMATIC = {"PAUSE", "HLT"}
ALWAYS_NAE_IN_SNP = {"CPUID", "IN", "OUT"}
MAPPED = {"RDMSR", "WRMSR", "IN", "OUT"}


def expected(name: str, kind: str, intercepted: bool) -> str:
    """The sheet's rules in words: 7.4."""
    if name == "VMGEXIT" and kind in ("es", "snp"):
        return "vmgexit, behind"
    if kind == "snp" and name in ALWAYS_NAE_IN_SNP:
        return "#VC"
    if not intercepted:
        return "#UD" if name in ("VMMCALL", "VMGEXIT") else "done"
    if kind in ("plain", "sev"):
        return "exit, at it"
    return "exit, behind" if name in AUTOMATIC else "#VC"


def arm(bench: AnyBench, *codes: int) -> None:
    """Intercept, and permission maps that forbid everything."""
    bench.vmcb |= {"msrpm_base_pa": MAPS * PAGE, "iopm_base_pa": (MAPS + 2) * PAGE}
    bench.machine.dram.write(MAPS * PAGE, b"\xff" * 5 * PAGE)
    bench.vmcb["intercepts"] = sum(1 << code for code in {0x7F, 0x80, *codes}).to_bytes(24, "little")
    bench.set_vmcb()


@pytest.mark.parametrize("intercepted", [False, True], ids=["free", "intercepted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_who_answers(name: str, kind: str, intercepted: bool) -> None:
    code, operation = OPERATIONS[name]

    async def program(cpu: GuestCpu) -> Any:
        await cpu.load(rbx=1)
        try:
            await operation(cpu)
        except GuestException as exception:
            return exception.vector, int(exception.error)
        return "done"

    bench = AnyBench(kind)
    arm(bench, *[code] * intercepted)
    if not intercepted:
        bench.machine.dram.write(MAPS * PAGE, bytes(5 * PAGE))
    bench.start(program)
    exit_ = bench.run()
    rip = bench.read_registers().rip
    outcome = bench.executor.outcome
    match expected(name, kind, intercepted):
        case "done":
            assert (exit_, outcome) == (Hlt(), "done")
        case "#VC":
            assert (exit_, outcome) == (Hlt(), (29, code))
        case "#UD":
            assert (exit_, outcome) == (Hlt(), (6, 0))
        case "vmgexit, behind":
            assert (exit_, rip, bench.executor.busy) == (Vmgexit(), 2, True)
        case "exit, behind":
            assert exit_.code == code
            assert (rip, bench.executor.busy) == (2, True)
            assert bench.run() == Hlt()
            assert bench.executor.outcome == "done"
        case "exit, at it":
            assert exit_.code == code
            assert (rip, bench.executor.busy, bench.read_vmcb().next_rip) == (1, True, 2)
            assert bench.run() == exit_  # nobody did it: once more


class Emulator:
    """A hypervisor of a guest without SEV-ES, which finds operands in the save area and puts results there."""

    def __init__(self, bench: AnyBench) -> None:
        self.bench = bench

    def answer(self, rax: int, **others: int) -> None:
        vmcb = self.bench.read_vmcb()
        save = self.bench.read_save_area().replace(rax=rax, rip=vmcb.next_rip)
        self.bench.machine.dram.write(VMCB_PAGE * PAGE + 0x400, bytes(save))
        self.bench.cpu.registers().update(others)


@pytest.mark.parametrize("kind", ["plain", "sev"])
def test_a_hypervisor_emulates_without_sev_es(kind: str) -> None:
    """Registers in the clear: leaf and port come in, made-up answers go out, and the guest goes on behind."""

    async def program(cpu: GuestCpu) -> Any:
        leaf = await cpu.cpuid(0x80000000, 7)
        await cpu.port_out(0x3F8, 0x41)
        byte = await cpu.port_in(0x60)
        word = await cpu.port_in(0x64, 2)
        msr = await cpu.rdmsr(Msr.SYSCFG)
        await cpu.wrmsr(Msr.SYSCFG, 0x1_0000_0002)
        return leaf, byte, word, msr

    bench = AnyBench(kind)
    arm(bench, 0x72, 0x7B, 0x7C)
    host, registers = Emulator(bench), bench.cpu.registers()
    bench.start(program)
    assert bench.run() == Intercepted(0x72)
    assert (bench.read_save_area().rax, registers["rcx"]) == (0x80000000, 7)
    host.answer(0x1_0000_0011, rbx=0x22, rcx=0x33, rdx=0x44)
    assert bench.run() == Intercepted(0x7B, 0x3F8 << 16 | 1 << 9 | 1 << 4)
    assert bench.read_vmcb().exit_info_1 == 0x3F8 << 16 | 1 << 9 | 1 << 4
    assert (bench.read_save_area().rax, registers["rdx"]) == (0x41, 0x3F8)
    host.answer(0)
    assert bench.run() == Intercepted(0x7B, 0x60 << 16 | 1 << 9 | 1 << 4 | 1)
    host.answer(0x1AB)
    assert bench.run() == Intercepted(0x7B, 0x64 << 16 | 1 << 9 | 1 << 5 | 1)
    host.answer(0x5_6789)
    assert bench.run() == Intercepted(0x7C, 0)
    assert registers["rcx"] == Msr.SYSCFG
    host.answer(0xF_0000_0001, rdx=0xF_0000_0002)
    assert bench.run() == Intercepted(0x7C, 1)
    assert (bench.read_save_area().rax, registers["rdx"]) == (2, 1)
    host.answer(0)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == ((0x11, 0x22, 0x33, 0x44), 0xAB, 0x6789, 0x2_0000_0001)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_core_itself_answers(kind: str) -> None:
    async def program(cpu: GuestCpu) -> Any:
        msr = await cpu.rdmsr(Msr.HWCR)
        await cpu.wrmsr(Msr.IBS_OP_CTL, 0x1_0000_0002)
        try:
            await cpu.rdmsr(0xC0010199)
        except GuestException as exception:
            return msr, exception.vector, await cpu.read_dr7()

    async def identify(cpu: GuestCpu) -> Any:
        return await cpu.cpuid(0x80000000), await cpu.port_in(0x60), await cpu.port_in(0x60, 4)

    bench = AnyBench(kind)
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == (1, 13, 0)
    assert [core.rdmsr(Msr.IBS_OP_CTL) for core in bench.machine.cores] == [0x1_0000_0002, 0]
    if kind != "snp":
        bench.start(identify)
        bench.run()
        assert bench.executor.outcome == ((0x80000028, 0x68747541, 0x444D4163, 0x69746E65), 0xFF, 0xFFFFFFFF)


def test_msrs_by_the_permission_map() -> None:
    """Two bits for each MSR of three ranges of 8192; the others are intercepted whatever the map says."""
    probes = [0x10, 0x1FFF, 0xC0000080, 0xC0010015, 0xC0011030, 0x2000, 0xBFFFFFFF, 0xC0002000, 0xC0012000]

    async def program(cpu: GuestCpu) -> Any:
        found = []
        for msr in probes:
            for access in (cpu.rdmsr(msr), cpu.wrmsr(msr, 1)):
                try:
                    await access
                except GuestException as exception:
                    found.append(exception.vector)
                else:
                    found.append(0)
        return found

    bench = AnyBench("es")
    arm(bench, 0x7C)
    bench.machine.dram.write(MAPS * PAGE, bytes(2 * PAGE))
    at = 0x1000 + 0x15 // 4  # HWCR: the third range
    bench.machine.dram.write(MAPS * PAGE + at, bytes([0b10 << 2 * (0x15 % 4)]))  # its write alone
    bench.machine.dram.write(MAPS * PAGE + 0x1FFF // 4, bytes([0b01 << 2 * (0x1FFF % 4)]))
    bench.start(program)
    bench.run()
    free = {0x10: [0, 0], 0x1FFF: [29, 13], 0xC0000080: [0, 0], 0xC0010015: [0, 29], 0xC0011030: [0, 0]}
    assert bench.executor.outcome == [vector for msr in probes for vector in free.get(msr, [29, 29])]


def test_ports_by_the_permission_map() -> None:
    """One bit for each port; an access of several bytes is intercepted if any of them is."""

    async def program(cpu: GuestCpu) -> Any:
        found = []
        for port, size in ((0x60, 1), (0x61, 1), (0x60, 2), (0x5D, 4), (0x5E, 4), (0xFFFF, 1)):
            try:
                found.append(await cpu.port_in(port, size))
            except GuestException as exception:
                found.append((int(exception.error), exception.info))
        return found

    bench = AnyBench("es")
    arm(bench, 0x7B)
    bench.machine.dram.write((MAPS + 2) * PAGE, bytes(3 * PAGE))
    bench.machine.dram.write((MAPS + 2) * PAGE + 0x61 // 8, bytes([1 << 0x61 % 8]))
    bench.machine.dram.write((MAPS + 2) * PAGE + 0x1FFF, b"\x80")
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == [
        0xFF,
        (0x7B, 0x61 << 16 | 0x211),
        (0x7B, 0x60 << 16 | 0x221),
        0xFFFFFFFF,
        (0x7B, 0x5E << 16 | 0x241),
        (0x7B, 0xFFFF << 16 | 0x211),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_write_traps(kind: str) -> None:
    """The write has been done, RIP stands behind it, EXITINFO1 is the value; also in the middle of several loads."""

    async def program(cpu: GuestCpu) -> Any:
        await cpu.load(cr4=0x60, rbx=5, efer=0x100, cr0=0x11, cr3=0x5000)
        return await cpu.look("cr4", "rbx", "efer", "cr0", "cr3")

    bench = AnyBench(kind)
    arm(bench, 0x8F, 0x90, 0x94)
    bench.start(program)
    efer = 0x1100 if kind in ("es", "snp") else 0x100
    seen = [bench.run() for _ in range(4)]
    assert [(exit_.code, getattr(exit_, "info_1", None)) for exit_ in seen] == [
        (0x94, 0x60), (0x8F, 0x100), (0x90, 0x11), (0x78, None)
    ]  # fmt: skip
    assert bench.executor.outcome == (0x60, 5, efer, 0x11, 0x5000)


def test_svme_stays_set_with_sev_es() -> None:
    async def program(cpu: GuestCpu) -> Any:
        await cpu.load(efer=0)
        return await cpu.look("efer")

    for kind, efer in (("plain", 0), ("sev", 0), ("es", 0x1000), ("snp", 0x1000)):
        bench = AnyBench(kind)
        bench.start(program)
        bench.run()
        assert bench.executor.outcome == (efer,)
        assert bench.read_registers().efer == efer


@pytest.mark.parametrize("register", ["cr0", "cr3", "cr4", "efer"])
def test_loads_that_drop_translations(register: str) -> None:
    """The hypervisor moves a page and flushes nothing: the guest sees it once it has loaded the register."""

    async def program(cpu: GuestCpu) -> Any:
        first = await cpu.read(0x5000, 1)
        await cpu.pause()
        second = await cpu.read(0x5000, 1)
        await cpu.load(rbx=1)
        third = await cpu.read(0x5000, 1)
        await cpu.load(**{register: 0x10})
        return first, second, third, await cpu.read(0x5000, 1)

    bench = AnyBench("es")
    bench.intercept(0x77)
    for page in (0x905, 0x906):
        bench.machine.encryption.write(5, page * PAGE, bytes([page & 0xFF]))
    bench.map(5, 0x905)
    bench.start(program)
    bench.run()
    bench.map(5, 0x906)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == (b"\x05", b"\x05", b"\x05", b"\x06")


def test_dr7_has_32_bits() -> None:
    async def program(cpu: GuestCpu) -> Any:
        try:
            await cpu.load(dr7=1 << 32)
        except GuestException as exception:
            return exception.vector, exception.error, await cpu.look("dr7")

    bench = AnyBench()
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == (13, 0, (0,))


def test_a_handler_finds_the_operand_of_a_load() -> None:
    """MOV DR7, RAX: the handler keeps the value, and the registers behind it are loaded."""

    async def program(cpu: GuestCpu) -> Any:
        async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
            seen.append((int(exception.error), *await cpu.look("rax")))
            return True

        seen: list[Any] = []
        cpu.set_handler(29, handler)
        await cpu.load(rsi=1, dr7=0x455, rdi=2)
        return seen, await cpu.look("rsi", "dr7", "rdi")

    bench = AnyBench()
    bench.intercept(0x37)
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == ([(0x37, 0x455)], (1, 0, 2))


def test_an_intercept_of_vc_itself_changes_nothing() -> None:
    async def program(cpu: GuestCpu) -> Any:
        try:
            await cpu.cpuid(0)
        except GuestException as exception:
            return exception.vector, int(exception.error)

    bench = AnyBench()
    bench.intercept(0x5D)
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == (29, 0x72)


@pytest.mark.parametrize("name", ["RDMSR", "WRMSR", "WBINVD", "MONITOR", "MWAIT", "HLT", "MOV from DR7"])
def test_above_cpl_0_it_is_gp_and_no_exit(name: str) -> None:
    code, operation = OPERATIONS[name]

    async def program(cpu: GuestCpu) -> Any:
        try:
            await operation(cpu)
        except GuestException as exception:
            return exception.vector, exception.error

    bench = AnyBench()
    arm(bench, code)
    bench.set_vmsa(cpl=3)
    bench.start(program)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == (13, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_intercepted_exceptions(kind: str) -> None:
    """#GP: an exit without SEV-ES, else #VC with the exception's exit code."""

    async def program(cpu: GuestCpu) -> Any:
        try:
            await cpu.rdmsr(0xC0010199)
        except GuestException as exception:
            return exception.vector, int(exception.error)

    bench = AnyBench(kind)
    arm(bench, 0x4D)
    bench.start(program)
    exit_ = bench.run()
    if kind in ("plain", "sev"):
        assert exit_ == Intercepted(0x4D)
        assert bench.executor.busy
    else:
        assert bench.executor.outcome == (29, 0x4D)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_mapped_devices(kind: str) -> None:
    """A nested entry with a reserved bit: NPF for the hypervisor, or #VC 0x400 for the guest with SEV-ES."""

    async def program(cpu: GuestCpu) -> Any:
        async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
            seen.append((int(exception.error), exception.address, bool(exception.info & 2), *await cpu.look("rax")))
            await cpu.load(rax=0x1234)
            return True

        seen: list[Any] = []
        cpu.set_handler(29, handler)
        await cpu.write(0x5010, b"\x55\x66")
        return await cpu.read(0x5020, 2), seen

    bench = AnyBench(kind)
    bench.map(5, 1 << 34)  # an address that the machine does not have
    bench.start(program)
    exit_ = bench.run()
    if kind in ("plain", "sev"):
        assert isinstance(exit_, Npf)
        assert (exit_.gpa, exit_.error & 8, exit_.error & 2) == (0x5000, 8, 2)
        assert bench.read_save_area().rax == 0x6655
    else:
        assert exit_ == Hlt()
        data, seen = bench.executor.outcome
        assert (data, seen) == (b"\x34\x12", [(0x400, 0x5010, True, 0x6655), (0x400, 0x5020, False, 0x1234)])


def test_an_unhandled_vc_ends_the_vcpu() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.cpuid(0)

    bench = AnyBench()
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Shutdown)
    assert "vector 29, error 0x72" in exit_.reason
