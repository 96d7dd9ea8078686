"""KVM_MEMORY_ENCRYPT_OP before a launch: the checks of all sub-commands, and INIT, ES_INIT, INIT2, SNP_INIT."""

from __future__ import annotations

import errno
import struct

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.eras import era
from snpbook.spec.status import Status
from tests.host.sev_hosts import DEFAULT, ENCRYPT_OP, SEV, SEV_ES, SNP, STRANGE, SW_PROTECTED, Host, refused


@pytest.fixture
def host() -> Host:
    return Host()


def test_null_is_a_probe() -> None:
    with_sev, without = Host(), Host(modules={"kvm_amd": "sev=0"})
    assert with_sev.process.ioctl(with_sev.vm(DEFAULT).fd, ENCRYPT_OP, 0) == 0
    vm = without.vm(DEFAULT)
    with refused(errno.ENOTTY):
        without.process.ioctl(vm.fd, ENCRYPT_OP, 0)
    with refused(errno.ENOTTY):
        vm.op(9999)


def test_a_structure_that_is_not_there(host: Host) -> None:
    with refused(errno.EFAULT):
        host.process.ioctl(host.vm(SEV).fd, ENCRYPT_OP, 0x1000)


@pytest.mark.parametrize("kind", [DEFAULT, SEV, SNP])
def test_unknown_and_unimplemented_numbers_are_einval_and_nothing_comes_back(host: Host, kind: int) -> None:
    vm = host.vm(kind)
    for number in (10, 14, 19, 23, 24, 50, 99, 103, 1 << 31):
        with refused(errno.EINVAL):
            vm.op(number)
        assert vm.error == STRANGE


def test_an_snp_guest_takes_snp_commands_only(host: Host) -> None:
    vm = host.vm(SNP)
    vm.init2()
    for number in range(100):
        with refused(errno.EPERM):
            vm.op(number, bytes(64))
        assert vm.error == STRANGE
    for number in (103, 500):
        with refused(errno.EINVAL):
            vm.op(number)


def test_sub_commands_of_sev_need_a_sev_guest(host: Host) -> None:
    vm = host.vm(DEFAULT)
    for number in (2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 17, 18, 20, 21):
        with refused(errno.ENOTTY):
            vm.op(number, bytes(0x48))
    with refused(errno.EINVAL):
        vm.op(13, bytes(0x48))


@pytest.mark.parametrize("number", [0, 1])
def test_init_is_for_vms_of_type_0(host: Host, number: int) -> None:
    for kind in (SW_PROTECTED, SEV, SEV_ES, SNP):
        with refused(errno.EINVAL):
            host.vm(kind).op(number)
    vm = host.vm(DEFAULT)
    vm.op(number)
    assert (vm.sev.es, vm.sev.ghcb_version, vm.sev.vmsa_features) == (bool(number), number, 0)
    for again in (0, 1, 22):
        with refused(errno.EINVAL):
            vm.op(again, bytes(48))


def test_es_init_needs_a_host_with_sev_es() -> None:
    host = Host(modules={"kvm_amd": "sev_es=0"})
    with refused(errno.ENOTTY):
        host.vm(DEFAULT).op(1)
    host.vm(DEFAULT).op(0)


def test_init2_by_type(host: Host) -> None:
    """ASIDs: plain SEV from 100 on, the others below. The newest GHCB, SNP active for SNP guests."""
    for kind, version, features, asid in ((SEV, 0, 0, 100), (SEV_ES, 2, 0, 1), (SNP, 2, 1, 2), (SEV, 0, 0, 101)):
        vm = host.vm(kind)
        vm.init2()
        guest = vm.sev
        assert (guest.ghcb_version, guest.vmsa_features, guest.asid) == (version, features, asid)
        assert len(guest.bounce) == (2 if kind == SNP else 0)
        with refused(errno.EPERM if kind == SNP else errno.EINVAL):
            vm.init2()


@pytest.mark.parametrize("kind", [DEFAULT, SW_PROTECTED])
def test_init2_of_other_types(host: Host, kind: int) -> None:
    with refused(errno.EINVAL):
        host.vm(kind).init2()


