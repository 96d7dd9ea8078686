"""What QEMU does before a confidential guest has memory: the host's checks, /dev/sev, INIT, LAUNCH_START.

Source: QEMU target/i386/sev.c (sev_common_kvm_init, sev_launch_start, sev_snp_launch_start).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import GuestKind, VmmError
from snpbook.host.vmm.properties import decoded
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF
from snpbook.spec.qemu import REDUCED_PHYS_BITS, WORKAROUNDS_SIZE
from snpbook.spec.uapi_kvm import Ioctl, VmType
from snpbook.spec.uapi_psp import CMD, COMMANDS, ISSUE_CMD, STATUS, STATUS_FLAG_ES, PspCommand
from snpbook.spec.uapi_sev import SevOp

if TYPE_CHECKING:
    from snpbook.host.vmm.guest import Vmm

_INIT = "sev_common_kvm_init"


def vm_type(vmm: Vmm) -> VmType:
    """The type of VM to ask for: 0 where the kernel has no types, or where the old calls are asked for.

    A guest that nobody encrypts and that has private memory is of the type that the kernel has for tests.
    """
    plain = vmm.kind is GuestKind.PLAIN
    wanted = VmType.SW_PROTECTED_VM if plain and vmm.private_memory else vmm.kind.vm_type
    typed = wanted in vmm.kernel.era.vm_types and not (vmm.object and vmm.object.legacy_vm_type)
    return wanted if typed else VmType.DEFAULT_VM


def initialise(vmm: Vmm) -> None:
    """Make the VM a confidential guest. `VmmError` for a property that the host belies, `KernelError`."""
    _check_host(vmm)
    _open_device(vmm)
    with vmm.reporting(f"{_INIT}: failed to initialize"):
        _init(vmm)
    enable_capabilities(vmm)
    _start_snp(vmm) if vmm.kind is GuestKind.SNP else _start_sev(vmm)


def enable_capabilities(vmm: Vmm) -> None:
    """Switch on what private memory needs of the VM."""
    for cap, value in vmm.kind.capabilities(vmm.kernel.era, private=vmm.private_memory):
        vmm.process.ioctl(vmm.vm_fd, Ioctl.ENABLE_CAP, structs.ENABLE_CAP.pack(cap=cap, arg0=value))


def _check_host(vmm: Vmm) -> None:
    given = vmm.object
    assert given is not None
    host = vmm.kernel.cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF).decode(ENCRYPTED_MEMORY).c_bit
    if given.cbitpos not in (None, host):
        raise VmmError(f"{_INIT}: cbitpos check failed, host '{host}' requested '{given.cbitpos}'")
    if given.reduced_phys_bits not in REDUCED_PHYS_BITS:
        raise VmmError(
            f"{_INIT}: reduced_phys_bits check failed, it should be in the range of {REDUCED_PHYS_BITS[0]} to "
            f"{REDUCED_PHYS_BITS[-1]}, requested '{given.reduced_phys_bits}'"
        )


def _open_device(vmm: Vmm) -> None:
    """The device, and SEV_PLATFORM_STATUS through it."""
    assert vmm.object is not None
    try:
        vmm.sev_fd = vmm.process.open(vmm.object.sev_device)
    except KernelError as error:
        vmm.report(f"{_INIT}: Failed to open {vmm.object.sev_device} '{os.strerror(error.errno or errno.EIO)}'")
        raise
    number = {command: each for each, command in COMMANDS.items()}[PspCommand.PLATFORM_STATUS]
    with vmm.scratch.placed(bytes(STATUS.size)) as address:
        asked = bytearray(CMD.pack(cmd=number, data=address))
        with vmm.reporting(f"{_INIT}: failed to get platform status"):
            try:
                vmm.process.ioctl(vmm.sev_fd, ISSUE_CMD, asked)
            finally:
                vmm.fw_error = CMD.unpack(asked).error
        status = STATUS.unpack(vmm.process.load(address, STATUS.size))
    if vmm.kind is GuestKind.SEV_ES and not status.flags & STATUS_FLAG_ES:
        raise VmmError(f"{_INIT}: guest policy requires SEV-ES, but host SEV-ES support unavailable")


def _init(vmm: Vmm) -> None:
    assert vmm.object is not None
    if vm_type(vmm) is not VmType.DEFAULT_VM:
        vmm.sev(SevOp.INIT2, vmsa_features=vmm.object.vmsa_features)
    elif vmm.kind is GuestKind.SNP:
        vmm.sev(SevOp.SNP_INIT, flags=vmm.object.init_flags)
    else:
        vmm.sev(SevOp.ES_INIT if vmm.kind is GuestKind.SEV_ES else SevOp.INIT)


def _start_snp(vmm: Vmm) -> None:
    assert vmm.object is not None
    workarounds = vmm.object.guest_visible_workarounds.ljust(WORKAROUNDS_SIZE, b"\0")
    with vmm.reporting("sev_snp_launch_start: SNP_LAUNCH_START"):
        vmm.sev(SevOp.SNP_LAUNCH_START, policy=vmm.object.policy, gosvw=workarounds)


def _start_sev(vmm: Vmm) -> None:
    given = vmm.object
    assert given is not None
    dh, session = (decoded(vmm.file(name)) if name else b"" for name in (given.dh_cert_file, given.session_file))
    with (
        vmm.scratch.placed(dh) as dh_at,
        vmm.scratch.placed(session) as session_at,
        vmm.reporting("sev_launch_start: LAUNCH_START"),
    ):
        blobs: dict[str, Any] = {
            "dh_uaddr": dh_at,
            "dh_len": len(dh),
            "session_uaddr": session_at,
            "session_len": len(session),
        }
        answer = vmm.sev(SevOp.LAUNCH_START, handle=given.handle, policy=given.policy, **blobs)
    assert answer is not None
    vmm.handle = answer.handle
