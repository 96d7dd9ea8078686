"""The host's door to the silicon: what it may write, what its instructions answer, and the mailbox."""

from typing import Any

import numpy as np
import pytest

from snpbook.hardware.exits import GeneralProtection, HostPageFault, InvalidOpcode
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.machine import Machine
from snpbook.hardware.mailbox import Mailbox
from snpbook.hardware.ports import HostCpu
from snpbook.spec.commands import MailboxRegister, PspRegister
from snpbook.spec.msr import Msr
from snpbook.spec.products import product
from snpbook.trace import Instruction, Trace
from tests.hardware.guests import PAGE, Bench

GUEST = NewState(assigned=True, asid=6)
PAGES = range(0x40, 0x42)


def with_guest_pages() -> Bench:
    bench = Bench()
    bench.machine.dram.write(PAGES.start * PAGE, b"\x77" * 2 * PAGE)
    assert not bench.cpu.rmpupdate(PAGES, range(2), GUEST).any()
    return bench


WRITES: dict[str, Any] = {
    "inside": lambda cpu: cpu.write(0x40 * PAGE + 5, b"x"),
    "its last byte": lambda cpu: cpu.write(0x42 * PAGE - 1, b"xy"),
    "the end of a long write": lambda cpu: cpu.write(0x3E * PAGE, bytes(2 * PAGE + 1)),
    "a run of pages": lambda cpu: cpu.write_pages(range(0x3F, 0x41), np.zeros((2, PAGE), np.uint8)),
    "scattered pages": lambda cpu: cpu.write_pages(np.array([1, 0x41], np.uint64), np.zeros((2, PAGE), np.uint8)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_a_guests_page_fault_and_store_nothing(name: str) -> None:
    bench = with_guest_pages()
    before = bench.cpu.read(0, 0x50 * PAGE)
    with pytest.raises(HostPageFault) as caught:
        WRITES[name](bench.cpu)
    assert int(caught.value.error) == 1 << 31 | 0b11
    assert caught.value.spa in (0x40 * PAGE, 0x41 * PAGE)
    assert (caught.value.expected, caught.value.found, caught.value.cite) == (
        "HYPERVISOR",
        "GUEST_INVALID",
        "APM2 15.36.10",
    )
    assert bench.cpu.read(0, 0x50 * PAGE) == before


def test_reads_are_never_checked() -> None:
    bench = with_guest_pages()
    assert bench.cpu.read(0x40 * PAGE, 4) == b"\x77" * 4
    assert (bench.cpu.read_pages(PAGES) == 0x77).all()


def test_what_a_host_may_write() -> None:
    """Its own pages, HV-Fixed ones, nothing at all; and everything before SNP is on."""
    bench = with_guest_pages()
    bench.machine.rmp.store(range(0x50, 0x51), np.array([[4, 0]], np.uint64))
    bench.cpu.write(0x50 * PAGE, b"fixed")
    bench.cpu.write(0x40 * PAGE + 1, b"")
    bench.cpu.rmpupdate(PAGES, range(2), HYPERVISOR)
    bench.cpu.write(0x40 * PAGE, b"mine again")
    assert bench.cpu.read(0x40 * PAGE, 10) == b"mine again"
    off = Bench(snp=False)
    off.assign(0x40, 1)
    off.cpu.write(0x40 * PAGE, b"no SNP")


def test_the_state_of_a_page_in_a_2mb_entry_is_told() -> None:
    bench = Bench()
    bench.cpu.rmpupdate(range(0x400, 0x401), range(1), NewState(assigned=True, asid=6, large=True))
    with pytest.raises(HostPageFault) as caught:
        bench.cpu.write(0x405 * PAGE, b"x")
    assert caught.value.found == "GUEST_INVALID"
    assert str(caught.value).startswith(
        "#PF at 0x405000, error 0x80000003: a host write needs a page of the hypervisor"
    )


def test_rmpupdate_is_traced_and_counted() -> None:
    bench = with_guest_pages()
    bench.cpu.rmpupdate(np.array([0x40, 0x45, 10**9]), np.array([0, 5, 0]), FIRMWARE)
    first, second = bench.log.of(Instruction, "RMPUPDATE")
    assert (first.pages, first.actor, first.status.tolist()) == (PAGES, "host", [0, 0])
    assert second.status.tolist() == [0, 0, 1]
    assert second.before[:, 0].tolist() == [0x0030000000000001, 0, 0]
    assert second.after[:, 0].tolist() == [0x5, 0x5005, 0]
    assert bench.counts.rmpupdates == 5
    assert bench.cpu.rmp_entry(0x41).asid == 6
    assert bench.cpu.rmp_words(range(0x41, 0x42))[0, 0] == 0x0030000000001001


def test_psmash_and_rmpread_are_traced() -> None:
    bench = Bench("turin")
    heads, large = range(0x400, 0x800, 0x200), NewState(assigned=True, asid=6, large=True)
    assert not bench.cpu.rmpupdate(heads, range(0, 1024, 512), large).any()
    assert bench.cpu.psmash(heads).tolist() == [0, 0]
    (event,) = bench.log.of(Instruction, "PSMASH")
    assert (event.pages, event.actor, event.status.tolist()) == (heads, "host", [0, 0])
    assert (event.before ^ event.after).tolist() == [[2 | 511 << 3, 0]] * 2
    codes, state = bench.cpu.rmpread(range(0x401, 0x403))
    assert (codes.tolist(), state[1].tobytes().hex()) == ([0, 0], "00200000000000000100000006000000")
    (event,) = bench.log.of(Instruction, "RMPREAD")
    assert (event.before == event.after).all()


def test_pages_in_use_stay_as_they_are() -> None:
    bench = Bench()
    large = NewState(assigned=True, asid=6, large=True)
    assert not bench.cpu.rmpupdate(range(0x400, 0x401), range(1), large).any()
    bench.machine.in_use = {0x40, 0x4FF}
    assert bench.cpu.rmpupdate(range(0x40, 0x41), range(1), GUEST).tolist() == [3]
    assert bench.cpu.rmpupdate(range(0x3F, 0x42), range(3), GUEST).tolist() == [0, 3, 0]
    assert bench.cpu.rmpupdate(range(0x400, 0x401), range(1), HYPERVISOR).tolist() == [4]
    assert bench.cpu.psmash(range(0x400, 0x401)).tolist() == [3]
    bench.machine.in_use.clear()
    assert bench.cpu.psmash(range(0x400, 0x401)).tolist() == [0]


def test_instructions_do_not_exist_before_snp_is_on() -> None:
    bench = Bench("turin", snp=False)
    for name, execute in {
        "RMPUPDATE": lambda: bench.cpu.rmpupdate(PAGES, range(2), GUEST),
        "PSMASH": lambda: bench.cpu.psmash(PAGES),
        "RMPREAD": lambda: bench.cpu.rmpread(PAGES),
    }.items():
        with pytest.raises(InvalidOpcode, match=f"{name} needs SYSCFG"):
            execute()
    with pytest.raises(InvalidOpcode, match=r"RMPREAD needs a processor that has it .*found genoa"):
        Bench("genoa").cpu.rmpread(PAGES)


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda c: c.read(64 << 20, 1), ValueError, "outside DRAM"),
    (lambda c: c.write(-1, b"x"), ValueError, "spa = -1: no address"),
    (lambda c: c.write(1.0, b"x"), TypeError, r"spa = 1\.0: an integer"),
    (lambda c: c.write((64 << 20) - 1, b"xy"), ValueError, "outside DRAM"),
    (lambda c: c.write_pages(range(16383, 16385), np.zeros((2, PAGE), np.uint8)), ValueError, "beyond the last"),
    (lambda c: c.write_pages(range(2), np.zeros((1, PAGE), np.uint8)), ValueError, "data = uint8"),
    (lambda c: c.write_pages(np.array([1.0]), np.zeros((1, PAGE), np.uint8)), TypeError, "pages = float64"),
    (lambda c: c.read_pages(range(16384, 16385)), ValueError, "beyond the last"),
    (lambda c: c.rmpupdate(np.array([1.5]), range(1), GUEST), TypeError, "pages = float64"),
    (lambda c: c.rmp_words(range(64512, 64513)), ValueError, "beyond the last"),
    (lambda c: c.rmp_entry(-1), ValueError, "-1 is no page number"),
    (lambda c: c.mailbox_write(MailboxRegister.COMMAND, 1 << 32), ValueError, "a mailbox register holds 32 bits"),
    (lambda c: c.mailbox_write(MailboxRegister.COMMAND, 0.5), TypeError, r"value = 0\.5: an integer"),
    (lambda c: c.write(0, b"abc", mapping=5), ValueError, "mapping = 0x5: pages of 4 KB, 2 MB or 1 GB"),
    (lambda c: c.write(0, b"", mapping=1.5), TypeError, r"mapping = 1\.5: an integer"),
    (lambda c: c.clflush(1.5, 64), TypeError, r"spa = 1\.5: an integer"),
    (lambda c: c.clflush(0, "64"), TypeError, "size = '64': an integer"),
    (lambda c: c.clflush(1 << 50, 64), ValueError, "spa = 0x4000000000000, size = 0x40: outside DRAM"),
    (lambda c: c.clflush(64, -64), ValueError, "size = -0x40: outside DRAM"),
    (lambda c: c.rdmsr(1.5), TypeError, r"msr = 1\.5: an integer"),
    (lambda c: c.wrmsr("SYSCFG", 0, 0), TypeError, "msr = 'SYSCFG': an integer"),
    (lambda c: c.rdmsr(Msr.SYSCFG, 2), ValueError, "core = 2: the machine has cores 0 to 1"),
    (lambda c: c.wrmsr(Msr.SYSCFG, 0, -1), ValueError, "core = -1"),
    (lambda c: c.wrmsr(Msr.VM_HSAVE_PA, 1 << 64, 0), ValueError, "value = 0x10000000000000000: a register holds 64"),
    (lambda c: c.wrmsr(Msr.VM_HSAVE_PA, 0.5, 0), TypeError, r"value = 0\.5: an integer"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_operands_change_nothing(call: Any, error: type[Exception], text: str) -> None:
    bench = with_guest_pages()
    before = bench.cpu.read(0, 0x50 * PAGE)
    with pytest.raises(error, match=text):
        call(bench.cpu)
    assert bench.cpu.read(0, 0x50 * PAGE) == before


# MSRs.


def test_msrs_by_core_and_their_locks() -> None:
    bench = Bench(snp=False)
    cpu = bench.cpu
    cpu.wrmsr(Msr.VM_HSAVE_PA, 0x5000, 1)
    assert [cpu.rdmsr(Msr.VM_HSAVE_PA, core) for core in cpu.cores] == [0, 0x5000]
    base = cpu.rdmsr(Msr.RMP_BASE)
    cpu.wrmsr(Msr.SYSCFG, cpu.rdmsr(Msr.SYSCFG) | 1 << 24, 0)
    assert not bench.machine.snp_enabled  # on one core only
    for msr, value in ((Msr.SYSCFG, 0), (Msr.RMP_BASE, 0), (Msr.RMP_END, 0)):
        cpu.wrmsr(msr, value, 0)  # silently ignored once SNPEn is set
        cpu.wrmsr(msr, value, 1)
    assert (cpu.rdmsr(Msr.SYSCFG) >> 24 & 1, cpu.rdmsr(Msr.RMP_BASE)) == (1, base)
    assert (cpu.rdmsr(Msr.SYSCFG, 1), cpu.rdmsr(Msr.RMP_BASE, 1)) == (0, 0)


def test_msrs_that_the_host_does_not_have() -> None:
    cpu = Bench().cpu
    assert cpu.rdmsr(Msr.SEV_STATUS) == 0
    for call in (
        lambda: cpu.rdmsr(Msr.GHCB),
        lambda: cpu.wrmsr(Msr.GHCB, 1, 0),
        lambda: cpu.wrmsr(Msr.SEV_STATUS, 1, 0),
    ):
        with pytest.raises(GeneralProtection, match="on the host"):
            call()


def test_wbinvd_is_done_on_every_core() -> None:
    bench = Bench()
    assert [core.wbinvd_done for core in bench.machine.cores] == [False, False]
    bench.cpu.wbinvd()
    assert [core.wbinvd_done for core in bench.machine.cores] == [True, True]


# The mailbox.


class Processor:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def execute(self, command: int, address: int) -> int:
        self.calls.append((command, address))
        return 0x16

    def execute_run(self, command: int, address: int, pages: range) -> tuple[int, int]:
        self.calls.append((command, address))
        return len(pages) - 1, 0x1A


def test_the_mailbox() -> None:
    bench, processor = Bench(), Processor()
    bench.cpu.mailbox_write(MailboxRegister.COMMAND, 0x83 << 16)  # nobody answers
    assert bench.cpu.mailbox_read(MailboxRegister.COMMAND) == 0x83 << 16
    bench.machine.mailbox.connect(processor)
    bench.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, 0x12)
    bench.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, 0x3456_7000)
    assert processor.calls == []
    bench.cpu.mailbox_write(MailboxRegister.COMMAND, 0x83 << 16 | 1)
    assert processor.calls == [(0x83, 0x12_3456_7000)]
    assert bench.cpu.mailbox_read(MailboxRegister.COMMAND) == 1 << 31 | 0x16
    bench.cpu.mailbox_write(MailboxRegister.COMMAND, 1 << 31)  # the response bit: no command
    assert bench.cpu.mailbox_read(MailboxRegister.ADDRESS_LOW) == 0, "no error information"
    bench.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, 0x12)
    bench.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, 0x3456_7000)
    assert bench.cpu.mailbox_repeat(0xA1, range(3)) == 2
    assert processor.calls[1:] == [(0xA1, 0x12_3456_7000)]
    assert bench.cpu.mailbox_read(MailboxRegister.COMMAND) == 1 << 31 | 0x1A
    assert Mailbox().repeat(0xA1, range(3)) == 0