@pytest.mark.parametrize("kind", [SEV, SEV_ES, SNP])
def test_init2_refuses_flags_features_and_versions(host: Host, kind: int) -> None:
    vm = host.vm(kind)
    for bit in range(32):
        with refused(errno.EINVAL):
            vm.init2(flags=1 << bit)
    for bit in set(range(64)) - ({5} if kind != SEV else set()):
        with refused(errno.EINVAL):
            vm.init2(features=1 << bit)
    with refused(errno.EINVAL):
        vm.init2(version=3)
    if kind == SEV:
        with refused(errno.EINVAL):
            vm.init2(version=1)
    else:
        vm.init2(version=1)
        assert vm.sev.ghcb_version == 1


def test_debug_swap_is_opt_in_and_needs_the_module() -> None:
    genoa = Host(modules={"kvm_amd": "debug_swap=0"})
    with refused(errno.EINVAL):
        genoa.vm(SEV_ES).init2(features=1 << 5)


@pytest.mark.parametrize(("kind", "number"), [(DEFAULT, 0), (DEFAULT, 1)])
def test_init_comes_before_vcpus(host: Host, kind: int, number: int) -> None:
    vm = host.vm(kind)
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.op(number)


def test_a_bad_structure_address_of_init2_burns_nothing(host: Host) -> None:
    vm = host.vm(SEV)
    with refused(errno.EFAULT):
        vm.op(22)
    assert not host.kernel.kvm.asids.taken.any()
    assert vm.error == STRANGE


def test_no_memory_for_bounce_pages_burns_an_asid(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, memory, asids = host.vm(SNP), host.kernel.memory, host.kernel.kvm.asids
    free = host.free
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_free", [])
        with refused(errno.ENOMEM):
            vm.init2()
    assert vm.vm.sev is None
    assert vm.error == 0
    assert host.free == free
    assert asids.taken.nonzero()[0].tolist() == asids.reclaimable.nonzero()[0].tolist() == [1]
    assert asids.charged == {"sev": 0, "sev_es": 0}
    vm.init2()
    assert vm.vm.asid == 2
    assert vm.error == STRANGE


def test_a_platform_that_cannot_be_initialised_burns_an_asid(monkeypatch: pytest.MonkeyPatch) -> None:
    """psp_init_on_probe=0 leaves INIT to the first guest."""
    host = Host(modules={"ccp": "psp_init_on_probe=0"})
    vm, asids = host.vm(SEV), host.kernel.kvm.asids
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.INIT, Status.HWERROR_PLATFORM)
        with refused(errno.EIO, Status.HWERROR_PLATFORM):
            vm.init2()
    assert vm.error == Status.HWERROR_PLATFORM
    assert vm.vm.sev is None
    assert asids.reclaimable.nonzero()[0].tolist() == [100]
    vm.init2()
    assert vm.vm.asid == 101


def test_snp_init_of_the_series() -> None:
    host = Host("rfc-v7")
    vm = host.vm(DEFAULT)
    with refused(errno.EOPNOTSUPP):
        vm.op(22, struct.pack("<Q", 1))
    assert vm.vm.sev is None
    assert vm.op(22, struct.pack("<Q", 0)) == bytes(8)
    assert vm.vm.snp
    with refused(errno.EINVAL):
        vm.op(22, bytes(8))
    with refused(errno.EINVAL):
        host.vm(SNP)


def test_the_series_numbers_are_not_linux_numbers() -> None:
    host = Host("rfc-v7")
    vm = host.vm(DEFAULT)
    for number in (28, 100, 101, 102):
        with refused(errno.EINVAL):
            vm.op(number, bytes(64))


def test_certificate_requests_are_a_later_kernels_option() -> None:
    host = Host()
    plain = host.vm(SNP)
    plain.init2()
    with refused(errno.EINVAL):
        plain.op(103)
    host.kernel.era = era("mainline", "certificate-exit")
    plain.op(103)
    assert plain.sev.asks_certificates
    late, other = host.vm(SNP), host.vm(SEV)
    late.init2()
    late.create_vcpu()
    for vm in (late, other, host.vm(SNP)):
        with refused(errno.EINVAL):
            vm.op(103)
