"""tools/testing/selftests/kvm/x86_64/sev_init2_tests.c."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.host.selftests.harness import (
    CHECK_EXTENSION,
    CREATE_VM,
    DEFAULT_VM,
    SEV_ES_VM,
    SEV_VM,
    SW_PROTECTED_VM,
    fails,
)
from tests.host.selftests.sev import SevHost

VM_TYPES, HAS_DEVICE_ATTR, GET_DEVICE_ATTR = 235, 0x4018AEE3, 0x4018AEE2
DEBUG_SWAP = 1 << 5


@pytest.fixture(scope="module")
def host() -> SevHost:
    return SevHost()


def features(host: SevHost) -> int:
    """KVM_X86_SEV_VMSA_FEATURES of /dev/kvm."""
    place = host.mmap(4096)
    request = struct.pack("<IIQQ", 0, 1, 0, place)
    host.process.ioctl(host.kvm, HAS_DEVICE_ATTR, request)
    host.process.ioctl(host.kvm, GET_DEVICE_ATTR, request)
    return int.from_bytes(host.process.load(place, 8), "little")


@pytest.mark.parametrize(
    "options", [{}, {"modules": {"kvm_amd": "sev_es=0"}}, {"modules": {"kvm_amd": "sev=0"}}], ids=str
)
def test_vm_types_agree_with_what_the_module_can(options: dict[str, dict[str, str]]) -> None:
    host = SevHost(boot=options)
    sev, es = (
        host.system.host.cat(f"/sys/module/kvm_amd/parameters/{name}").strip() == "Y" for name in ("sev", "sev_es")
    )
    assert (sev, es) == ("sev=0" not in str(options), not options)
    types = host.process.ioctl(host.kvm, CHECK_EXTENSION, VM_TYPES)
    assert types == host.process.ioctl(host.vm(), CHECK_EXTENSION, VM_TYPES)
    assert (bool(types >> SEV_VM & 1), bool(types >> SEV_ES_VM & 1)) == (sev, es)
    for kind, possible in ((SEV_VM, sev), (SEV_ES_VM, es)):
        if not possible:
            with fails(errno.EINVAL):
                host.process.ioctl(host.kvm, CREATE_VM, kind)


@pytest.mark.parametrize("kind", [SEV_VM, SEV_ES_VM])
def test_init2(host: SevHost, kind: int) -> None:
    host.init2(host.vm(kind))


@pytest.mark.parametrize("kind", [DEFAULT_VM, SW_PROTECTED_VM])
def test_init2_of_another_type(host: SevHost, kind: int) -> None:
    with fails(errno.EINVAL):
        host.init2(host.vm(kind))


@pytest.mark.parametrize("kind", [SEV_VM, SEV_ES_VM])
@pytest.mark.parametrize("bit", range(32))
def test_flags(host: SevHost, kind: int, bit: int) -> None:
    with fails(errno.EINVAL):
        host.init2(host.vm(kind), flags=1 << bit)


@pytest.mark.parametrize("kind", [SEV_VM, SEV_ES_VM])
@pytest.mark.parametrize("bit", range(64))
def test_features(host: SevHost, kind: int, bit: int) -> None:
    supported = features(host) if kind == SEV_ES_VM else 0
    assert supported & ~DEBUG_SWAP == 0
    vm = host.vm(kind)
    if supported >> bit & 1:
        host.init2(vm, features=1 << bit)
    else:
        with fails(errno.EINVAL):
            host.init2(vm, features=1 << bit)
    host.process.close(vm)
