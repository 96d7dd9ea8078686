"""Injected events: from where they come for which guest, how they are delivered, and that each comes once."""

from typing import Any

import pytest

from snpbook.hardware.exits import GuestException, Hlt, Shutdown, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from tests.hardware.guests import PAGE
from tests.hardware.kinds import AnyBench

KINDS = ["plain", "sev", "es", "snp"]
RESTRICTED, ALTERNATE = 1 << 3, 1 << 4
VALID = 1 << 31
GP = VALID | 3 << 8 | 1 << 11 | 13 | 0x5678 << 32
NMI, INTERRUPT, HV = VALID | 2 << 8 | 0x77, VALID | 0x80, VALID | 3 << 8 | 28
IF = 0x202


async def catcher(cpu: GuestCpu) -> Any:
    """What each of three operations comes to."""
    found: list[Any] = []
    for value in range(3):
        try:
            await cpu.load(rbx=value)
            found.append("done")
        except GuestException as exception:
            found.append((exception.vector, exception.error, exception.address))
        await cpu.hlt()
    return found


def run(bench: AnyBench) -> Any:
    """The program to its end."""
    while bench.executor.busy:
        assert bench.run() == Hlt()
        if bench.kind in ("plain", "sev") and bench.executor.busy:  # HLT is the hypervisor's to step over
            bench.machine.dram.write(0x10 * PAGE + 0x400 + 0x178, bench.read_vmcb().next_rip.to_bytes(8, "little"))
    return bench.executor.outcome


@pytest.mark.parametrize(
    ("word", "event"), [(GP, (13, 0x5678, 0)), (NMI, (2, 0, 0)), (INTERRUPT, (0x80, 0, 0)), (HV, (28, 0, 0))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_hypervisor_injects(kind: str, word: int, event: Any) -> None:
    """Instead of the first operation, in every kind of guest, and once."""
    bench = AnyBench(kind)
    bench.set_vmcb(event_injection=word)
    bench.start(catcher)
    assert run(bench) == [event, "done", "done"]
    assert bench.read_vmcb().event_injection == 0


def test_an_error_code_that_is_not_valid_is_none() -> None:
    bench = AnyBench()
    bench.set_vmcb(event_injection=GP & ~(1 << 11))
    bench.start(catcher)
    assert run(bench)[0] == (13, 0, 0)


def test_restricted_injection_lets_hv_through() -> None:
    bench = AnyBench(features=1 | RESTRICTED)
    bench.set_vmcb(event_injection=HV, virtual_interrupt=1 << 8 | 1 << 20 | 0x30 << 32)
    bench.set_vmsa(sev_features=1 | RESTRICTED, rflags=IF)
    bench.start(catcher)
    assert run(bench) == [(28, 0, 0), "done", "done"]  # and no virtual interrupt


def test_alternate_injection_comes_from_the_vmsa() -> None:
    """What the VMCB names is dropped; what a more privileged VMPL wrote into the VMSA comes, once."""
    bench = AnyBench()
    bench.set_vmsa(sev_features=1 | ALTERNATE, eventinj=GP, rflags=IF)
    bench.set_vmcb(event_injection=INTERRUPT, virtual_interrupt=1 << 8 | 1 << 20 | 0x30 << 32)
    bench.start(catcher)
    assert run(bench) == [(13, 0x5678, 0), "done", "done"]
    assert bench.read_vmsa().eventinj == 0
    assert bench.read_vmcb().event_injection == INTERRUPT  # nobody looked at it


INTERRUPTS = {
    "comes": (1 << 8 | 9 << 16 | 0x80 | 0x30 << 32, IF, True),
    "IF is clear": (1 << 8 | 9 << 16 | 0x80 | 0x30 << 32, 2, False),
    "priority not above TPR": (1 << 8 | 8 << 16 | 0x8F | 0x30 << 32, IF, False),
    "TPR ignored": (1 << 8 | 1 << 20 | 0xFF | 0x30 << 32, IF, True),
    "none pending": (9 << 16 | 0x30 << 32, IF, False),
    "in a shadow": (1 << 8 | 9 << 16 | 1 << 10 | 0x30 << 32, IF, False),
}


@pytest.mark.parametrize("name", INTERRUPTS)
@pytest.mark.parametrize("alternate", [False, True])
def test_virtual_interrupts(name: str, alternate: bool) -> None:
    word, rflags, comes = INTERRUPTS[name]
    bench = AnyBench("snp")
    bench.set_vmsa(sev_features=1 | ALTERNATE * alternate, vintr_ctrl=word * alternate, rflags=rflags)
    bench.set_vmcb(virtual_interrupt=0 if alternate else word)
    bench.start(catcher)
    outcome = run(bench)
    assert outcome == [(0x30, 0, 0) if comes else "done", "done", "done"]
    control = bench.read_vmsa().vintr_ctrl if alternate else bench.read_vmcb().virtual_interrupt
    assert control == (word & ~(1 << 8) if comes else word)


def test_a_handler_takes_an_event_and_nothing_is_lost() -> None:
    """In the middle of a run of pages: the run goes on, whatever the handler returns."""

    async def program(cpu: GuestCpu) -> Any:
        async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
            seen.append(exception.vector)
            await cpu.vmgexit()
            return True

        seen: list[int] = []
        cpu.set_handler(28, handler)
        codes, _ = await cpu.pvalidate(0x20 * PAGE, 4)
        return seen, codes.tolist()

    bench = AnyBench()
    for gfn in (0x20, 0x21):
        bench.give(gfn, 0x900 + gfn, validated=0)
    bench.start(program)
    bench.run()
    for gfn in (0x22, 0x23):
        bench.give(gfn, 0x900 + gfn, validated=0)
    bench.set_vmcb(event_injection=HV)
    assert bench.run() == Vmgexit()
    assert not bench.machine.rmp.entry(0x922).validated
    assert bench.run() == Hlt()
    assert bench.executor.outcome == ([28], [0] * 4)


def test_nobody_catches() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rbx=1)

    bench = AnyBench()
    bench.set_vmcb(event_injection=NMI)
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Shutdown)
    assert "vector 2" in exit_.reason


def test_an_event_for_a_halted_vcpu_wakes_nothing() -> None:
    bench = AnyBench()
    bench.set_vmcb(event_injection=NMI)
    assert bench.run() == Hlt()
    assert bench.read_vmcb().event_injection == 0
