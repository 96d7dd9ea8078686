"""Certificates of one SNP guest: its own blob in the v7 series, and the exit by which later kernels ask the VMM.

Sources: RFC v7 patches 62 and 63 (KVM_SEV_SNP_GET_CERTS, SET_CERTS); for KVM_SEV_SNP_ENABLE_REQ_CERTS of 2026 only its
number is known, its checks are unconfirmed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.kvm.snp_launch import context
from snpbook.host.refusal import check
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.uapi_sev import CERTS_LIMIT_V7

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm


def get(vm: Vm, call: SevCall) -> None:
    """SNP_GET_CERTS. ENOENT where none are set; EINVAL for too little room, with the length that is needed."""
    guest, _ = context(vm)
    wanted, held = call.payload(), guest.certificates
    check(bool(held), errno.ENOENT, "the guest has certificates", "SNP_SET_CERTS", "none")
    if wanted.certs_len < len(held):
        call.store(wanted.replace(certs_len=len(held)))
    check(wanted.certs_len >= len(held), errno.EINVAL, "room for the certificates", len(held), wanted.certs_len)
    call.process.space.copy_out(wanted.certs_uaddr, held)
    call.store(wanted.replace(certs_len=len(held)))


def put(vm: Vm, call: SevCall) -> None:
    """SNP_SET_CERTS: kept in whole pages; of length 0 they are removed. EINVAL above 20 KiB."""
    guest, _ = context(vm)
    wanted = call.payload()
    size = wanted.certs_len
    check(size <= CERTS_LIMIT_V7, errno.EINVAL, "the length of the certificates", CERTS_LIMIT_V7, size)
    guest.certificates = call.process.space.copy_in(wanted.certs_uaddr, size).ljust(
        -(-size // PAGE_SIZE) * PAGE_SIZE, b"\0"
    )


def enable_requests(vm: Vm, call: SevCall) -> None:
    """SNP_ENABLE_REQ_CERTS, before the first vCPU. EINVAL after it, and for a guest without SNP."""
    guest = vm.sev
    check(guest is not None and guest.snp, errno.EINVAL, "the VM is an SNP guest", "INIT2", vm.type.name)
    check(not vm.vcpus, errno.EINVAL, "no vCPU has been created", 0, len(vm.vcpus))
    assert guest is not None
    guest.asks_certificates = True
