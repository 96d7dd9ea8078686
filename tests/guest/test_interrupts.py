"""Restricted injection from both sides, what hardware keeps out of it, and the defences of a guest without it.

The words of the doorbell page are typed again from the document: vector 7:0, NMI 8, #MC 9, no further signal 15; the
byte behind them says that no EOI is asked for.
"""

from __future__ import annotations

import errno
from functools import cache
from itertools import product
from typing import Any

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest import interrupts, msr_protocol
from snpbook.guest.boot import Kernel
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.interrupts import HvHandler
from snpbook.guest.layout import Layout
from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import Hlt
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.snapshot import Snapshot
from snpbook.host.kvm import interrupts as host
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import VmmError
from snpbook.spec.msr import Msr
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import Guest, GuestStopped
from snpbook.trace import VmExit
from tests.guest.bare import PLACE, Answer, Bare
from tests.guest.booted import fresh
from tests.machines import booted, launched
from tests.sampling import sampled

RESTRICTED = SevFeatures.RESTRICTED_INJECTION
VALID, EXCEPTION = 1 << 31, 3 << 8
HV = VALID | EXCEPTION | 28
NMI, MC, QUIET = 1 << 8, 1 << 9, 1 << 15


@cache
def _booted() -> tuple[Guest, Snapshot]:
    guest = launched(booted(era="svsm-host"), memory="12 MiB", restricted_injection=True)
    guest.boot(knows=RESTRICTED)
    return guest, guest.system.snapshot()


@pytest.fixture
def restricted() -> Guest:
    """A guest under restricted injection that has booted."""
    guest, snapshot = _booted()
    snapshot.restore()
    return guest


def doorbell(guest: Guest) -> int:
    return Layout.of(guest.vmm.image).doorbell


def listening(guest: Guest, *, enabled: bool = True) -> Any:
    """A program that waits three times for the host: what it has seen after each, and what it dropped."""
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, place)
        seen: list[int] = []

        async def act(cpu: GuestCpu, vector: int) -> None:
            await cpu.cpuid(1)  # an exit through the GHCB
            seen.append(vector)

        handler = HvHandler(kernel.channel, place.doorbell, act)
        cpu.set_handler(28, handler)
        if enabled:
            await handler.enable(cpu)
        after = []
        for _ in range(3):
            await cpu.hlt()
            await cpu.look("rax")  # the instruction before which an event comes
            after.append(list(seen))
        await handler.enable(cpu)
        after.append(list(seen))
        await handler.disable(cpu)
        return after, handler.dropped

    return program


def begin(guest: Guest, program: Any) -> None:
    with pytest.raises(GuestStopped, match="HLT"):
        guest.run(program)


def to_the_end(guest: Guest) -> Any:
    while True:
        try:
            return guest.go_on()
        except GuestStopped as stopped:
            if stopped.exit is not Exit.HLT:
                raise


def word(guest: Guest) -> tuple[int, int]:
    """Pending word and EOI byte of the doorbell page."""
    data = guest.vmm.read(doorbell(guest), 3)
    return int.from_bytes(data[:2], "little"), data[2]


# Both sides honest.


def test_the_boot_registers_a_shared_page(restricted: Guest) -> None:
    vcpu, gpa = restricted.vmm.vcpus[0], doorbell(restricted)
    assert vcpu.doorbell == gpa == 0x8000
    assert not restricted.vmm.vm.is_private(range(8, 9)).any()
    verdict = restricted.system.owner(restricted).verify(restricted.request_report(b"n"), b"n".ljust(64, b"\0"))
    assert str(verdict) == "accepted", "the features are in the measurement"