def test_the_interrupt_of_a_command() -> None:
    """Raised by a command that asks for it, seen where it is enabled, gone when its status is written."""
    bench = Bench()
    bench.machine.mailbox.connect(Processor())
    cpu, status, enable = bench.cpu, PspRegister.INTERRUPT_STATUS, PspRegister.INTERRUPT_ENABLE
    cpu.mailbox_write(MailboxRegister.COMMAND, 0x83 << 16)
    assert (cpu.mailbox_read(status), cpu.mailbox_interrupt) == (0, False), "polled"
    cpu.mailbox_write(MailboxRegister.COMMAND, 0x83 << 16 | 1)
    assert (cpu.mailbox_read(status), cpu.mailbox_interrupt) == (2, False), "not enabled"
    cpu.mailbox_write(enable, 0xFFFFFFFF)
    assert cpu.mailbox_interrupt
    cpu.mailbox_write(status, 1)
    assert cpu.mailbox_interrupt, "another bit"
    cpu.mailbox_write(status, 0xFFFFFFFF)
    assert (cpu.mailbox_read(status), cpu.mailbox_interrupt) == (0, False)
    cpu.mailbox_write(MailboxRegister.COMMAND, 1 << 31 | 1)
    assert not cpu.mailbox_interrupt, "no command"
    cpu.mailbox_write(enable, 1)
    cpu.mailbox_write(MailboxRegister.COMMAND, 0x83 << 16 | 1)
    assert not cpu.mailbox_interrupt
    cpu.mailbox_write(enable, 2)
    assert cpu.mailbox_interrupt


