"""tools/testing/selftests/kvm/x86_64/sev_smoke_test.c: SEV and SEV-ES guests run, and end as they ask."""

from __future__ import annotations

import math
import struct

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from tests.host.selftests.harness import EXIT_HLT, EXIT_IO, EXIT_SHUTDOWN, EXIT_SYSTEM_EVENT, SEV_ES_VM, SEV_VM, Vcpu
from tests.host.selftests.sev import ES, NO_DBG, SevHost

SEV_STATUS, GHCB = 0xC0010131, 0xC0010130
TERM_REQUEST, SYSTEM_EVENT_SEV_TERM = 0x100, 6
SET_XSAVE, GET_XSAVE = 0x5000AEA5, 0x9000AEA4
UCALL_PORT, UCALL_DONE = 1, 0x5D


def ready(kind: int) -> tuple[SevHost, int, Vcpu]:
    host = SevHost()
    vm = host.vm(kind)
    host.init2(vm)
    vcpu = host.vcpu(vm)
    host.cpuid(vcpu)
    return host, vm, vcpu


@pytest.mark.parametrize("policy", [NO_DBG, 0])
def test_sev(policy: int) -> None:
    host, vm, vcpu = ready(SEV_VM)
    host.launch(vm, SEV_VM, policy)

    async def program(cpu: GuestCpu) -> tuple[bool, int]:
        found = await cpu.cpuid(0x8000001F)
        status = await cpu.rdmsr(SEV_STATUS)
        await cpu.port_out(UCALL_PORT, UCALL_DONE)
        return bool(found.eax >> 1 & 1), status & 3

    vcpu.program(program)
    assert vcpu.run() == EXIT_IO
    direction, size, port, count, offset = vcpu.exit("<BBHIQ")
    assert (direction, size, port, count) == (1, 1, UCALL_PORT, 1)
    assert host.process.load(vcpu.shared + offset, 1) == bytes([UCALL_DONE])
    assert vcpu.run() == EXIT_HLT
    assert vcpu.outcome == (True, 1)


def check_terminated(vcpu: Vcpu) -> None:
    assert vcpu.run() == EXIT_SYSTEM_EVENT
    assert vcpu.exit("<IIQ") == (SYSTEM_EVENT_SEV_TERM, 1, TERM_REQUEST)


@pytest.mark.parametrize("policy", [ES | NO_DBG, ES])
def test_sev_es(policy: int) -> None:
    host, vm, vcpu = ready(SEV_ES_VM)
    host.launch(vm, SEV_ES_VM, policy)
    seen = []

    async def program(cpu: GuestCpu) -> None:
        seen.append(await cpu.rdmsr(SEV_STATUS) & 3)
        await cpu.wrmsr(GHCB, TERM_REQUEST)
        await cpu.vmgexit()

    vcpu.program(program)
    check_terminated(vcpu)
    assert seen == [3]


def test_sev_es_triple_fault() -> None:
    """No handler for the #UD of PVALIDATE, which no guest but an SNP guest has: the C file uses UD2."""
    host, vm, vcpu = ready(SEV_ES_VM)
    host.launch(vm, SEV_ES_VM, ES)

    async def program(cpu: GuestCpu) -> None:
        await cpu.pvalidate(0, 1)

    vcpu.program(program)
    assert vcpu.run() == EXIT_SHUTDOWN


PLACES = {
    "x87_fcw": (0, 2), "x87_fsw": (2, 2), "x87_ftw": (4, 1), "x87_fop": (6, 2), "mxcsr": (24, 4), "xmm": (160, 256),
    "ymm_hi": (576, 256),
}  # fmt: skip
"""Where the standard format of XSAVE has what the guest's registers are called (APM1 figure 11-1)."""


@pytest.mark.parametrize("policy", [ES, ES | NO_DBG])
def test_sev_es_vmsa_sync(policy: int) -> None:
    """guest_code_xsave: the state that the VMM set is in the encrypted save area, byte for byte."""
    host, vm, vcpu = ready(SEV_ES_VM)
    region = bytearray(4096)
    struct.pack_into("<HHBxH", region, 0, 0x37F, 0x3800, 0x80, 0)
    struct.pack_into("<I", region, 24, 0x1F80)
    mantissa, exponent = math.frexp(math.pi)
    pi = int(mantissa * 2**64).to_bytes(8, "little") + (exponent - 1 + 16383).to_bytes(2, "little")
    region[32:42] = pi
    region[160 + 4 * 16 : 160 + 5 * 16] = b"\xff" * 16
    region[576 + 4 * 16 : 576 + 5 * 16] = b"\xff" * 16
    region[512:520] = (7).to_bytes(8, "little")
    host.process.ioctl(vcpu.fd, SET_XSAVE, bytes(region))
    given = host.process.ioctl(vcpu.fd, GET_XSAVE, bytes(4096))
    host.launch(vm, SEV_ES_VM, policy)
    found: list[tuple[int | bytes, ...]] = []

    async def program(cpu: GuestCpu) -> None:
        found.append(await cpu.look(*PLACES, "x87_registers"))
        await cpu.wrmsr(GHCB, TERM_REQUEST)
        await cpu.vmgexit()

    vcpu.program(program)
    check_terminated(vcpu)
    *values, x87 = found[0]
    for (name, (place, size)), value in zip(PLACES.items(), values, strict=True):
        expected = region[place : place + size]
        assert given[place : place + size] == expected, name
        assert (value if isinstance(value, bytes) else value.to_bytes(size, "little")) == expected, name
    assert isinstance(x87, bytes)
    assert x87[:10] == pi == given[32:42]
    assert not any(x87[10:])
