"""Registers of a vCPU by ioctl, in the structures of KVM, and the VMCB that a vCPU starts with.

Everything is kept as one record by VMSA name (`Vcpu.state`). Once a launch has encrypted the registers they are out of
reach: EINVAL, or for SEV-ES guests of the default VM type 0 without effect. Sources: Linux arch/x86/kvm/x86.c,
arch/x86/kvm/svm/svm.c (init_vmcb), arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.files import Argument
from snpbook.host.kvm import ghcb_msr
from snpbook.host.process import Process
from snpbook.host.refusal import check
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.layout import Record
from snpbook.spec.msr import SAVED_REGISTERS, SEGMENT_BASES
from snpbook.spec.products import Product
from snpbook.spec.uapi_kvm import MpState, VmType
from snpbook.spec.vmcb import VMCB, ExitCode, intercept_bits
from snpbook.spec.vmsa import (
    BSP_RESET_EIP,
    CR0_CD_NW,
    EFER_SVME,
    KVM_RESET_TR,
    SEGMENT,
    X87_REGISTERS,
    X87_SIZE,
    X87_SPACING,
    XSAVE_PLACES,
    reset_vmsa,
)

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu, VcpuFile

_COMMON = (
    ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT, ExitCode.RDPMC, ExitCode.CPUID, ExitCode.INVD,
    ExitCode.HLT, ExitCode.IOIO, ExitCode.SHUTDOWN, ExitCode.VMRUN, ExitCode.VMMCALL, ExitCode.WBINVD,
    ExitCode.MONITOR, ExitCode.MWAIT, ExitCode.MC_EXCEPTION,
)  # fmt: skip
"""What KVM intercepts of every guest, without MSRs (it has no permission map here) and without write traps (MODEL)."""
INTERCEPTS = intercept_bits(*_COMMON)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
_TYPES = (
    ("type", 0, 4),
    ("s", 4, 1),
    ("dpl", 5, 2),
    ("present", 7, 1),
    ("avl", 8, 1),
    ("l", 9, 1),
    ("db", 10, 1),
    ("g", 11, 1),
)
"""The fields of a segment's attributes: name in `kvm_segment`, first bit, width."""
_X87_PLACES = range(X87_REGISTERS, X87_REGISTERS + 8 * X87_SPACING, X87_SPACING)
_MSRS = {int(msr): name for msr, name in SAVED_REGISTERS.items() if msr not in SEGMENT_BASES}
"""The registers that KVM keeps with a vCPU, by MSR number."""


def reset_state(product: Product) -> Record:
    """The registers that KVM gives a new vCPU: the processor's reset state, with KVM's task segment."""
    state = reset_vmsa(BSP_RESET_EIP, product.vcpu_signature, 0)
    return state.replace(tr=state.tr.replace(attrib=KVM_RESET_TR))


def control(vcpu: Vcpu) -> bytes:
    """The VMCB of a new vCPU."""
    vm = vcpu.vm
    sev = vm.sev
    return VMCB.pack(
        intercepts=INTERCEPTS,
        asid=vm.asid,
        nested_paging=1,
        sev=int(sev is not None),
        sev_es=int(vm.protected_state),
        lbr_virtualization=int(vm.protected_state),
        nested_cr3=vm.mmu.tables.root,
        iopm_base_pa=vm.kvm.iopm,
        ghcb_gpa=ghcb_msr.information(vm) if vm.protected_state else 0,
        vmsa_pa=vcpu.vmsa if vm.protected_state and vcpu.vmsa is not None else 0,
    )


def _reach(vcpu: Vcpu) -> bool:
    """Whether the registers are in reach; False where the call does nothing, EINVAL where it may not be made."""
    if not vcpu.encrypted:
        return True
    quiet = vcpu.vm.type is VmType.DEFAULT_VM and not vcpu.vm.snp
    check(
        quiet,
        errno.EINVAL,
        "registers of an encrypted vCPU are out of reach",
        "before the launch takes them",
        "encrypted",
    )
    return False


def get_regs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """The general registers, RIP and RFLAGS."""
    if _reach(file.vcpu):
        state = file.vcpu.state
        argument.store(structs.REGS.record(**{name: getattr(state, name) for name in structs.REGS.fields}))
    return 0