def test_what_the_processor_can_do() -> None:
    bench = Bench()
    assert bench.cpu.mailbox_read(PspRegister.FEATURES) == 0, "nobody is there"
    bench.machine.mailbox.connect(Processor())
    assert bench.cpu.mailbox_read(PspRegister.FEATURES) == 1
    bench.cpu.mailbox_write(PspRegister.FEATURES, 0xFF)
    assert bench.cpu.mailbox_read(PspRegister.FEATURES) == 1


@pytest.mark.parametrize(
    ("command", "pages", "words"),
    [
        (-1, range(3), "command = -0x1: the register holds ids up to 0x7ff"),
        (0x800, range(3), "command = 0x800"),
        (1 << 40, range(3), "ids up to 0x7ff"),
        (0xA1, [1, 2], r"pages = \[1, 2\]: a run is an ascending range"),
        (0xA1, range(-1, 3), r"pages = range\(-1, 3\)"),
        (0xA1, range(3, 1, -1), "ascending"),
        (0xA1, range(0), "at least one page"),
    ],
)  # fmt: skip
def test_a_run_that_is_none(command: int, pages: Any, words: str) -> None:
    bench, processor = Bench(), Processor()
    bench.machine.mailbox.connect(processor)
    with pytest.raises(ValueError, match=words):
        bench.cpu.mailbox_repeat(command, pages)
    with pytest.raises(TypeError, match="command = 'A1': an integer"):
        bench.cpu.mailbox_repeat("A1", range(3))  # type: ignore[arg-type]
    assert processor.calls == []
    assert bench.cpu.mailbox_read(MailboxRegister.COMMAND) == 0


