"""The MSR protocol of the GHCB, row by row, for SNP and SEV-ES guests of each era."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from tests.host.askers import AP_HOLD, HYPERCALL, SYSTEM_EVENT, VMGEXIT, Asker, EsAsker, Stopped, fails, sev_es, snp

INFO, NONE = 2 << 48 | 1 << 32 | 51 << 24 | 0x001, 0xFFFFFFFFFFFFF011
ERAS = ["rfc-v7", "mainline", "svsm-host"]


@pytest.mark.parametrize("era", ERAS)
def test_what_the_kernel_answers(era: str) -> None:
    asker = snp(era)
    assert asker.msr(0x002) == INFO, "versions 1 to 2, C-bit 51"
    features = {"rfc-v7": 0x3, "mainline": 0x3, "svsm-host": 0x27}[era]
    assert asker.msr(0x080) == features << 12 | 0x081
    assert asker.msr(0x010) == NONE, "no preferred place"
    assert asker.msr(0x7000 | 0x012) == 0x7000 | 0x013
    assert asker.msr(0x12345 << 12 | 0xABC) == 0x12345 << 12 | 0xABC, "an unknown code is left as it is"
    assert asker.msr(0) == 0, "no GHCB at all: the guest goes on"


def test_the_value_at_reset() -> None:
    asker = snp()
    fresh = asker.vmm.vcpus[0]

    async def look(cpu: GuestCpu) -> int:
        value: int = await cpu.rdmsr(Msr.GHCB)
        return value

    other = asker.system.create_vm(memory="12 MiB")
    other.launch()
    assert other.run(look) == INFO
    assert fresh.ghcb_registered == asker.ghcb >> 12


def test_a_vm_of_the_first_version_says_so() -> None:
    """Without INIT2 a SEV-ES guest has version 1."""
    assert sev_es("rfc-v7").msr(0x002) == 1 << 48 | 1 << 32 | 51 << 24 | 0x001
    assert sev_es("mainline").msr(0x002) == INFO


@pytest.mark.parametrize("register", range(4))
def test_cpuid(register: int) -> None:
    asker = snp()
    leaf = next(entry for entry in asker.vcpu.cpuid if entry.function == 0x80000008)
    expected = (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)[register]
    assert asker.msr(0x80000008 << 32 | register << 30 | 0x004) == expected << 32 | register << 30 | 0x005
    assert asker.msr(0x4FFFFFFF << 32 | register << 30 | 0x004) == register << 30 | 0x005, "no such leaf"


def test_ap_reset_hold() -> None:
    asker = snp()
    states: list[int] = []

    def serve(reason: int) -> None:
        assert reason == AP_HOLD
        with fails(errno.EAGAIN):
            asker.enter()
        states.append(int(asker.vcpu.mp_state))
        asker.vmm.process.ioctl(asker.vmm.handles[0].fd, 0x4004AE99, bytearray(b"\4\0\0\0"))  # SIPI received

    assert asker.msr(0x006, serve) == 1 << 12 | 0x007
    assert states == [9]


def test_ap_reset_hold_that_ends_without_a_sipi() -> None:
    asker = snp()

    def serve(reason: int) -> None:
        asker.vmm.process.ioctl(asker.vmm.handles[0].fd, 0x4004AE99, bytearray(4))  # runnable

    assert asker.msr(0x006, serve) == 0x007


@pytest.mark.parametrize("guest", [snp, sev_es])
@pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
def test_termination(guest: Callable[[str], Asker | EsAsker], era: str) -> None:
    asker = guest(era)
    request = 2 << 16 | 1 << 12 | 0x100
    with pytest.raises(Stopped) as caught:
        asker.msr(request)
    assert caught.value.reason == SYSTEM_EVENT
    assert asker.exit("<IIQ") == (6, 1, request)
    assert asker.kernel.log.lines[-1] == "SEV-ES guest requested termination: 0x1:0x2"


@pytest.mark.parametrize("request_", [0x010, 0x7012, 1 << 52 | 0x500014])
def test_what_is_for_snp_guests_ends_others(request_: int) -> None:
    asker = sev_es()
    with pytest.raises(Stopped) as caught:
        asker.msr(request_)
    assert caught.value.reason == SYSTEM_EVENT
    assert asker.exit("<IIQ") == (6, 1, request_)


def test_the_v7_series_does_not_look() -> None:
    asker = sev_es("rfc-v7")
    assert asker.msr(0x010) == NONE
    assert asker.msr(0x7012) == 0x7013
    with fails(errno.EPERM):
        asker.msr(1 << 52 | 0x500014)
    assert asker.reason == VMGEXIT


# Page states.


@pytest.mark.parametrize(("operation", "attributes"), [(1, 1 << 4), (2, 0)])
@pytest.mark.parametrize(("ret", "answer"), [(0, 0x015), (22, 1 << 63 | 0x015)])
def test_page_state(operation: int, attributes: int, ret: int, answer: int) -> None:
    asker = snp()

    def serve(reason: int) -> None:
        assert reason == HYPERCALL
        assert asker.exit("<Q6QQQ") == (12, 0x500000, 1, attributes, 0, 0, 0, 0, 0)
        asker.put(ret.to_bytes(8, "little"), 0x38)

    assert asker.msr(operation << 52 | 0x500 << 12 | 0x014, serve) == answer


@pytest.mark.parametrize("operation", [0, 3, 4, 15])
def test_another_page_state_fails(operation: int) -> None:
    assert snp().msr(operation << 52 | 0x500 << 12 | 0x014) == 1 << 63 | 0x015


def test_a_vmm_that_serves_no_hypercalls() -> None:
    asker = snp()
    asker.vm.exit_hypercalls = 0
    assert asker.msr(1 << 52 | 0x500 << 12 | 0x014) == 1 << 63 | 0x015


def test_page_state_in_the_v7_series() -> None:
    """The request goes out raw, KVM_RUN fails beside it, and the guest hears of success whatever was done."""
    asker = snp("rfc-v7")
    for error in (0, 1):
        request = 7 << 52 | 0x500 << 12 | 0x014
        asker.vcpu.executor.start(lambda cpu, value=request: _round(cpu, value))
        with fails(errno.EPERM):
            asker.enter()
        assert asker.reason == VMGEXIT
        assert asker.exit("<QB") == (request, 0)
        asker.put(bytes([error]), 8)
        asker.enter()
        assert asker.vcpu.executor.outcome == 0x015


async def _round(cpu: GuestCpu, value: int) -> int:
    await cpu.wrmsr(Msr.GHCB, value)
    await cpu.vmgexit()
    answer: int = await cpu.rdmsr(Msr.GHCB)
    return answer


# Run VMPL, of hosts for an SVSM.


@pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
def test_run_vmpl_is_unknown(era: str) -> None:
    assert snp(era).msr(2 << 32 | 0x016) == 2 << 32 | 0x016


def test_run_vmpl_without_a_save_area() -> None:
    asker = snp("svsm-host")
    assert asker.msr(2 << 32 | 0x016) == 1 << 32 | 0x017
    assert asker.msr(9 << 32 | 0x016) == 1 << 32 | 0x017
    assert asker.msr(0x016) == 0x017, "the one that runs"
