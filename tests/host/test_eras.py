"""Two kernels, the same calls: each listed difference is found from outside, by system calls and guest programs alone.

What is expected stands here by hand, from the documents and not from the table of the code: rfc-v7, mainline.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.refusal import KernelError
from snpbook.spec.era_differences import DIFFERENCES
from snpbook.spec.process import Advice
from tests.host.askers import BUFFER, Stopped, snp
from tests.host.era_probes import MAINLINE, OK, V7, Observed, Probes, new_guest, tried, world
from tests.host.race_world import PAGES, drive, host_of
from tests.host.sev_hosts import DEFAULT, PAGE, SET_REGION, SET_REGION2, SNP, Handle, Host
from tests.host.test_eras_memory import probe as memory_probe
from tests.sampling import ALL

probe = Probes()


# Numbers and structures.


@probe("private_file", v7=(OK, errno.ENOTTY), mainline=(errno.ENOSYS, OK))
def _(era: str) -> Observed:
    host, _ = host_of(era)
    create = bytearray(struct.pack("<QQ48x", PAGE, 0))
    return (
        tried(host.process.memfd_restricted),
        tried(lambda: host.process.ioctl(host.vm(DEFAULT).fd, 0xC040AED4, create)),
    )


@probe("vm_types", v7=[0], mainline=[0, 1, 2, 3, 4])
def _(era: str) -> Observed:
    host, _ = host_of(era)
    return [kind for kind in range(8) if tried(lambda kind=kind: host.vm(kind)) == OK]  # type: ignore[misc]


@probe("capabilities", v7=[225, 240], mainline=[231, 232, 233, 234, 235, 236])
def _(era: str) -> Observed:
    host, _ = host_of(era)
    caps = (225, *range(231, 241))
    return [cap for cap in caps if host.process.ioctl(host.kvm_fd, 0xAE03, cap) > 0]


@probe(
    "absent_ioctls", "set_attributes",
    v7={0x40A0AE49, 0x4020AED2, 0xC040AED4}, mainline={0x8008AED2, 0xC020AED3},
)  # fmt: skip
def _(era: str) -> Observed:
    host, _ = host_of(era)
    vm = host.vm(DEFAULT)
    numbers = {0x40A0AE49, 0x4020AED2, 0xC040AED4, 0x8008AED2, 0xC020AED3, 0x4020AE46}
    calls = {each: partial(host.process.ioctl, vm.fd, each, bytes(256)) for each in numbers}
    return {each for each, call in calls.items() if tried(call) == errno.ENOTTY}


@probe("set_private_region", "private_region", v7=[SET_REGION], mainline=[SET_REGION2])
def _(era: str) -> Observed:
    """The descriptor stands at byte 40 of either structure."""
    made = world(era, launch=False)
    drive(made.setting(0))
    bound = []
    for number in (SET_REGION, SET_REGION2):
        region = struct.pack("<IIQQQQI4x112x", 0, 4, 0, PAGES * PAGE, made.shared, 0, made.memfd)
        if tried(lambda n=number, r=region: made.process.ioctl(made.vm.fd, n, r)) == OK:  # type: ignore[misc]
            bound.append(number)
            made.make_private(range(1))
            drive(made.setting(0))
    return bound


@probe("attributes_partial", v7=(2 * PAGE, 0), mainline=(0, 2 * PAGE))
def _(era: str) -> Observed:
    made = world(era, launch=False)
    request = bytearray(struct.pack("<QQQQ", 0, 2 * PAGE, 8, 0))
    made.process.ioctl(made.vm.fd, 0xC020AED3 if era == V7 else 0x4020AED2, request)
    return struct.unpack_from("<QQ", request)


@probe("memory_fault_exit", "memory_fault_private", "memory_fault_fails",
       v7=(OK, 38, 1, 9 * PAGE, PAGE), mainline=(errno.EFAULT, 39, 8, 9 * PAGE, PAGE))  # fmt: skip
def _(era: str) -> Observed:
    made = world(era)
    run = made.process.mmap(PAGE, flags=1, fd=made.vcpu)

    async def program(cpu: GuestCpu) -> None:
        await cpu.read(9 * PAGE, 1)

    made.executor.start(program)
    failed = drive(made.running())
    reason = int.from_bytes(made.process.load(run + 8, 4), "little")
    return failed, reason, *struct.unpack("<QQQ", made.process.load(run + 32, 24))


def state_change(era: str, serve: Callable[[int], None] | None) -> bytes:
    guest = snp(era)
    entry = 0x700 << 12 | 1 << 52
    buffer = struct.pack("<HHIQ", 0, 0, 0, entry)
    return guest.event(0x80000010, scratch=guest.ghcb + BUFFER, buffer=buffer, serve=serve)


@probe("psc_exit", v7=50, mainline=3)
def _(era: str) -> Observed:
    with pytest.raises(Stopped) as stopped:
        state_change(era, None)
    return stopped.value.reason


@probe("psc_result_told", v7=0, mainline=0x100 << 32)
def _(era: str) -> Observed:
    """The VMM refuses."""
    guest = snp(era)

    def refuse(reason: int) -> None:
        guest.put(b"\1" + bytes(7), 8 if reason == 50 else 56)

    return struct.unpack_from("<Q", state_change(era, refuse), 0x3A0)[0]


@probe("psc_msr_run_fails", v7=errno.EPERM, mainline=OK)
def _(era: str) -> Observed:
    with pytest.raises((KernelError, Stopped)) as stopped:
        snp(era).msr(0x014 | 0x700 << 12 | 1 << 52)
    return stopped.value.errno if isinstance(stopped.value, KernelError) else OK


@probe("init_op", v7=OK, mainline=errno.EINVAL)
def _(era: str) -> Observed:
    """Number 22 on a VM of type 0: SNP_INIT, or INIT2, which needs another type."""
    host, _ = host_of(era)
    return tried(lambda: host.vm(DEFAULT).op(22, bytes(48)))


@probe("snp_ops", v7=[23, 24, 25, 26, 27], mainline=[100, 101, 102])
def _(era: str) -> Observed:
    """What is an SNP sub-command is ENOTTY or EINVAL for the context elsewhere, and what is none is EINVAL."""
    host, _ = host_of(era)
    vm = new_guest(host)
    known = []
    for number in (*range(23, 30), *range(100, 104)):
        vm.error = 0xDEAD
        address = 1 << 50
        command = bytearray(struct.pack("<IIQII", number, 0, address, 0, host.sev_fd))
        if tried(lambda command=command: host.process.ioctl(vm.fd, 0xC008AEBA, command)) == errno.EFAULT:  # type: ignore[misc]
            known.append(number)
    start = 23 if era == V7 else 100
    return sorted({start, *known, *_context_first(host, vm, era)})


def _context_first(host: Host, vm: Handle, era: str) -> set[int]:
    """Those that look for the context before they read their structure: EFAULT once there is one."""
    vm.snp_start()
    found = set()
    for number in (*range(23, 30), *range(100, 104)):
        command = bytearray(struct.pack("<IIQII", number, 0, 1 << 50, 0, host.sev_fd))
        if tried(lambda command=command: host.process.ioctl(vm.fd, 0xC008AEBA, command)) == errno.EFAULT:  # type: ignore[misc]
            found.add(number)
    return found


@probe("snp_payloads", v7=OK, mainline=errno.EFAULT)
def _(era: str) -> Observed:
    """Room for 40 bytes at the end of memory: enough for v7's SNP_LAUNCH_START."""
    host, _ = host_of(era)
    vm, end = new_guest(host), host.process.mmap(PAGE) + PAGE
    host.process.munmap(end, PAGE)
    host.process.store(end - 40, struct.pack("<Q", 0x30000).ljust(40, b"\0"))
    command = bytearray(struct.pack("<IIQII", 23 if era == V7 else 100, 0, end - 40, 0, host.sev_fd))
    return tried(lambda: host.process.ioctl(vm.fd, 0xC008AEBA, command))