def test_what_cpuid_and_the_bios_tell() -> None:
    bench = Bench("genoa")
    assert bench.cpu.product.name == "genoa"
    assert bench.cpu.memory_map is bench.machine.map
    assert bench.cpu.trace is bench.machine.trace


@pytest.mark.parametrize("register", [0x10690, 5, "COMMAND"], ids=repr)
def test_a_mailbox_register_that_is_not_modelled(register: Any) -> None:
    cpu = Bench().cpu
    for action in (lambda: cpu.mailbox_read(register), lambda: cpu.mailbox_write(register, 1)):
        with pytest.raises(ValueError, match=r"register = .*: one of"):
            action()


@pytest.mark.parametrize("options", [{}, {"tsme": True}, {"cache": True}], ids=str)
def test_zeroed_pages_read_as_zeros(options: dict[str, bool]) -> None:
    """Through the cache where there is one, and under the host's key where everything is encrypted."""
    machine = Machine(product("milan"), 64 << 20, boot_entropy=bytes(32), trace=Trace(), **options)
    cpu = HostCpu(machine)
    cpu.write_pages(range(0x1000, 0x1005), np.full((5, PAGE), 7, np.uint8))
    for pages in (np.array([0x1000, 0x1002], np.uint64), range(0x1003, 0x1004)):
        cpu.zero_pages(pages)
    cpu.wbinvd()
    found = cpu.read_pages(range(0x1000, 0x1005))
    assert [bool(page.any()) for page in found] == [False, True, False, False, True]


def test_a_guests_page_is_not_zeroed() -> None:
    bench = with_guest_pages()
    with pytest.raises(HostPageFault):
        bench.cpu.zero_pages(range(0x3F, 0x41))
    assert bench.machine.dram.read(PAGES.start * PAGE, PAGE) == b"\x77" * PAGE
