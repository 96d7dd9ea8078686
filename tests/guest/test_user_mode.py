"""#VC in a program of the user: what is served as for the kernel, what is #GP, and what ends the program alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.guest.process import Signal
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.system import Guest
from tests.guest.bare import DEVICE, NOWHERE, Answer, Bare
from tests.guest.booted import fresh
from tests.machines import PAGE

KINDS = pytest.mark.parametrize("kind", ["sev-es", "snp"])


def as_user(guest: Guest, act: Callable[[GuestCpu], Any]) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        await Kernel.attach(cpu, place)
        await cpu.sysret()
        try:
            found = await act(cpu)
        except GuestException as exception:
            found = exception.vector
        (cpl,) = await cpu.look("cpl")
        await cpu.syscall()
        return found, cpl, await cpu.look("cpl")

    return guest.run(program)


@KINDS
def test_what_is_served(kind: str) -> None:
    """The handler runs at CPL 0, and the program goes on at 3."""
    guest = fresh(kind=kind)
    found, cpl, after = as_user(guest, lambda cpu: cpu.cpuid(1))
    assert (cpl, after) == (3, (0,))

    async def kernel(cpu: GuestCpu) -> Any:
        await Kernel.attach(cpu, Layout.of(guest.vmm.image))
        return await cpu.cpuid(1)

    assert found == guest.run(kernel)


@KINDS
@pytest.mark.parametrize(
    "act", [lambda cpu: cpu.port_in(0x71), lambda cpu: cpu.port_out(0x80, 1), lambda cpu: cpu.wbinvd()]
)
def test_what_is_a_general_protection_fault(kind: str, act: Any) -> None:
    assert as_user(fresh(kind=kind), act) == (13, 3, (0,))


@KINDS
def test_what_ends_the_program_and_not_the_guest(kind: str) -> None:
    """#VC from outside, as the program reads a page that the host has unmapped; then the guest runs another program."""
    guest = fresh(kind=kind)

    def strike(moment: Moment) -> None:
        if moment.stage is Stage.ENTRY and isinstance(moment.exit, Npf) and moment.exit.gpa == 0x500000:
            moment.inject(29, 0x81)

    async def attacked(cpu: GuestCpu) -> None:
        await cpu.read(0x500000, 8)

    tamper(guest, strike)
    guest.vmm.vm.mmu.unmap(range(0x500, 0x501))
    with pytest.raises(Signal, match="SIGBUS: #VC 0x81 at CPL 3"):
        as_user(guest, attacked)
    assert as_user(guest, lambda cpu: cpu.look("cpl")) == ((3,), 3, (0,))


def test_mmio_is_the_kernels() -> None:
    guest = Bare()
    guest.bench.map(DEVICE, NOWHERE)

    async def body(cpu: GuestCpu) -> Any:
        await cpu.sysret()
        return await cpu.read(DEVICE * PAGE, 4)

    with pytest.raises(Signal, match="SIGBUS: #VC 0x400"):
        guest.run(body, Answer())
    assert not guest.requests, "nobody was asked"


def test_the_hypervisor_hears_the_cpl_of_a_hypercall() -> None:
    guest = Bare(0x81)

    async def body(cpu: GuestCpu) -> None:
        await cpu.sysret()
        await cpu.vmmcall()

    guest.run(body, Answer({"rax": 0}))
    (request,) = guest.requests
    assert request.page[0xCB] == 3


def test_a_user_cannot_go_there_twice() -> None:
    async def twice(cpu: GuestCpu) -> None:
        await cpu.sysret()

    assert as_user(fresh(), twice) == (13, 3, (0,))