@probe("snp_psp_commands", v7=errno.EINVAL, mainline=OK)
def _(era: str) -> Observed:
    """Number 10 without a structure: SET_EXT_CONFIG, or SNP_COMMIT."""
    host, _ = host_of(era)
    return tried(lambda: host.process.ioctl(host.sev_fd, 0xC0105300, bytearray(struct.pack("<IQI", 10, 0, 0))))


# Launch.


@probe("snp_only_snp_ops", v7=False, mainline=True)
def _(era: str) -> Observed:
    host, _ = host_of(era)
    vm = new_guest(host)
    return tried(lambda: vm.op(16, bytes(12))) == errno.EPERM


@probe("launch_start_checked", v7=(errno.EIO, errno.EIO), mainline=(errno.EINVAL, errno.EINVAL))
def _(era: str) -> Observed:
    """A policy without its bit 17; a second start, whose ASID the first context still has."""
    host = Host(era)
    refused = tried(lambda: new_guest(host).snp_start(policy=0x10000))
    vm = new_guest(host)
    vm.snp_start()
    return refused, tried(vm.snp_start)


@probe("launch_by_hva", v7=b"\3", mainline=b"\5")
def _(era: str) -> Observed:
    """gfn 3 named together with the address of page 5: which page is launched, by what the digest then holds apart."""
    made = world(era, launch=False)
    if era == V7:
        drive(made.updating(range(3, 4)))
        return b"\3" if made.vm.states(range(3, 4))[0] >= 0 else b""
    made.make_private(range(6))
    payload = struct.pack("<QQQBBHI32x", 3, made.shared + 5 * PAGE, PAGE, 1, 0, 0, 0)
    made.vm.op(101, payload)
    return b"\5" if made.vm.states(range(3, 4))[0] >= 0 > made.vm.states(range(5, 6))[0] else b""


