"""Legacy page swap: a guest's page leaves memory as an image that only this platform can bring back.

Nothing is kept of what is out, so that an old image can be brought back as often as the host likes. Source: SEV API
(SWAP_OUT, SWAP_IN) as firmware 1.55.25 has them; which page types there are is inferred from SNP's.
"""

from __future__ import annotations

from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.legacy_buffers import require_writable
from snpbook.firmware.pages import check_address
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.save_area import is_sealed, seal
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PageSize
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.spec.swap import LAST_IV, LEGACY_MDATA, SwapType, swap_iv

_TYPES = (SwapType.DATA, SwapType.VMSA)
_TAG_AT, _TAG_SIZE = LEGACY_MDATA.offset("auth_tag"), 16


def swap_out(psp: SecureProcessor, buffer: Record) -> Record:
    """Seal a page of the guest; the page stays as it is, a VMSA without its checksum (MODEL).

    That the checksum is looked at as soon as the guest's key is known is inferred.
    """
    # CHECKS
    psp.legacy.after(Command.SWAP_OUT)
    size, src, dst, mdata_spa = _check_operands(psp, buffer)
    guest = psp.legacy.guest(buffer.handle)
    guest.require_asid()
    vmsa, sealed = buffer.page_type is SwapType.VMSA, is_sealed(psp.machine, guest.asid, src >> PAGE_SHIFT)
    require(sealed == vmsa, Status.INVALID_PARAM, "the page has a valid checksum if it is a VMSA", vmsa, sealed, "SEV")
    require(guest.swapped < LAST_IV, Status.AEAD_OFLOW, "nonces are left", f"below {LAST_IV}", guest.swapped, "SEV")
    require_writable(psp, dst, size, "dst_paddr", Status.INVALID_PAGE_STATE)
    require_writable(psp, mdata_spa, LEGACY_MDATA.size, "mdata_paddr", Status.INVALID_PAGE_STATE)

    # ACTION
    mdata = LEGACY_MDATA.record(
        software_data=buffer.software_data,
        iv=guest.swapped,
        page_size=buffer.page_size,
        page_type=buffer.page_type,
    )
    plain = psp.machine.memory.read(guest.asid, src, size)
    sealed_page = AESGCM(guest.oek).encrypt(swap_iv(guest.swapped), plain, bytes(mdata))
    psp.legacy.guests[buffer.handle] = replace(guest, swapped=guest.swapped + 1)
    psp.machine.vmsa_checksums.pop(src >> PAGE_SHIFT, None)

    # ANSWER
    psp.machine.memory.write(KeyId.UNENCRYPTED, dst, sealed_page[:-_TAG_SIZE])
    tagged = mdata.replace(auth_tag=sealed_page[-_TAG_SIZE:])
    psp.machine.memory.write(KeyId.UNENCRYPTED, mdata_spa, bytes(tagged))
    return buffer


def swap_in(psp: SecureProcessor, buffer: Record) -> None:
    """Open an image into a page of the guest. Whether it is the latest, nobody knows."""
    # CHECKS
    psp.legacy.after(Command.SWAP_IN)
    size, src, dst, mdata_spa = _check_operands(psp, buffer, dst_alignment=PAGE_SIZE)
    raw = psp.machine.memory.read(KeyId.UNENCRYPTED, mdata_spa, LEGACY_MDATA.size)
    mdata = LEGACY_MDATA.unpack(raw)
    found, wanted = (mdata.page_size, mdata.page_type), (buffer.page_size, buffer.page_type)
    require(found == wanted, Status.INVALID_PARAM, "size and type of the metadata", wanted, found, "SEV")
    guest = psp.legacy.guest(buffer.handle)
    guest.require_asid()
    require_writable(psp, dst, size, "dst_paddr", Status.INVALID_PAGE_STATE)
    body = psp.machine.memory.read(KeyId.UNENCRYPTED, src, size)
    try:
        covered = raw[:_TAG_AT] + bytes(_TAG_SIZE) + raw[_TAG_AT + _TAG_SIZE :]
        plain = AESGCM(guest.oek).decrypt(swap_iv(mdata.iv), body + mdata.auth_tag, covered)
    except InvalidTag:
        raise FirmwareRefusal(Status.BAD_MEASUREMENT, "tag of the image", "valid", "invalid", "SEV") from None

    # ACTION
    psp.machine.memory.write(guest.asid, dst, plain)
    if buffer.page_type is SwapType.VMSA:
        seal(psp.machine, guest.asid, dst >> PAGE_SHIFT)


def _check_operands(
    psp: SecureProcessor, buffer: Record, dst_alignment: int | None = None
) -> tuple[int, int, int, int]:
    """The checks of both on where things are and of what kind: the bytes of the page, source, destination, metadata.

    That the addresses are looked at in the order of the buffer is inferred.
    """
    size = LARGE_PAGE_SIZE if buffer.page_size is PageSize.SIZE_2M else PAGE_SIZE
    src = check_address(psp, buffer.src_paddr, size, "src_paddr", lookup=False)
    dst = check_address(psp, buffer.dst_paddr, size, "dst_paddr", lookup=False)
    mdata = check_address(psp, buffer.mdata_paddr, LEGACY_MDATA.size, "mdata_paddr", lookup=False)
    places = [src, dst, mdata]
    aligned = mdata % LEGACY_MDATA.size == 0 and src % size == 0 and dst % (dst_alignment or size) == 0
    require(aligned, Status.INVALID_ADDRESS, "alignment of pages and metadata", 0, places, "SEV")
    apart = src == dst if buffer.swap_in_place else abs(src - dst) >= size
    apart = apart and not any(0 <= mdata - page < size for page in (src, dst))
    require(apart, Status.INVALID_PARAM, "source, destination and metadata are apart", "apart", places, "SEV")
    large_vmsa = buffer.page_type is SwapType.VMSA and size != PAGE_SIZE
    require(not large_vmsa, Status.INVALID_PARAM, "a VMSA is a page of 4 KB", "4K", "2M", "SEV")
    known = buffer.page_type in _TYPES
    require(known, Status.INVALID_PARAM, "page type is a known one", "DATA or VMSA", buffer.page_type, "SEV")
    return size, src, dst, mdata
