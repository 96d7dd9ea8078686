"""What the kernel gives a process: its address range, limits, capabilities, and the flags of its system calls.

Sources: Linux x86-64 uapi headers (asm-generic/mman-common.h, linux/falloc.h, linux/memfd.h); UPM v10.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum

USER_BASE = 0x10000
"""The lowest address that is given out (vm.mmap_min_addr by default)."""
USER_END = 0x7FFF_FFFF_F000
"""Where the user half of the address space ends (TASK_SIZE with four levels)."""
MEMLOCK_LIMIT = 8 << 20
"""RLIMIT_MEMLOCK by default, in bytes (Linux since 5.16)."""
FIRST_DESCRIPTOR = 3
"""Standard input, output and error are taken."""


class Capability(StrEnum):
    """What a process may do beyond its owner's rights."""

    IPC_LOCK = "CAP_IPC_LOCK"
    SYS_ADMIN = "CAP_SYS_ADMIN"


class MapFlags(IntFlag):
    """Flags of mmap."""

    SHARED = 0x01
    PRIVATE = 0x02
    FIXED = 0x10
    ANONYMOUS = 0x20
    NORESERVE = 0x4000


class Protection(IntFlag):
    """Rights of a mapping."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class Advice(IntEnum):
    """What madvise may be told."""

    DONTNEED = 4
    REMOVE = 9
    HUGEPAGE = 14
    NOHUGEPAGE = 15


class FallocateMode(IntFlag):
    """Modes of fallocate."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02


class MemfdFlags(IntFlag):
    """Flags of memfd_create."""

    CLOEXEC = 0x1
    ALLOW_SEALING = 0x2
