"""The CC blob: how a kernel that did not come with the firmware learns where secrets page and CPUID page are.

Firmware leaves it in private memory, and names it in EFI's configuration tables or, for a kernel that is started
without EFI, in the boot protocol's list of setup_data. What it says is checked before it is used. Sources: edk2 OvmfPkg
AmdSevDxe; Linux arch/x86/boot/compressed/sev.c (find_cc_blob_efi), arch/x86/coco/sev (find_cc_blob_setup_data).
"""

from __future__ import annotations

from snpbook.guest.layout import Layout
from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import guid
from snpbook.spec.boot_tables import CC_BLOB, CC_BLOB_MAGIC, EFI_TABLE, SETUP_CC_BLOB, SETUP_DATA
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.termination import GeneralReason, Reason

TABLES = PAGE_SIZE // 4
"""Where in the page of boot tables the one configuration table lies, behind the blob; then the list of setup_data."""
SETUP = PAGE_SIZE // 2


async def leave(cpu: GuestCpu, place: Layout) -> None:
    """The firmware's part: the blob at `place.boot_tables`, and both ways to it behind it."""
    at = place.boot_tables
    blob = CC_BLOB.pack(
        magic=CC_BLOB_MAGIC, secrets_phys=place.secrets, secrets_len=PAGE_SIZE,
        cpuid_phys=place.cpuid, cpuid_len=PAGE_SIZE,
    )  # fmt: skip
    await cpu.write(at, blob)
    await cpu.write(at + TABLES, EFI_TABLE.pack(guid=guid.CC_BLOB.bytes_le, table=at))
    size = SETUP_DATA.size - SETUP_DATA.offset("cc_blob_address")
    await cpu.write(at + SETUP, SETUP_DATA.pack(type=SETUP_CC_BLOB, len=size, cc_blob_address=at))


async def by_efi(cpu: GuestCpu, tables: int, count: int) -> Record | None:
    """The blob that one of `count` configuration tables from `tables` on names; None where none does."""
    data = await cpu.read(tables, count * EFI_TABLE.size)
    for start in range(0, len(data), EFI_TABLE.size):
        entry = EFI_TABLE.unpack(data[start : start + EFI_TABLE.size])
        if entry.guid == guid.CC_BLOB.bytes_le:
            return await _checked(cpu, entry.table)
    return None


async def by_setup_data(cpu: GuestCpu, first: int) -> Record | None:
    """The blob that an entry of the list from `first` on names; None where none does."""
    while first:
        entry = SETUP_DATA.unpack(await cpu.read(first, SETUP_DATA.size))
        if entry.type == SETUP_CC_BLOB:
            return await _checked(cpu, entry.cc_blob_address)
        first = entry.next
    return None


async def _checked(cpu: GuestCpu, address: int) -> Record:
    """The blob, for a guest that can use it."""
    blob = CC_BLOB.unpack(await cpu.read(address, CC_BLOB.size))
    if blob.magic != CC_BLOB_MAGIC:
        await terminate(cpu, GeneralReason.SNP_FEATURES, f"the CC blob at {address:#x} begins with {blob.magic:#x}")
    if blob.cpuid_len < PAGE_SIZE or not blob.cpuid_phys:
        await terminate(cpu, Reason.CPUID, f"the CC blob names a CPUID page of {blob.cpuid_len} bytes")
    return blob
