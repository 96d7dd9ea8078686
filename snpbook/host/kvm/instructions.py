"""Instructions that KVM does for a guest, whether it was intercepted or the guest told of it through its GHCB.

Operands are in KVM's copy of the registers (`Vcpu.state`), and so are results. Where the registers are encrypted the
guest itself goes on behind the instruction. Sources: Linux arch/x86/kvm/x86.c, arch/x86/kvm/svm/svm.c
(svm_exit_handlers); RFC v7 patch 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from snpbook.host.kvm import guest_cpuid, interrupts
from snpbook.host.steps import Step, Steps
from snpbook.spec import uapi_kvm as uapi
from snpbook.spec.ghcb import IOIO
from snpbook.spec.injection import EOI_MSR
from snpbook.spec.msr import SAVED_REGISTERS, SEGMENT_BASES
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import Exit, InternalError, IoDirection, VmType
from snpbook.spec.uapi_kvm_structs import EXIT_HYPERCALL, EXIT_INTERNAL, EXIT_IO
from snpbook.spec.vmcb import EVENT, EventKind, ExitCode, Vector
from snpbook.spec.vmsa import VMSA

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1
_SIZE_BITS = 3
_SIZES = (1, 2, 4)


def handle(vcpu: Vcpu, code: int, info_1: int, info_2: int = 0) -> bool:
    """Do what an exit code says, or tell the VMM: whether it is needed. One without a handler is an internal error."""
    handler = _HANDLERS.get(code)
    if handler is not None:
        return handler(vcpu, info_1)
    vcpu.vm.kernel.log(f"svm: unexpected exit reason {code:#x}")
    fields = {"suberror": InternalError.UNEXPECTED_EXIT_REASON, "ndata": 2, "data0": code, "data1": vcpu.core}
    vcpu.leave(Exit.INTERNAL_ERROR, EXIT_INTERNAL, **fields)
    return True


def skip(vcpu: Vcpu) -> None:
    """Go on behind the instruction."""
    if not vcpu.vm.protected_state:
        vcpu.state = vcpu.state.replace(rip=vcpu.control().next_rip)


def inject(vcpu: Vcpu, vector: Vector, *, error: int | None = None) -> None:
    """Have the guest take an exception as it is entered."""
    event = EVENT.pack(
        vector=vector, kind=EventKind.EXCEPTION, valid=1, has_error=int(error is not None), error=error or 0
    )
    vcpu.set_control("event_injection", int.from_bytes(event, "little"))


def cpuid(vcpu: Vcpu) -> None:
    """CPUID of EAX and ECX."""
    found = guest_cpuid.find(vcpu, vcpu.state.rax & _LOW, vcpu.state.rcx & _LOW)
    vcpu.state = vcpu.state.replace(rax=found.eax, rbx=found.ebx, rcx=found.ecx, rdx=found.edx)


def _cpuid(vcpu: Vcpu, info_1: int) -> bool:
    cpuid(vcpu)
    skip(vcpu)
    return False


def _nop(vcpu: Vcpu, info_1: int) -> bool:
    """WBINVD, INVD, MONITOR, MWAIT, PAUSE: no device of this host reads memory past the caches (MODEL)."""
    skip(vcpu)
    return False


def _nothing(vcpu: Vcpu, info_1: int) -> bool:
    """An event of the host, or DR7, of which a guest with SEV-ES has its own and KVM intercepts no other's."""
    return False


def _undefined(vcpu: Vcpu, info_1: int) -> bool:
    inject(vcpu, Vector.UD)
    return False


def _rdpmc(vcpu: Vcpu, info_1: int) -> bool:
    """The guest has no performance counters (MODEL): #GP."""
    inject(vcpu, Vector.GP, error=0)
    return False


# Model-specific registers.


