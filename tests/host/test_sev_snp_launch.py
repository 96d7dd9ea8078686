"""SNP_LAUNCH_START and SNP_LAUNCH_FINISH: every errno, what a failure leaves, the VMSAs."""

from __future__ import annotations

import errno

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from snpbook.spec.vmsa import VMSA
from tests.host.sev_hosts import DEFAULT, PAGE, POLICY, SEV, SNP, STRANGE, Handle, Host, refused


def snp_vm(host: Host) -> Handle:
    vm = host.vm(DEFAULT if host.kernel.era.name == "rfc-v7" else SNP)
    if host.kernel.era.name == "rfc-v7":
        vm.op(22, bytes(8))
    else:
        vm.init2()
    return vm


@pytest.fixture(params=["mainline", "rfc-v7"])
def host(request: pytest.FixtureRequest) -> Host:
    return Host(request.param)


def test_start_of_another_guest() -> None:
    host = Host()
    vm = host.vm(SEV)
    with refused(errno.ENOTTY):
        vm.snp_start()
    vm.init2()
    for call in (vm.snp_start, vm.snp_finish):
        with refused(errno.ENOTTY):
            call()


def test_start_once() -> None:
    vm = snp_vm(Host())
    vm.snp_start()
    assert vm.error == 0
    with refused(errno.EINVAL):
        vm.snp_start()
    assert vm.error == STRANGE


def test_policies_that_kvm_judges() -> None:
    vm = snp_vm(Host())
    for bit in (18, *range(21, 64)):
        with refused(errno.EINVAL):
            vm.snp_start(POLICY | 1 << bit)
    for policy in (0, 1 << 16, 1 << 17, POLICY | 1 << 20):
        with refused(errno.EINVAL):
            vm.snp_start(policy)
    for flag in range(16):
        with refused(errno.EINVAL):
            vm.snp_start(flags=1 << flag)
    vm.snp_start(POLICY | 1 << 19)


def test_policies_that_the_firmware_judges() -> None:
    """The series leaves all of it to the firmware, and so does Linux the ABI version."""
    old, new = snp_vm(Host("rfc-v7")), snp_vm(Host())
    for vm, policy in ((old, 0), (new, POLICY | 2 << 8)):
        before, free = vm.host.table(), vm.host.free
        with refused(errno.EIO, Status.POLICY_FAILURE):
            vm.snp_start(policy)
        assert vm.error == Status.POLICY_FAILURE
        assert (vm.host.table(), vm.host.free, vm.host.guests) == (before, free, 0)
        vm.snp_start(POLICY)


def test_a_second_start_of_the_series_loses_the_first_context() -> None:
    vm = snp_vm(Host("rfc-v7"))
    vm.snp_start()
    with refused(errno.EIO, Status.ASID_OWNED):
        vm.snp_start()
    assert vm.sev.gctx is None
    assert [len(run) for run in vm.host.kernel.ccp.leaks.forgotten] == [1]


def test_no_context_is_enotty(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = snp_vm(host)
    before, free = host.table(), host.free
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_GCTX_CREATE, Status.INVALID_CONFIG)
        with refused(errno.ENOTTY, Status.INVALID_CONFIG):
            vm.snp_start()
    assert vm.error == Status.INVALID_CONFIG
    for sev_fd in (host.kvm_fd, 99):
        with refused(errno.ENOTTY):
            vm.snp_start(sev_fd=sev_fd)
    with monkeypatch.context() as patch:
        patch.setattr(host.kernel.memory, "_free", [])
        with refused(errno.ENOTTY):
            vm.snp_start()
    assert (host.table(), host.free) == (before, free)
    vm.snp_start()


