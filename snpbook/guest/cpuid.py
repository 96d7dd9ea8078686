"""CPUID of a guest that does not believe its hypervisor: from the page that the firmware has checked.

What depends on the vCPU or on its registers is put in: APIC ids are the hypervisor's, sizes and enable bits are
computed. Without a page (SEV-ES) the hypervisor's word is all there is. Sources: SNP ABI, CPUID page; Linux
arch/x86/coco/sev/shared.c (snp_cpuid, snp_cpuid_postprocess).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import cpuid as spec
from snpbook.spec.cpuid import Registers, SevCapability
from snpbook.spec.launch import CPUID_ENTRIES, CPUID_PAGE
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.termination import Reason
from snpbook.spec.vmsa import CR4_OSXSAVE, CR4_PKE

Ask = Callable[[int, int], Awaitable[Registers]]
"""How to ask the hypervisor for a leaf and subleaf."""

_BYTE = (1 << 8) - 1
_APIC_ID = _BYTE << spec.INITIAL_APIC_ID
_FIRST_EXTENDED_STATE = 2
_XSAVE_FORMATS = spec.XSAVEC | spec.XSAVES


async def read_table(cpu: GuestCpu, address: int) -> tuple[Record, ...]:
    """The entries of the CPUID page at `address`; terminates for a count that cannot be."""
    page = CPUID_PAGE.unpack(await cpu.read(address, PAGE_SIZE))
    if not 1 <= page.count <= CPUID_ENTRIES:
        await terminate(cpu, Reason.CPUID, f"the CPUID page counts {page.count} entries")
    return tuple(page.entries[: page.count])


async def look_up(cpu: GuestCpu, table: Sequence[Record], leaf: int, subleaf: int, ask: Ask) -> Registers:
    """A leaf by the table, with what must be put in. Zeros for a leaf that it lacks, in or out of its ranges."""
    entry = _find(table, leaf, subleaf)
    if entry is None and not _in_range(table, leaf):
        return Registers()
    found = Registers() if entry is None else Registers(entry.eax, entry.ebx, entry.ecx, entry.edx)
    match leaf:
        case spec.SIGNATURE_LEAF:
            told = await ask(leaf, subleaf)
            (cr4,) = await cpu.look("cr4")
            ecx = _set(found.ecx, spec.OSXSAVE, bool(cr4 & CR4_OSXSAVE))
            ebx, edx = _mix(found.ebx, told.ebx, _APIC_ID), _mix(found.edx, told.edx, spec.APIC)
            return found._replace(ebx=ebx, ecx=ecx, edx=edx)
        case spec.STRUCTURED_FEATURES_LEAF:
            (cr4,) = await cpu.look("cr4")
            return found._replace(ecx=_set(found.ecx, spec.OSPKE, bool(cr4 & CR4_PKE)))
        case spec.EXTENDED_TOPOLOGY_LEAF:
            return found._replace(edx=(await ask(leaf, 0)).edx)
        case spec.XSAVE_LEAF if subleaf <= 1:
            return found._replace(ebx=await _xsave_size(cpu, table, found, compacted=bool(subleaf)))
        case spec.PROCESSOR_TOPOLOGY_LEAF:
            told = await ask(leaf, subleaf)
            ebx, ecx = _mix(found.ebx, told.ebx, _BYTE), _mix(found.ecx, told.ecx, _BYTE)
            return Registers(told.eax, ebx, ecx, found.edx)
    return found


def is_sev(highest: int, capabilities: int) -> bool:
    """Whether the leaves 8000_0000 (EAX) and 8000_001F (EAX) say that SEV is on."""
    return highest >= spec.ENCRYPTED_MEMORY_LEAF and bool(capabilities & SevCapability.SEV)


def hides_sev(leaf: int, eax: int) -> bool:
    """Whether a leaf denies SEV, though whoever takes #VC has it: somebody wants memory to be left in the clear."""
    if leaf == spec.RANGES[-1]:
        return eax < spec.ENCRYPTED_MEMORY_LEAF
    return leaf == spec.ENCRYPTED_MEMORY_LEAF and not eax & SevCapability.SEV


def _find(table: Sequence[Record], leaf: int, subleaf: int) -> Record | None:
    """The first entry that answers; of the XSAVE area's sizes only those of x87 and SSE, which are computed on."""
    for entry in table:
        if entry.eax_in != leaf or (leaf in spec.INDEXED_LEAVES and entry.ecx_in != subleaf):
            continue
        if leaf == spec.XSAVE_LEAF and subleaf <= 1 and (entry.xcr0_in not in spec.XCR0_BASIC or entry.xss_in):
            continue
        return entry
    return None


def _in_range(table: Sequence[Record], leaf: int) -> bool:
    """Whether the leaf is one up to the highest that its range names."""
    base = _find(table, leaf & spec.RANGE_MASK, 0)
    return leaf & spec.RANGE_MASK in spec.RANGES and base is not None and leaf <= base.eax


async def _xsave_size(cpu: GuestCpu, table: Sequence[Record], found: Registers, *, compacted: bool) -> int:
    """EBX: the size of the XSAVE area for what is switched on, in the standard or the compacted format."""
    xcr0, xss = await cpu.look("xcr0", "xss")
    features = xcr0
    if compacted:
        if not found.eax & _XSAVE_FORMATS:
            await terminate(cpu, Reason.CPUID, "the compacted format of XSAVE is asked for and not there")
        features |= xss if found.eax & spec.XSAVES else 0
    wanted = {bit for bit in range(_FIRST_EXTENDED_STATE, features.bit_length()) if features >> bit & 1}
    found_states = [entry for entry in table if entry.eax_in == spec.XSAVE_LEAF and entry.ecx_in in wanted]
    states = {int(entry.ecx_in): (int(entry.eax), int(entry.ebx)) for entry in found_states}
    if states.keys() != wanted:
        await terminate(cpu, Reason.CPUID, f"no entry for the state of XCR0 bits {sorted(wanted - states.keys())}")
    if compacted:
        return spec.XSAVE_LEGACY_SIZE + sum(size for size, _ in states.values())
    return max([spec.XSAVE_LEGACY_SIZE, *(size + offset for size, offset in states.values())])


def _mix(own: int, told: int, bits: int) -> int:
    """The hypervisor's `bits` in a register of the page."""
    return own & ~bits | told & bits


def _set(register: int, bit: int, on: bool) -> int:
    return register | bit if on else register & ~bit