def _msr(vcpu: Vcpu, info_1: int) -> bool:
    """RDMSR or WRMSR of ECX: the registers that KVM keeps; others are #GP."""
    done = _write_msr(vcpu) if info_1 & 1 else _read_msr(vcpu)
    if done:
        skip(vcpu)
    elif vcpu.exchange is not None:
        vcpu.exchange.fault(Vector.GP)
    else:
        inject(vcpu, Vector.GP, error=0)
    return False


def _read_msr(vcpu: Vcpu) -> bool:
    msr = vcpu.state.rcx & _LOW
    if msr not in _KEPT or _is_guests(vcpu):
        return _ignored(vcpu, msr, rax=0, rdx=0)
    held = getattr(vcpu.state, _KEPT[msr])
    value = held.base if msr in SEGMENT_BASES else held
    vcpu.state = vcpu.state.replace(rax=value & _LOW, rdx=value >> 32)
    return True


def _write_msr(vcpu: Vcpu) -> bool:
    state = vcpu.state
    msr, value = state.rcx & _LOW, (state.rdx & _LOW) << 32 | state.rax & _LOW
    if msr == EOI_MSR and vcpu.doorbell is not None:
        interrupts.end(vcpu)
        return True
    if msr not in _KEPT or _is_guests(vcpu):
        return _ignored(vcpu, msr)
    held = getattr(state, _KEPT[msr])
    new = held.replace(base=value) if msr in SEGMENT_BASES else value & VMSA.fields[_KEPT[msr]].limit
    vcpu.state = state.replace(**{_KEPT[msr]: new})
    return True


_KEPT = {int(msr): name for msr, name in SAVED_REGISTERS.items()}


def _is_guests(vcpu: Vcpu) -> bool:
    """Whether the registers of the guest's state are in its encrypted save area, out of reach."""
    return vcpu.vm.protected_state and vcpu.encrypted


def _ignored(vcpu: Vcpu, msr: int, **result: int) -> bool:
    """A register out of reach: SEV-ES guests of the default VM type read 0 and write nothing, all others fault."""
    quiet = msr in _KEPT and vcpu.vm.type is VmType.DEFAULT_VM
    if quiet:
        vcpu.state = vcpu.state.replace(**result)
    return quiet


# Ports.


def _port(vcpu: Vcpu, info_1: int) -> bool:
    """IN or OUT. A string of an intercepted guest would be decoded, which the model cannot: an internal error."""
    info = IOIO.unpack((info_1 & _ALL).to_bytes(IOIO.size, "little"))
    size = info_1 >> IOIO.fields["size_8"].lo & (1 << _SIZE_BITS) - 1
    if info.is_string or size not in _SIZES:
        vcpu.leave(Exit.INTERNAL_ERROR, EXIT_INTERNAL, suberror=InternalError.EMULATION)
        return True
    port_exit(vcpu, info.port, size, 1, None if info.is_in else vcpu.state.rax.to_bytes(8, "little")[:size])
    vcpu.completion = _port_in if info.is_in else _port_out
    return True


def port_exit(vcpu: Vcpu, port: int, size: int, count: int, data: bytes | None) -> None:
    """KVM_EXIT_IO: `count` accesses of `size` bytes; `data` goes out, and None asks for it."""
    if data is not None:
        vcpu.put_port_data(data)
    direction = IoDirection.IN if data is None else IoDirection.OUT
    offset = uapi.PIO_PAGE << PAGE_SHIFT
    vcpu.leave(Exit.IO, EXIT_IO, direction=direction, size=size, port=port, count=count, data_offset=offset)


def _port_in(vcpu: Vcpu) -> Steps[bool]:
    """AL and AX leave the rest of RAX as it is; EAX clears the upper half."""
    yield Step("port read")
    size = vcpu.answer(EXIT_IO).size
    kept = vcpu.state.rax >> 8 * size << 8 * size if size in _SIZES[:-1] else 0
    value = int.from_bytes(vcpu.port_data(_SIZES[-1]), "little") & (1 << 8 * min(size, _SIZES[-1])) - 1
    vcpu.state = vcpu.state.replace(rax=kept | value)
    skip(vcpu)
    return False