@pytest.mark.parametrize("command", [Command.SNP_LAUNCH_START, Command.SNP_ACTIVATE])
def test_a_refused_start_is_undone(host: Host, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = snp_vm(host)
    before, free = host.table(), host.free
    with monkeypatch.context() as patch:
        host.spoil(patch, command, Status.DF_FLUSH_REQUIRED)
        with refused(errno.EIO, Status.DF_FLUSH_REQUIRED):
            vm.snp_start()
    assert vm.error == Status.DF_FLUSH_REQUIRED
    assert (host.table(), host.free, host.guests) == (before, free, 0)
    vm.snp_start()


def test_a_refused_start_that_cannot_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    vm = snp_vm(host)
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_ACTIVATE, Status.DF_FLUSH_REQUIRED)
        host.spoil(patch, Command.SNP_DECOMMISSION, Status.INVALID_GUEST)
        with refused(errno.EIO, Status.DF_FLUSH_REQUIRED):
            vm.snp_start()
    assert vm.error == Status.DF_FLUSH_REQUIRED
    with refused(errno.EINVAL):
        vm.snp_start()
    vm.close()


# The end of a launch.


def test_finish_before_start(host: Host) -> None:
    with refused(errno.EINVAL):
        snp_vm(host).snp_finish()


def test_finish_refuses_flags() -> None:
    vm = snp_vm(Host())
    vm.snp_start()
    for flag in range(16):
        with refused(errno.EINVAL):
            vm.snp_finish(flags=1 << flag)
    vm.snp_finish()
    assert vm.error == 0
    assert vm.sev.launched


def test_a_second_finish(host: Host) -> None:
    """EINVAL because a VMSA is taken; without a vCPU it is the firmware that answers."""
    bare, vm = snp_vm(host), snp_vm(host)
    bare.snp_start()
    bare.snp_finish()
    with refused(errno.EIO, Status.INVALID_GUEST_STATE):
        bare.snp_finish()
    vm.create_vcpu()
    vm.snp_start()
    vm.snp_finish()
    with refused(errno.EINVAL):
        vm.snp_finish()


def test_finish_goes_through_the_descriptor_of_the_start() -> None:
    host = Host()
    vm = snp_vm(host)
    other = host.process.open("/dev/sev")
    vm.snp_start(sev_fd=other)
    host.process.close(other)
    with refused(errno.EBADF):
        vm.snp_finish()


def test_vmsas_go_through_the_descriptor_of_their_call() -> None:
    host = Host()
    vm = snp_vm(host)
    vm.create_vcpu()
    vm.snp_start()
    with refused(errno.EBADF):
        vm.op(102, bytes(88), sev_fd=host.kvm_fd)
    assert not vm.vm.vcpus[0].encrypted
    vm.snp_finish()


@pytest.mark.parametrize(
    ("block", "auth", "number"), [(0, 0, errno.EINVAL), (1, 0, errno.EINVAL), (2, 1, errno.EFAULT)]
)
def test_finish_with_bad_addresses_of_an_id_block_is_one_shot(host: Host, block: int, auth: int, number: int) -> None:
    vm = snp_vm(host)
    vm.create_vcpu()
    vm.snp_start()
    good = host.put(bytes(PAGE))
    where = {0: 0, 1: good, 2: 0x5000}
    free = host.free
    with refused(number):
        vm.snp_finish(block=where[block], auth=where[auth], enable=1)
    assert vm.vm.vcpus[0].encrypted
    assert host.free == free
    with refused(errno.EINVAL):
        vm.snp_finish()


def test_an_id_block_that_the_firmware_refuses(host: Host) -> None:
    vm = snp_vm(host)
    vm.snp_start()
    address, free = host.put(b"\1" + bytes(2 * PAGE - 1)), host.free
    with refused(errno.EIO, Status.BAD_MEASUREMENT):
        vm.snp_finish(block=address, auth=address + PAGE, enable=1)
    assert vm.error == Status.BAD_MEASUREMENT
    assert host.free == free
    vm.snp_finish()


def test_host_data(host: Host) -> None:
    vm = snp_vm(host)
    vm.snp_start()
    gctx = vm.sev.gctx
    vm.snp_finish(host_data=b"\x42" * 32)
    told = host.system.processor.context(gctx).host_data
    assert told == (bytes(32) if host.kernel.era.name == "rfc-v7" else b"\x42" * 32)