def test_one_vector_at_a_time_the_highest_first(restricted: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ends that the host has to hear of, for others wait; the last is ended in the page."""
    vcpu, shown = restricted.vmm.vcpus[0], []
    honest = HostCpu.vmrun

    def vmrun(cpu: HostCpu, *arguments: Any) -> Any:
        shown.append(word(restricted)[0] & 0xFF)
        return honest(cpu, *arguments)

    begin(restricted, listening(restricted))
    monkeypatch.setattr(HostCpu, "vmrun", vmrun)
    for vector in (0x30, 0x61, 0x45):
        host.send(vcpu, vector)
    log = restricted.system.record()
    with pytest.raises(GuestStopped):
        restricted.go_on()
    assert [event.reason for event in log.of(VmExit)] == ["VMGEXIT"] * 5 + ["HLT"], "three CPUIDs, two ends"
    assert word(restricted) == (0, 0)
    assert shown == [0x61, 0, 0x45, 0, 0x30, 0], "none while one is in service"
    after, dropped = to_the_end(restricted)
    assert (after[0], after[-1], dropped) == ([0x61, 0x45, 0x30], [0x61, 0x45, 0x30], [])


def test_what_the_host_writes(restricted: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen at each entry: the word, the EOI byte and the event; nobody rings twice."""
    vcpu, seen = restricted.vmm.vcpus[0], []
    honest = HostCpu.vmrun

    def vmrun(cpu: HostCpu, *arguments: Any) -> Any:
        seen.append((*word(restricted), vcpu.control().event_injection))
        return honest(cpu, *arguments)

    begin(restricted, listening(restricted, enabled=False))
    monkeypatch.setattr(HostCpu, "vmrun", vmrun)
    host.send(vcpu, 0x30)
    with pytest.raises(GuestStopped):
        restricted.go_on()
    host.send(vcpu, 0x50)
    host.send_nmi(vcpu)
    with pytest.raises(GuestStopped):
        restricted.go_on()
    assert seen == [(QUIET | 0x30, 1, HV), (QUIET | NMI | 0x30, 0, 0)], "now its end is to be told"
    after, _ = to_the_end(restricted)
    assert after == [[], [], [], [2, 0x30, 0x50]], "the second waits for the end of the first"


def test_an_nmi_does_not_wait_and_a_vector_does(restricted: Guest) -> None:
    begin(restricted, listening(restricted, enabled=False))
    host.send(restricted.vmm.vcpus[0], 0x77)
    host.send_nmi(restricted.vmm.vcpus[0])
    after, _ = to_the_end(restricted)
    assert after == [[2], [2], [2], [2, 0x77]]


def test_what_cannot_be_sent(restricted: Guest) -> None:
    vcpu = restricted.vmm.vcpus[0]
    for vector in (0, 14, 31, 256):
        with pytest.raises(KernelError) as refused:
            host.send(vcpu, vector)
        assert refused.value.errno == errno.EINVAL
    for guest in (fresh(), fresh(kind="plain")):
        with pytest.raises(KernelError) as refused:
            host.send(guest.vmm.vcpus[0], 0x30)
        assert refused.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("lie", [0, PLACE.doorbell ^ 0x1000, (1 << 64) - 1])
def test_the_host_must_name_the_same_page(lie: int) -> None:
    guest = Bare()

    async def body(cpu: GuestCpu) -> None:
        await interrupts.listen(Ghcb(cpu, PLACE.ghcb), PLACE.doorbell)

    if lie == 0:
        guest.run(body, Answer({"info2": PLACE.doorbell}))
        assert guest.requests[-1].fields == {"code": 0x80000014, "info1": 1, "info2": PLACE.doorbell}
    with pytest.raises(Terminated, match="doorbell"):
        guest.run(body, Answer({"info2": lie}))
    assert guest.ended_with == (0, 0)


# A host that writes what it likes into the page, or into EVENTINJ.


@pytest.mark.parametrize(
    ("pending", "taken", "dropped"),
    [
        (0x40, [0x40], []), (0x20, [0x20], []), (0x1F, [], [0x1F]), (0x0E, [], [0x0E]), (0x1D, [], [0x1D]),
        (0x80, [], [0x80]), (0x7C00, [], []), (NMI | 0x80, [2], [0x80]), (NMI | 0xFF | 0x7C00, [2, 0xFF], []),
        (0, [], []), (QUIET, [], []),
    ],
)  # fmt: skip
def test_no_exception_comes_through_the_page(
    pending: int, taken: list[int], dropped: list[int], restricted: Guest
) -> None:
    """Whatever stands there, it is an interrupt or it is nothing."""
    begin(restricted, listening(restricted))
    restricted.vmm.write(doorbell(restricted), pending.to_bytes(2, "little") + b"\1")
    restricted.vmm.vcpus[0].set_control("event_injection", HV)
    after, found = to_the_end(restricted)
    assert (after[0], found) == (taken, dropped)


def test_a_machine_check_ends_it(restricted: Guest) -> None:
    begin(restricted, listening(restricted))
    restricted.vmm.write(doorbell(restricted), MC.to_bytes(2, "little"))
    restricted.vmm.vcpus[0].set_control("event_injection", HV)
    with pytest.raises(GuestStopped, match=r"reason 0:0 \(GENERAL\)"):
        restricted.go_on()
    with pytest.raises(Terminated, match="machine check"):
        restricted.go_on()


EVENTS = [
    (vector, kind, error)
    for vector, kind, error in product(range(256), (0, 2, 3, 4), (0, 1))
    if (vector, kind, error) != (28, 3, 0)
]


@pytest.mark.parametrize(
    ("vector", "kind", "error"), [(28, 0, 0), (28, 3, 1), (29, 3, 1), (0x80, 0, 0), (2, 2, 0), *sampled(EVENTS, 12)]
)
def test_hardware_keeps_out_what_is_not_hv(vector: int, kind: int, error: int, restricted: Guest) -> None:
    """VMRUN refuses, KVM_RUN fails, and the guest goes on as if nothing had been."""
    begin(restricted, listening(restricted))
    vcpu = restricted.vmm.vcpus[0]
    vcpu.set_control("event_injection", VALID | error << 11 | kind << 8 | vector)
    with pytest.raises(KernelError, match="VMRUN:") as refused:
        restricted.go_on()
    assert refused.value.errno == errno.EINVAL
    vcpu.set_control("event_injection", 0)
    assert to_the_end(restricted) == ([[], [], [], []], [])


def test_hv_without_restricted_injection_ends_the_guest() -> None:
    guest = fresh()
    guest.vmm.vcpus[0].set_control("event_injection", HV)
    with pytest.raises(GuestStopped, match=r"0:0"):
        guest.run(listening(guest))


def test_hv_on_a_processor_that_has_no_page() -> None:
    guest = Bare(features=1 | 1 << 3)

    async def body(cpu: GuestCpu) -> None:
        interrupts.install(Ghcb(cpu, PLACE.ghcb))
        await cpu.hlt()
        await cpu.look("rax")

    guest.start(body)
    assert guest.bench.run() == Hlt()
    guest.bench.set_vmcb(event_injection=HV)
    with pytest.raises(Terminated, match="without a doorbell page"):
        guest.go_on()
    assert guest.ended_with == (0, 0)


def test_both_modes_at_once_are_none() -> None:
    system = booted(era="svsm-host")
    guest = launched(system, memory="12 MiB", restricted_injection=True, alternate_injection=True)
    with pytest.raises(KernelError, match="restricted and alternate injection exclude each other"):
        guest.boot(knows=RESTRICTED)


@pytest.mark.parametrize("era", ["mainline", "rfc-v7"])
def test_no_other_kernel_has_it(era: str) -> None:
    with pytest.raises(VmmError, match="restricted-injection"):
        booted(era=era).create_vm(memory="12 MiB", restricted_injection=True)


def test_linux_6_12_does_not_know_it_and_says_so() -> None:
    """NAE 0x8000FFFE with set 0, reason 2 and bit 5 of SEV_STATUS."""
    guest = launched(booted(era="svsm-host"), memory="12 MiB", restricted_injection=True)
    with pytest.raises(GuestStopped, match="by its GHCB"):
        guest.boot()
    assert any("reason 0x20 info 0x20" in line for line in guest.system.host.log.lines)


# Without it: what Linux checks.


def computing(guest: Guest) -> Any:
    """A program whose result hangs on its GHCB: leaf 1 with the APIC id, and a key."""
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, place)
        nmis: list[int] = []

        async def act(cpu: GuestCpu, vector: int) -> None:
            await cpu.port_in(0x71)
            nmis.append(vector)

        cpu.set_handler(2, interrupts.NmiHandler(kernel.channel, act))
        found = [(await cpu.cpuid(leaf)).ebx for leaf in (1, 0xB, 0x80000000, 1)]
        found.append((await msr_protocol.sev_information(cpu)).max_version)
        return found, await cpu.port_in(0x70), len(nmis), await cpu.rdmsr(Msr.GHCB)

    return program