@probe("launch_type_checked", v7=errno.EIO, mainline=errno.EINVAL)
def _(era: str) -> Observed:
    made = world(era, launch=False)
    if era == V7:
        return tried(lambda: made.vm.snp_update_v7(made.shared, PAGE, kind=7))
    made.make_private(range(1))
    return tried(lambda: made.vm.snp_update(0, made.shared, PAGE, kind=7))


@probe("launch_sets_attribute", v7=OK, mainline=errno.EIO)
def _(era: str) -> Observed:
    """A launch of a page that nobody has made private."""
    return drive(world(era, launch=False).updating(range(1)))


@probe("launch_failure", v7=(errno.EFAULT, 2), mainline=(OK, 1))
def _(era: str) -> Observed:
    """The second of two pages cannot be had: how the call ends, and how many pages are left to do."""
    made = world(era, launch=False)
    if era == V7:
        made.make_private(range(1, 2))
        return drive(made.updating(range(2))), 2
    made.make_private(range(1))
    payload = struct.pack("<QQQBBHI32x", 0, made.shared, 2 * PAGE, 1, 0, 0, 0)
    return OK, struct.unpack_from("<QQQ", made.vm.op(101, payload))[2] // PAGE


@probe("hypervisor_features", v7=3, mainline=3)
def _(era: str) -> Observed:
    return snp(era).msr(0x080) >> 12


@probe("vmsa_features", v7=errno.EINVAL, mainline=OK)
def _(era: str) -> Observed:
    """DebugSwap, which the series has no way to ask for: its SNP_INIT has flags alone."""
    host, _ = host_of(era)
    if era == V7:
        return tried(lambda: host.vm(DEFAULT).op(22, struct.pack("<Q", 1 << 5))) and errno.EINVAL
    return tried(lambda: host.vm(SNP).init2(features=1 << 5))


ELSEWHERE = {
    "psmash_retried": "test_rmp_fault.py::test_the_v7_series_tries_once",
    "rmp_fault_checks_size": "test_rmp_fault.py::test_another_vcpu_was_faster",
    "ghcb_pinned": "test_ghcb.py::test_a_ghcb_that_is_an_assigned_page",
    "cpuid_page_returned": "test_sev_snp_update.py::test_series_does_not_hand_a_cpuid_page_back",
    "host_data_passed": "test_sev_snp_launch.py::test_host_data",
    "map_gpa_needs_private": "test_instructions.py::test_map_gpa_range_in_the_v7_series",
    "ghcb_must_map": "test_ghcb.py::test_a_ghcb_outside_of_memory",
    "snp_requests_guarded": "test_ghcb_msr.py::test_the_v7_series_does_not_look",
    "requests_bounced": "test_guest_requests.py::test_a_response_page_that_the_v7_series_cannot_lend",
    "request_errors_are_status": "test_guest_requests.py::test_addresses_in_the_v7_series",
    "certificates": "test_guest_requests.py::test_certificates_of_the_v7_series",
    "certificates_always": "test_guest_requests.py::test_certificates_of_the_v7_series",
    "requests_throttled": "test_guest_requests.py::test_throttling",
    "run_vmpl": "test_ghcb_msr.py::test_run_vmpl_is_unknown",
    "ap_creation_error_gp": "test_ap_creation.py::test_the_v7_series_stops_the_target_of_a_refused_request",
    "ap_destroy_needs_rax": "test_ap_creation.py::test_the_v7_series_wants_rax_also_to_destroy",
    "ap_creation_vmpl": "test_svsm_events.py::test_a_level_that_is_created_at_once_runs_next",
    "vmsa_per_vmpl": "test_svsm_events.py::test_a_guest_runs_its_lower_level_and_comes_back",
    "hv_doorbell": "test_svsm_events.py::test_doorbell",
}
"""Rows whose probe stands beside the tests of what they concern."""