def test_finish_is_one_shot(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = snp_vm(host)
    vm.create_vcpu()
    vm.snp_start()
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_LAUNCH_FINISH, Status.POLICY_FAILURE)
        with refused(errno.EIO, Status.POLICY_FAILURE):
            vm.snp_finish()
    assert vm.vm.vcpus[0].encrypted
    assert not vm.sev.launched
    with refused(errno.EINVAL):
        vm.snp_finish()
    vm.close()


def test_a_refused_vmsa_is_reclaimed_and_may_be_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VMSA before it stays encrypted, so that no further FINISH can succeed."""
    vm = snp_vm(host)
    vm.create_vcpu(1)
    vm.create_vcpu(0)
    vm.snp_start()
    first, second = vm.vm.vcpus[0], vm.vm.vcpus[1]
    rmp = host.system.machine.rmp
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_LAUNCH_UPDATE, Status.INVALID_PAGE_STATE, after=1)
        with refused(errno.EIO, Status.INVALID_PAGE_STATE):
            vm.snp_finish()
    assert vm.error == Status.INVALID_PAGE_STATE
    assert (first.encrypted, second.encrypted) == (True, False)
    assert rmp.state(first.vmsa_page) == PageState.GUEST_VALID
    assert rmp.state(second.vmsa_page) == PageState.HYPERVISOR
    with refused(errno.EINVAL):
        vm.snp_finish()


def test_a_vmsa_page_that_does_not_come_back_bugs_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    vm = snp_vm(host)
    vm.create_vcpu()
    vm.snp_start()
    page = vm.vm.vcpus[0].vmsa_page
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_LAUNCH_UPDATE, Status.INVALID_PAGE_STATE)
        host.spoil(patch, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE)
        with refused(errno.EIO, Status.INVALID_PAGE_STATE):
            vm.snp_finish()
    with refused(errno.EIO):
        vm.snp_finish()
    assert any(page in run for run in host.kernel.ccp.leaks.listed)


def test_what_a_vmsa_holds(host: Host) -> None:
    """The registers of the VMCB and those beside it; breakpoints and TSC_AUX do not go along, x87 state does."""
    vm = snp_vm(host)
    vm.create_vcpu()
    vcpu = vm.vm.vcpus[0]
    vcpu.state = vcpu.state.replace(
        rip=0x1234, r15=15, rax=7, xcr0=7, pkru=5, xss=0x800, dr0=9, tsc_aux=3, mxcsr=0x1F80
    )
    vm.snp_start()
    gctx = vm.sev.gctx
    vm.snp_finish()
    system = host.system
    plain = system.machine.encryption.read(vm.vm.asid, vcpu.vmsa_page << 12, PAGE)
    area = VMSA.unpack(plain)
    wanted = {"rip": 0x1234, "r15": 15, "rax": 7, "xcr0": 7, "pkru": 5, "xss": 0x800, "dr0": 0, "tsc_aux": 0}
    assert {name: getattr(area, name) for name in wanted} == wanted
    assert (area.sev_features, area.mxcsr, area.x87_fcw, area.efer, area.dr6) == (1, 0x1F80, 0x37F, 0x1000, 0xFFFF0FF0)
    assert system.processor.context(gctx).launch_digest != bytes(48)
    assert system.machine.rmp.entry(vcpu.vmsa_page).gfn << 12 == 0xFFFFFFFFF000


def test_breakpoints_refuse_a_vmsa(host: Host) -> None:
    vm = snp_vm(host)
    vm.create_vcpu()
    vm.snp_start()
    vcpu = vm.vm.vcpus[0]
    reset, vcpu.state = vcpu.state, vcpu.state.replace(dr7=0x401)
    with refused(errno.EINVAL):
        vm.snp_finish()
    vcpu.state = reset
    vm.snp_finish()
