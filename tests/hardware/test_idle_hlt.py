"""HLT under the intercept that lets a guest with something pending go on."""

from typing import Any

import pytest

from snpbook.hardware.exits import Hlt, Intercepted
from snpbook.hardware.guest_cpu import GuestCpu, Program
from tests.hardware.kinds import AnyBench

IDLE = Intercepted(0xA6)
PENDING = 1 << 8 | 0xF << 16 | 0x40 << 32
MASKED, NMI = PENDING | 0xFF, 1 << 11
ALTERNATE = 1 << 4


async def halt(cpu: GuestCpu) -> Any:
    await cpu.hlt()
    return "behind"


def idle(kind: str, name: str = "turin", *codes: int, program: Program = halt, **fields: int) -> AnyBench:
    """A guest that halts, with IDLE_HLT intercepted and more exit codes."""
    bench = AnyBench(kind, name)
    bench.vmcb |= {"intercepts": sum(1 << code for code in (0xA6, 0x7F, 0x80, *codes)).to_bytes(24, "little"), **fields}
    bench.set_vmcb()
    bench.start(program)
    return bench


@pytest.mark.parametrize("kind", ["plain", "sev", "es", "snp"])
def test_nothing_pending(kind: str) -> None:
    """An exit with RIP behind it, which only a guest without SEV-ES has its hypervisor advance."""
    bench = idle(kind)
    assert bench.run() == IDLE
    assert bench.read_vmcb().exit_code == 0xA6
    if kind in ("es", "snp"):
        assert bench.run() == Hlt()
        assert bench.executor.outcome == "behind"
    else:
        assert bench.run() == IDLE


@pytest.mark.parametrize("word", [PENDING, MASKED, NMI])
def test_something_pending_in_the_vmcb(word: int) -> None:
    """Interrupts are off in RFLAGS: it stays pending, and the guest does not sleep."""
    bench = idle("snp", virtual_interrupt=word)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == "behind"


def test_an_interrupt_that_was_taken_on_entry_is_not_pending() -> None:
    async def program(cpu: GuestCpu) -> Any:
        async def handler(cpu: GuestCpu, exception: Any) -> bool:
            return True

        cpu.set_handler(0x40, handler)
        await cpu.pause()
        await cpu.hlt()

    bench = idle("snp", "turin", 0x77, program=program)
    bench.set_vmsa(sev_features=1, rflags=0x202)
    assert bench.run() == Intercepted(0x77)
    bench.set_vmcb(virtual_interrupt=PENDING)
    assert bench.run() == IDLE


def test_with_alternate_injection_the_vmsa_counts() -> None:
    for inside, outside, outcome in ((PENDING, 0, Hlt()), (0, PENDING, IDLE)):
        bench = idle("snp", virtual_interrupt=outside)
        bench.set_vmsa(sev_features=1 | ALTERNATE, vintr_ctrl=inside)
        assert bench.run() == outcome


def test_the_intercept_of_hlt_and_processors_without_the_other() -> None:
    assert idle("snp", "turin", 0x78).run() == Hlt()
    for name in ("milan", "genoa"):
        bench = idle("snp", name)
        assert (bench.run(), bench.executor.outcome) == (Hlt(), "behind")