@pytest.mark.parametrize("name", list(probe))
def test_probe(name: str) -> None:
    probe.check(name)


def test_every_row_has_one_probe() -> None:
    places = [*probe, *memory_probe, *ELSEWHERE]
    assert sorted(places) == sorted(row.name for row in DIFFERENCES)
    for place in ELSEWHERE.values():
        file, test = place.split("::")
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), place


# The same calls on both.

CALLS = st.lists(
    st.tuples(
        st.sampled_from(
            ["memory", "slot", "touch", "discard", "register", "guest", "status", "cap", "run", "another VM"]
        ),
        st.integers(0, 15), st.integers(1, 16), st.booleans(),
    ),
    max_size=14,
)  # fmt: skip


CAPS = (1, 3, 7, 9, 10, 32, 66, 113, 136, 201, 197, 206)


def play(era: str, calls: list[tuple[str, int, int, bool]]) -> list[Observed]:
    """A sequence of calls that no listed difference concerns: what each answers."""
    host, _ = host_of(era)
    process, answers = host.process, []
    vms: list[Handle] = [host.vm(DEFAULT)]
    memory = process.mmap(32 * PAGE)
    process.store(memory, b"".join(bytes([n]) * PAGE for n in range(32)))

    def slot(vm: Handle, first: int, count: int, flag: bool) -> object:
        region = struct.pack("<IIQQQ", first % 3, 0, first * PAGE, (count - 1) * PAGE, memory + count * PAGE * flag)
        return process.ioctl(vm.fd, SET_REGION, bytearray(region))

    def guest_of(vm: Handle, first: int, flag: bool) -> object:
        vm.op(int(flag))
        return vm.op(2, struct.pack("<IIQI4xQI4x", 0, 4 * flag | first % 2, 0, 0, 0, 0))

    def run(vm: Handle, first: int) -> object:
        if not vm.vcpus:
            vm.create_vcpu()
        executor = vm.vm.vcpus[0].executor
        if not executor.busy:

            async def program(cpu: GuestCpu) -> bytes:
                data: bytes = await cpu.read(first * PAGE, 4)
                return data

            executor.start(program)
        result = drive(process.calling(vm.vcpus[0], 0xAE80))
        return result, executor.outcome if isinstance(executor.outcome, bytes) else None

    def answer(name: str, first: int, count: int, flag: bool) -> object:
        vm, start, size = vms[first % len(vms)], memory + first * PAGE, count * PAGE
        match name:
            case "memory":
                return process.load(process.mmap(size), 8)
            case "slot":
                return slot(vm, first, count, flag)
            case "touch":
                return process.load(start, 16)
            case "discard":
                process.madvise(start, size, Advice.DONTNEED)
                return None
            case "register":
                number = 0x8010AEBB if flag else 0x8010AEBC
                return process.ioctl(vm.fd, number, bytearray(struct.pack("<QQ", start, size)))
            case "guest":
                return guest_of(vm, first, flag)
            case "status":
                return vm.op(16, bytes(12))[4:]
            case "cap":
                return process.ioctl(host.kvm_fd, 0xAE03, CAPS[first % len(CAPS)])
            case "run":
                return run(vm, first)
        vms.append(host.vm(DEFAULT))
        return None

    for call in calls:
        try:
            found = answer(*call)
            answers.append(found if isinstance(found, int | bytes | tuple | type(None)) else "")
        except KernelError as error:
            answers.append(-(error.errno or 0))
    process.exit()
    return answers


@settings(max_examples=1000 if ALL else 12, deadline=None)
@given(CALLS)
def test_the_same_calls_end_alike(calls: list[tuple[str, int, int, bool]]) -> None:
    assert play(V7, calls) == play(MAINLINE, calls)