def _port_out(vcpu: Vcpu) -> Steps[bool]:
    yield Step("port written")
    skip(vcpu)
    return False


# Hypercalls.


def _vmmcall(vcpu: Vcpu, info_1: int) -> bool:
    """A hypercall: its number in RAX, what it wants in RBX, RCX and RDX. Only one reaches the VMM."""
    state = vcpu.state
    result = -uapi.HC_ENOSYS
    if state.cpl:
        result = -uapi.HC_EPERM
    elif state.rax == uapi.HC_VAPIC_POLL_IRQ:
        result = 0
    elif state.rax == uapi.HC_MAP_GPA_RANGE:
        wanted = _map_gpa_range(vcpu, state.rbx, state.rcx)
        if wanted is None:
            hypercall_exit(vcpu, state.rbx, state.rcx, state.rdx, long_mode=True)
            vcpu.completion = _hypercall_done
            return True
        result = wanted
    vcpu.state = state.replace(rax=result & _ALL)
    skip(vcpu)
    return False


def _map_gpa_range(vcpu: Vcpu, gpa: int, pages: int) -> int | None:
    """What KVM itself answers to KVM_HC_MAP_GPA_RANGE; None where the VMM is asked."""
    vm = vcpu.vm
    if not asks_userspace(vcpu):
        return -uapi.HC_ENOSYS
    if gpa % PAGE_SIZE or not 0 < pages <= _ALL - (gpa >> PAGE_SHIFT):
        return -uapi.HC_EINVAL
    slot = vm.slots.of(gpa >> PAGE_SHIFT)
    without = not vm.has_private_memory or slot is None or slot.private is None
    return 0 if vm.kernel.era.map_gpa_needs_private and without else None


def asks_userspace(vcpu: Vcpu) -> bool:
    """Whether the VMM has asked for KVM_HC_MAP_GPA_RANGE (KVM_CAP_EXIT_HYPERCALL)."""
    return bool(vcpu.vm.exit_hypercalls >> uapi.HC_MAP_GPA_RANGE & 1)


def hypercall_exit(vcpu: Vcpu, gpa: int, pages: int, attributes: int, *, long_mode: bool = False) -> None:
    """KVM_EXIT_HYPERCALL for a run of pages that change sides."""
    flags = uapi.HYPERCALL_LONG_MODE if long_mode else 0
    fields = {"nr": uapi.HC_MAP_GPA_RANGE, "arg0": gpa, "arg1": pages, "arg2": attributes, "flags": flags}
    vcpu.leave(Exit.HYPERCALL, EXIT_HYPERCALL, **fields)


def _hypercall_done(vcpu: Vcpu) -> Steps[bool]:
    yield Step("hypercall answered")
    vcpu.state = vcpu.state.replace(rax=vcpu.answer(EXIT_HYPERCALL).ret)
    skip(vcpu)
    return False


_HANDLERS: Mapping[int, Callable[[Vcpu, int], bool]] = {
    ExitCode.READ_DR7: _nothing,
    ExitCode.WRITE_DR7: _nothing,
    ExitCode.MC_EXCEPTION: _nothing,
    ExitCode.INTR: _nothing,
    ExitCode.NMI: _nothing,
    ExitCode.SMI: _nothing,
    ExitCode.INIT: _nothing,
    ExitCode.VINTR: _nothing,
    ExitCode.RDPMC: _rdpmc,
    ExitCode.CPUID: _cpuid,
    ExitCode.INVD: _nop,
    ExitCode.PAUSE: _nop,
    ExitCode.IOIO: _port,
    ExitCode.MSR: _msr,
    ExitCode.VMRUN: _undefined,
    ExitCode.VMMCALL: _vmmcall,
    ExitCode.RDTSCP: _undefined,
    ExitCode.WBINVD: _nop,
    ExitCode.MONITOR: _nop,
    ExitCode.MWAIT: _nop,
}
"""RDTSC is not among them: KVM never intercepts it, and calls a guest that tells of it an unexpected exit."""
