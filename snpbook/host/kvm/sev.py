"""KVM_MEMORY_ENCRYPT_OP: which sub-command a VM may be given, and how an encrypted guest ends.

Here are the checks that come before all sub-commands; what each does is in the modules beside this one. Sources: Linux
arch/x86/kvm/svm/sev.c (sev_mem_enc_ioctl, sev_vm_destroy); RFC v7 patches 36 to 40 and 62.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from snpbook.host.files import Argument
from snpbook.host.kvm import (
    enc_regions,
    legacy_launch,
    sev_debug,
    sev_init,
    snp_certs,
    snp_launch,
    snp_update,
    transport,
)
from snpbook.host.kvm.sev_call import SevCall
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Steps
from snpbook.spec.uapi_sev import CMD, MIRROR_OPS, UNIMPLEMENTED, SevOp

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm, VmFile

Handler = Callable[["Vm", SevCall], Steps[None] | None]
"""A sub-command; one that others can cut into gives steps."""


def memory_encrypt_op(file: VmFile, process: Process, argument: Argument) -> Steps[int]:
    """One sub-command, under kvm->lock. ENOTTY where the host has no SEV, which a null argument asks for.

    The structure comes back with the firmware's status whether the sub-command succeeds or not, but not from the checks
    before it: EINVAL for a number that is none, and for a mirror VM; EPERM for an SNP VM and a sub-command of SEV.
    """
    vm = file.vm
    check(vm.kvm.sev, errno.ENOTTY, "this host runs SEV guests", "sev Y", "sev N")
    if argument.null:
        return 0
    command = argument.record(CMD)
    with (yield from vm.lock.hold()):
        op = _admitted(vm, command.id)
        argument.fields["id"] = op.name
        call = SevCall(process, op, command.data, command.sev_fd, command.error)
        try:
            steps = HANDLERS[op](vm, call)
            if steps is not None:
                yield from steps
        finally:
            argument.write(bytes(command.replace(error=call.error)))
    return 0


def _admitted(vm: Vm, number: int) -> SevOp:
    era = vm.kernel.era
    op = era.ops.get(number)
    if vm.sev is not None and vm.sev.mirror_of is not None:
        check(
            op in MIRROR_OPS, errno.EINVAL, "a sub-command of a mirror VM", sorted(each.name for each in MIRROR_OPS), op
        )
    if era.snp_only_snp_ops and vm.snp:
        first = era.op_id(SevOp.SNP_LAUNCH_START)
        check(number >= first, errno.EPERM, "a sub-command of an SNP VM", f"{first} and above", number)
    if op is None or op in UNIMPLEMENTED:
        raise KernelError(errno.EINVAL, "a sub-command of this kernel", sorted(era.ops), number)
    return op


def destroy(vm: Vm) -> None:
    """The VM ends: caches are written back, pins end, the firmware forgets the guest, the ASID waits for a flush.

    A mirror only lets its owner go. A guest that SNP_DECOMMISSION does not end keeps its context page and its ASID for
    ever.
    """
    guest = vm.sev
    if guest is None:
        return
    if guest.mirror_of is not None:
        guest.mirror_of.let_go()
        return
    vm.kernel.cpu.wbinvd()
    enc_regions.unpin_all(vm)
    if guest.snp and not snp_launch.end(vm):
        return
    if not guest.snp:
        legacy_launch.unbind(vm, guest.handle)
    vm.kvm.asids.give_back(guest.asid)


HANDLERS: Mapping[SevOp, Handler] = {
    SevOp.INIT: sev_init.init,
    SevOp.ES_INIT: sev_init.init,
    SevOp.INIT2: sev_init.init2,
    SevOp.SNP_INIT: sev_init.snp_init,
    SevOp.LAUNCH_START: legacy_launch.start,
    SevOp.LAUNCH_UPDATE_DATA: legacy_launch.update_data,
    SevOp.LAUNCH_UPDATE_VMSA: legacy_launch.update_vmsa,
    SevOp.LAUNCH_MEASURE: legacy_launch.measure,
    SevOp.LAUNCH_SECRET: legacy_launch.secret,
    SevOp.LAUNCH_FINISH: legacy_launch.finish,
    SevOp.GUEST_STATUS: legacy_launch.status,
    SevOp.GET_ATTESTATION_REPORT: legacy_launch.attestation_report,
    SevOp.DBG_DECRYPT: sev_debug.decrypt,
    SevOp.DBG_ENCRYPT: sev_debug.encrypt,
    SevOp.SEND_START: transport.send_start,
    SevOp.SEND_UPDATE_DATA: transport.send_update_data,
    SevOp.SEND_FINISH: transport.send_finish,
    SevOp.SEND_CANCEL: transport.send_cancel,
    SevOp.RECEIVE_START: transport.receive_start,
    SevOp.RECEIVE_UPDATE_DATA: transport.receive_update_data,
    SevOp.RECEIVE_FINISH: transport.receive_finish,
    SevOp.SNP_LAUNCH_START: snp_launch.start,
    SevOp.SNP_LAUNCH_UPDATE: snp_update.update,
    SevOp.SNP_LAUNCH_FINISH: snp_launch.finish,
    SevOp.SNP_GET_CERTS: snp_certs.get,
    SevOp.SNP_SET_CERTS: snp_certs.put,
    SevOp.SNP_ENABLE_REQ_CERTS: snp_certs.enable_requests,
}