def set_regs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Set them."""
    given = argument.record(structs.REGS)
    if _reach(file.vcpu):
        file.vcpu.state = file.vcpu.state.replace(**dict(given))
    return 0


def get_sregs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Segments, tables and control registers."""
    if not _reach(file.vcpu):
        return 0
    state = file.vcpu.state
    tables = {"gdt": state.gdtr, "idt": state.idtr}
    argument.store(
        structs.SREGS.record(
            **{name: kvm_segment(getattr(state, name)) for name in _SEGMENTS},
            tr=kvm_segment(state.tr),
            ldt=kvm_segment(state.ldtr),
            **{name: structs.DTABLE.record(base=table.base, limit=table.limit) for name, table in tables.items()},
            **{name: getattr(state, name) for name in ("cr0", "cr2", "cr3", "cr4")},
            efer=state.efer & ~EFER_SVME,
        )
    )
    return 0


def set_sregs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Segments, tables and control registers; SVM keeps EFER.SVME set, and CR0.CD and NW clear (a quirk)."""
    given = argument.record(structs.SREGS)
    if not _reach(file.vcpu):
        return 0
    file.vcpu.state = file.vcpu.state.replace(
        **{name: _segment(getattr(given, name)) for name in _SEGMENTS},
        tr=_segment(given.tr),
        ldtr=_segment(given.ldt),
        gdtr=SEGMENT.record(base=given.gdt.base, limit=given.gdt.limit),
        idtr=SEGMENT.record(base=given.idt.base, limit=given.idt.limit),
        cr0=given.cr0 & ~CR0_CD_NW,
        cr2=given.cr2,
        cr3=given.cr3,
        cr4=given.cr4,
        efer=given.efer | EFER_SVME,
    )
    return 0


def kvm_segment(segment: Record) -> Record:
    """A segment as KVM has it."""
    fields = {name: segment.attrib >> low & (1 << width) - 1 for name, low, width in _TYPES}
    unusable = int(not fields["present"])
    return structs.SEGMENT.record(
        base=segment.base, limit=segment.limit, selector=segment.selector, unusable=unusable, **fields
    )


def _segment(given: Record) -> Record:
    attrib = sum((getattr(given, name) & (1 << width) - 1) << low for name, low, width in _TYPES)
    return SEGMENT.record(selector=given.selector, attrib=attrib, limit=given.limit, base=given.base)


def get_msrs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """How many of the registers were read: up to the first that KVM does not keep."""
    entries = _msr_entries(argument)
    if not _reach(file.vcpu):
        return len(entries)
    filled: list[Record] = []
    for entry in entries:
        name = _MSRS.get(entry.index)
        if name is None:
            break
        filled.append(entry.replace(data=getattr(file.vcpu.state, name)))
    head = structs.MSRS.record(nmsrs=len(entries))
    argument.write(bytes(head) + b"".join(map(bytes, filled)))
    return len(filled)


def set_msrs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """How many of the registers were set: up to the first that KVM does not keep."""
    entries = _msr_entries(argument)
    if not _reach(file.vcpu):
        return len(entries)
    done = 0
    for entry in entries:
        name = _MSRS.get(entry.index)
        if name is None:
            break
        file.vcpu.state = file.vcpu.state.replace(**{name: entry.data})
        done += 1
    return done


def _msr_entries(argument: Argument) -> list[Record]:
    count = argument.record(structs.MSRS).nmsrs
    size, entry = structs.MSRS.size, structs.MSR_ENTRY
    data = argument.read(size + count * entry.size)
    return [entry.unpack(data, size + i * entry.size) for i in range(count)]


def get_xcrs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """XCR0, the only extended control register."""
    if _reach(file.vcpu):
        first = structs.XCR.record(xcr=0, value=file.vcpu.state.xcr0)
        others = (structs.XCR.record(),) * 15
        argument.store(structs.XCRS.record(nr_xcrs=1, xcrs=(first, *others)))
    return 0


def set_xcrs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """XCR0 alone exists; EINVAL for more registers than the structure holds, and for flags."""
    given = argument.record(structs.XCRS)
    check(
        given.nr_xcrs <= len(given.xcrs) and not given.flags, errno.EINVAL, "registers", len(given.xcrs), given.nr_xcrs
    )
    if _reach(file.vcpu):
        for each in given.xcrs[: given.nr_xcrs]:
            if each.xcr == 0:
                file.vcpu.state = file.vcpu.state.replace(xcr0=each.value)
    return 0


def get_xsave(file: VcpuFile, process: Process, argument: Argument) -> int:
    """x87, SSE and AVX state in the standard format of XSAVE."""
    if _reach(file.vcpu):
        region = bytearray(structs.XSAVE.size)
        for i, place in enumerate(_X87_PLACES):
            region[place : place + X87_SIZE] = file.vcpu.state.x87_registers[i * X87_SIZE :][:X87_SIZE]
        for name, place in XSAVE_PLACES.items():
            field = file.vcpu.state.layout.fields[name]
            value = getattr(file.vcpu.state, name)
            region[place : place + field.size] = value if field.kind == "raw" else value.to_bytes(field.size, "little")
        argument.write(bytes(region))
    return 0


def set_xsave(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Set the state of x87, SSE and AVX."""
    region = argument.read(structs.XSAVE.size)
    if _reach(file.vcpu):
        state, changes = file.vcpu.state, {}
        for name, place in XSAVE_PLACES.items():
            field = state.layout.fields[name]
            data = region[place : place + field.size]
            changes[name] = data if field.kind == "raw" else int.from_bytes(data, "little")
        x87 = b"".join(region[place : place + X87_SIZE] for place in _X87_PLACES)
        file.vcpu.state = state.replace(**changes, x87_registers=x87)
    return 0


