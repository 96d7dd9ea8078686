"""Firmware updates: SNP_DOWNLOAD_FIRMWARE_EX, and what the legacy DOWNLOAD_FIRMWARE shares with it.

Guests survive an update. Sources: SNP ABI; codes as in firmware 1.55.25; the image's format is the model's (MODEL).
"""

from __future__ import annotations

from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from snpbook.firmware.configuration import commit
from snpbook.firmware.keys import firmware_signing_key
from snpbook.firmware.pages import check_address
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.encryption import KeyId
from snpbook.spec.firmware_image import IMAGE_ALIGNMENT, IMAGE_HEADER, IMAGE_LIMIT, IMAGE_SIGNATURE, ImageType
from snpbook.spec.layout import Record
from snpbook.spec.platform import Fault
from snpbook.spec.products import FirmwareBuild
from snpbook.spec.releases import RELEASES
from snpbook.spec.states import LegacyPlatformState
from snpbook.spec.status import Status, require


def snp_download_firmware_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Load another firmware and run it. Uncommitted, it can be left again for the one that ran before."""
    # CHECKS
    legacy = psp.legacy.state
    gone = legacy is LegacyPlatformState.UNINIT
    require(gone, Status.INVALID_PLATFORM_STATE, "legacy platform state", "UNINIT", legacy.name)
    psp.require_reserved_zero()
    build = load_image(psp, buffer.fw_paddr, buffer.fw_len)

    # ACTION
    run(psp, build)
    if buffer.commit:
        commit(psp)


def run(psp: SecureProcessor, build: FirmwareBuild) -> None:
    """Run another firmware: the current TCB is its, the committed one stays.

    The boot loader gives sticks up to the current TCB: the one in use is the reported one's if it was newer (MODEL).
    """
    psp.release, psp.current_tcb = build, build.tcb
    if not psp.current_tcb.at_least(psp.vcek_tcb):
        psp.vcek_tcb = psp.reported_tcb


def load_image(psp: SecureProcessor, address: int, length: int) -> FirmwareBuild:
    """The firmware of an image in memory, after all checks on it: those of both download commands."""
    misaligned = address % IMAGE_ALIGNMENT
    require(not misaligned, Status.INVALID_ADDRESS, f"the image is {IMAGE_ALIGNMENT}-byte aligned", 0, misaligned)
    smallest = IMAGE_HEADER.size + IMAGE_SIGNATURE.size
    fits = smallest <= length <= IMAGE_LIMIT
    require(fits, Status.INVALID_LENGTH, "length of the image", f"{smallest}..{IMAGE_LIMIT}", length)
    spa = check_address(psp, address, length, "fw_paddr", lookup=False)
    image = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, length)
    header = IMAGE_HEADER.unpack(image)
    require(header.length == length, Status.INVALID_LENGTH, "the image is as long as it says", header.length, length)
    require(_signed(image), Status.BAD_SIGNATURE, "the image's signature", "valid", "invalid")
    least, found = psp.committed_tcb.snp, header.svn
    require(found >= least, Status.INVALID_CONFIG, "security version, against the committed one", least, found)
    build = (header.revision_major, header.revision_minor, header.build)
    oldest = (*psp.committed.abi.revision, psp.committed.build)
    require(build >= oldest, Status.INVALID_CONFIG, "version, against the committed one (inferred)", oldest, build)
    product = header.product.rstrip(b"\0").decode("ascii", "replace")
    name = psp.machine.product.name
    require(product == name, Status.INVALID_CONFIG, "the image's product", name, product)
    abi = RELEASES.get(f"{header.revision_major}.{header.revision_minor}")
    known = ", ".join(RELEASES)
    supported = abi is not None and abi.snp is psp.release.abi.snp
    require(supported, Status.INVALID_CONFIG, "the image's revision is modelled", known, header.revision_minor)
    require(header.type is ImageType.SEV, Status.INVALID_PARAM, "type of the image", ImageType.SEV, header.type)
    enough = header.memory <= IMAGE_LIMIT
    require(enough, Status.RESOURCE_LIMIT, "memory that the firmware needs", IMAGE_LIMIT, header.memory)
    answers = Fault.NO_ANSWER not in psp.faults
    require(answers, Status.HWERROR_PLATFORM, "the other processors take the image over")
    if header.refuses_state:
        restored = Fault.NO_RESTORE not in psp.faults
        require(restored, Status.HWERROR_UNSAFE, "the old firmware is back")
        require(False, Status.UPDATE_FAILED, "the new firmware takes over the platform's state", 1, 0)
    assert abi is not None
    tcb = replace(psp.current_tcb, snp=header.svn)
    return replace(psp.release, abi=abi, build=header.build, report_version=abi.report_version, tcb=tcb)


def _signed(image: bytes) -> bool:
    body, signature = image[: -IMAGE_SIGNATURE.size], IMAGE_SIGNATURE.unpack(image[-IMAGE_SIGNATURE.size :])
    parts = (int.from_bytes(part, "little") for part in (signature.r, signature.s))
    try:
        firmware_signing_key().public_key().verify(encode_dss_signature(*parts), body, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True