@pytest.mark.parametrize("kind", ["snp", "sev-es"])
def test_an_nmi_in_the_middle_of_a_request_costs_nothing(kind: str) -> None:
    """At each entry between the writing of the GHCB and the reading of the answer."""
    guest = fresh(kind=kind)
    expected = guest.run(computing(guest))
    guest, entries = fresh(kind=kind), []

    def strike(moment: Moment) -> None:
        entries.append(moment.stage)
        asked = moment.event is not None and moment.event != 0x80000003 and len(entries) % 3 == 0
        if moment.stage is Stage.ENTRY and (asked or moment.code is not None):
            moment.inject(2, kind=2)

    tamper(guest, strike)
    found = guest.run(computing(guest))
    assert found[2] >= 2, "it came several times"
    assert (found[:2], found[3]) == (expected[:2], expected[3])


@pytest.mark.parametrize("kind", ["plain", "sev", "sev-es", "snp"])
def test_system_call_0x80_from_outside_ends_the_kernel(kind: str) -> None:
    """As an interrupt between two instructions (Heckler): RAX is what the program had there, and nobody looks at it."""
    guest = fresh(kind=kind)
    begin(guest, waiting(guest))
    guest.vmm.vcpus[0].set_control("event_injection", VALID | 0x80)
    with pytest.raises(Exception, match=r"0:0|system call 0x80"):
        guest.go_on()


def waiting(guest: Guest) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> int:
        await Kernel.attach(cpu, place)
        await cpu.hlt()
        await cpu.load(rax=0)
        (rax,) = await cpu.look("rax")
        return int(rax)

    return program


@pytest.mark.parametrize("code", [0x72, 0x7B, 0x7C, 0x81, 0x6E, 0x89, 0x400, 0x404, 0x27])
def test_vc_from_outside_is_told_by_the_instruction(code: int) -> None:
    """#VC with a chosen code where the guest has no such instruction (WeSee)."""
    guest = fresh()
    begin(guest, waiting(guest))
    guest.vmm.vcpus[0].set_control("event_injection", VALID | EXCEPTION | 1 << 11 | 29 | code << 32)
    with pytest.raises(GuestStopped, match="0:0"):
        guest.go_on()
    with pytest.raises(Terminated, match=f"#VC {code:#x}"):
        guest.go_on()