def get_debugregs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Breakpoints, DR6 and DR7."""
    if _reach(file.vcpu):
        state = file.vcpu.state
        pairs = {f"db{i}": getattr(state, f"dr{i}") for i in range(4)}
        argument.store(structs.DEBUGREGS.record(**pairs, dr6=state.dr6, dr7=state.dr7))
    return 0


def set_debugregs(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Set them; EINVAL for flags, and for bits above 31 of DR6 and DR7."""
    given = argument.record(structs.DEBUGREGS)
    check(not given.flags, errno.EINVAL, "flags of debug registers", 0, given.flags)
    high = max(given.dr6, given.dr7) >> 32
    check(not high, errno.EINVAL, "DR6 and DR7 have 32 bits", "bits 63:32 clear", hex(high))
    if _reach(file.vcpu):
        pairs = {f"dr{i}": getattr(given, f"db{i}") for i in range(4)}
        file.vcpu.state = file.vcpu.state.replace(**pairs, dr6=given.dr6, dr7=given.dr7)
    return 0


def set_cpuid2(file: VcpuFile, process: Process, argument: Argument) -> int:
    """What CPUID tells the guest. E2BIG above 256 entries; a new vCPU's RDX at reset is the signature."""
    count = argument.record(structs.CPUID2).nent
    check(count <= structs.CPUID_ENTRIES, errno.E2BIG, "entries of CPUID", structs.CPUID_ENTRIES, count)
    size, entry = structs.CPUID2.size, structs.CPUID_ENTRY2
    data = argument.read(size + count * entry.size)
    file.vcpu.cpuid = tuple(entry.unpack(data, size + i * entry.size) for i in range(count))
    return 0


def get_cpuid2(file: VcpuFile, process: Process, argument: Argument) -> int:
    """The entries again; E2BIG, and their number, where the structure has too little room."""
    room, entries = argument.record(structs.CPUID2).nent, file.vcpu.cpuid
    argument.write(bytes(structs.CPUID2.record(nent=len(entries))))
    check(room >= len(entries), errno.E2BIG, "room for the entries of CPUID", len(entries), room)
    argument.write(bytes(structs.CPUID2.record(nent=len(entries))) + b"".join(map(bytes, entries)))
    return 0


def get_mp_state(file: VcpuFile, process: Process, argument: Argument) -> int:
    """Whether the vCPU runs, or what it waits for."""
    argument.store(structs.MP_STATE.record(mp_state=file.vcpu.mp_state))
    return 0


def set_mp_state(file: VcpuFile, process: Process, argument: Argument) -> int:
    """EINVAL for a state that x86 does not have."""
    state = argument.record(structs.MP_STATE).mp_state
    check(state in MpState._value2member_map_, errno.EINVAL, "a state of a vCPU", list(MpState), state)
    file.vcpu.mp_state = MpState(state)
    return 0
