"""What CPUID tells a guest: the entries that the VMM has set, and in them what KVM keeps in step with registers.

Source: Linux arch/x86/kvm/cpuid.c (kvm_cpuid, __kvm_update_cpuid_runtime), for guests with an AMD processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.spec import cpuid as spec
from snpbook.spec.cpuid import Registers
from snpbook.spec.layout import Record
from snpbook.spec.uapi_kvm import CpuidFlag
from snpbook.spec.vmsa import CR4_OSXSAVE, CR4_PKE

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_LOW_BYTE = (1 << 8) - 1


def find(vcpu: Vcpu, leaf: int, subleaf: int) -> Registers:
    """The registers of a leaf; zeros for one that the guest has no entry of, except in the leaves of the topology."""
    entry = _entry(vcpu, leaf, subleaf)
    if entry is not None:
        return _in_step(vcpu, leaf, subleaf, Registers(entry.eax, entry.ebx, entry.ecx, entry.edx))
    first = _entry(vcpu, leaf, 1) if leaf in spec.TOPOLOGY_LEAVES else None
    return Registers() if first is None else Registers(ecx=subleaf & _LOW_BYTE, edx=first.edx)


def _entry(vcpu: Vcpu, leaf: int, subleaf: int) -> Record | None:
    def matches(entry: Record) -> bool:
        indexed = entry.flags & CpuidFlag.SIGNIFCANT_INDEX
        return bool(entry.function == leaf and (entry.index == subleaf or not indexed))

    return next((entry for entry in vcpu.cpuid if matches(entry)), None)


def _in_step(vcpu: Vcpu, leaf: int, subleaf: int, found: Registers) -> Registers:
    """OSXSAVE and OSPKE by CR4, and the sizes of the XSAVE area by XCR0 and XSS."""
    state = vcpu.state
    if leaf == spec.SIGNATURE_LEAF:
        return found._replace(ecx=found.ecx & ~spec.OSXSAVE | spec.OSXSAVE * bool(state.cr4 & CR4_OSXSAVE))
    if (leaf, subleaf) == (spec.STRUCTURED_FEATURES_LEAF, 0):
        return found._replace(ecx=found.ecx & ~spec.OSPKE | spec.OSPKE * bool(state.cr4 & CR4_PKE))
    if (leaf, subleaf) == (spec.XSAVE_LEAF, 0):
        return found._replace(ebx=_xsave_size(vcpu, state.xcr0, compacted=False))
    if (leaf, subleaf) == (spec.XSAVE_LEAF, 1) and found.eax & (spec.XSAVEC | spec.XSAVES):
        return found._replace(ebx=_xsave_size(vcpu, state.xcr0 | state.xss, compacted=True))
    return found


def _xsave_size(vcpu: Vcpu, states: int, *, compacted: bool) -> int:
    """The size of an XSAVE area for a set of states: each behind the one before, or where its subleaf says."""
    end = spec.XSAVE_LEGACY_SIZE
    for number in range(2, states.bit_length()):
        entry = _entry(vcpu, spec.XSAVE_LEAF, number)
        if entry is None or not states >> number & 1:
            continue
        aligned = -(-end // spec.XSAVE_ALIGNMENT) * spec.XSAVE_ALIGNMENT if entry.ecx & spec.XSAVE_ALIGNED else end
        end = max(end, (aligned if compacted else entry.ebx) + entry.eax)
    return int(end)
