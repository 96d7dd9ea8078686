"""Measured direct boot: kernel, initrd and command line come from the host, their hashes from the launch digest.

Each blob is copied into private memory once and hashed there: what the host changes afterwards is its own copy. A blob
whose hash the table does not have is not run. Sources: edk2 OvmfPkg/AmdSev/BlobVerifierLibSevHashes; QEMU
target/i386/sev.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec import guid
from snpbook.spec.launch import HASH_ENTRY_SIZE, HASH_TABLE_SIZE

NAMES = {guid.HASH_CMDLINE: "command line", guid.HASH_INITRD: "initrd", guid.HASH_KERNEL: "kernel"}
"""In the order of the table; a command line counts with its trailing NUL."""
_GUID_SIZE, _LENGTH_SIZE = 16, 2


class BootRefused(ProgramFailure):
    """The firmware does not run what it was given."""


async def read_hashes(cpu: GuestCpu, table: int) -> dict[str, bytes]:
    """The three hashes by name, from the table at guest address `table`, which the launch measured.

    `BootRefused` for a table that is none, or of another shape.
    """
    data = await cpu.read(table, HASH_TABLE_SIZE)
    at = _GUID_SIZE + _LENGTH_SIZE
    if data[:at] != guid.HASH_TABLE.bytes_le + HASH_TABLE_SIZE.to_bytes(_LENGTH_SIZE, "little"):
        raise BootRefused(f"there is no hash table at {table:#x}: the guest was launched without kernel hashes")
    found = {}
    for identifier, name in NAMES.items():
        entry = data[at : at + HASH_ENTRY_SIZE]
        head = identifier.bytes_le + HASH_ENTRY_SIZE.to_bytes(_LENGTH_SIZE, "little")
        if not entry.startswith(head):
            raise BootRefused(f"the hash table at {table:#x} has no entry for the {name} at byte {at}")
        found[name] = entry[len(head) :]
        at += HASH_ENTRY_SIZE
    return found


async def take(cpu: GuestCpu, hashes: Mapping[str, bytes], name: str, source: int, size: int, target: int) -> bytes:
    """Copy a blob from shared memory at `source` to private memory at `target`, and check it there: what it is.

    `BootRefused` where its hash is another.
    """
    await cpu.write(target, await cpu.read(source, size))
    blob: bytes = await cpu.read(target, size)
    if sha256(blob).digest() != hashes[name]:
        raise BootRefused(f"the {name} is not the one whose hash was measured at launch")
    return blob
