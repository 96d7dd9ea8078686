"""KVM as the v7 series (December 2022) has it: attributes, exits, sub-commands, the region structure.

Sources: RFC v7 of the SNP hypervisor series on UPM v10; Linux uapi headers. Numbers that later kernels
changed are named where they are used.
"""

from __future__ import annotations

from enum import IntEnum

from snpbook.spec.uapi_kvm import Exit, MemFlag
from snpbook.spec.uapi_kvm import MemoryAttribute as MemoryAttribute
from snpbook.spec.uapi_sev import V7_OPS, SevOp

SEV_FEATURES = 0x1
"""SEV_FEATURES that KVM puts into the VMSA of an SNP guest, in the v7 era and in Linux 6.12 by default."""

MAX_VCPUS = 1024
"""KVM_MAX_VCPUS of an x86 host by default."""

MEM_PRIVATE = MemFlag.GUEST_MEMFD
"""KVM_MEM_PRIVATE: the memslot has a restricted file behind it."""

_V7_ID = {op: number for number, op in V7_OPS.items()}


class KvmExit(IntEnum):
    """Exit reasons of KVM_RUN that an SNP guest meets, as the v7 series numbers them."""

    IO = Exit.IO
    HLT = Exit.HLT
    SHUTDOWN = Exit.SHUTDOWN
    FAIL_ENTRY = Exit.FAIL_ENTRY
    SYSTEM_EVENT = Exit.SYSTEM_EVENT
    MEMORY_FAULT = Exit.MEMORY_FAULT_V10
    VMGEXIT = Exit.VMGEXIT


class SevCommand(IntEnum):
    """Sub-commands of KVM_MEMORY_ENCRYPT_OP, v7 numbering."""

    SNP_INIT = _V7_ID[SevOp.SNP_INIT]
    SNP_LAUNCH_START = _V7_ID[SevOp.SNP_LAUNCH_START]
    SNP_LAUNCH_UPDATE = _V7_ID[SevOp.SNP_LAUNCH_UPDATE]
    SNP_LAUNCH_FINISH = _V7_ID[SevOp.SNP_LAUNCH_FINISH]


class Cmos(IntEnum):
    """The PC's real-time clock ports and the registers that tell the size of memory."""

    INDEX_PORT = 0x70
    DATA_PORT = 0x71
    ABOVE_1M_LOW = 0x30
    ABOVE_1M_HIGH = 0x31
    ABOVE_16M_LOW = 0x34
    ABOVE_16M_HIGH = 0x35
    ABOVE_4G_LOW = 0x5B
    ABOVE_4G_MID = 0x5C
    ABOVE_4G_HIGH = 0x5D


CMOS_MASK = 0x7F
ONE_MIB, SIXTEEN_MIB = 0x100000, 0x1000000
CMOS_UNIT_1M, CMOS_UNIT_16M = 0x400, 0x10000
CMOS_LIMIT_1M = 63 * ONE_MIB
"""Registers 0x30 and 0x31 count KiB above 1 MiB, up to 63 MiB; 0x34 and 0x5B count 64 KiB units."""
LOW_RAM_END = 0x8000_0000
"""QEMU's q35 puts at most 2 GiB below 4 GiB, the rest above."""
