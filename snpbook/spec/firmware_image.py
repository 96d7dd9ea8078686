"""The image that SNP_DOWNLOAD_FIRMWARE_EX and DOWNLOAD_FIRMWARE load: a format of the model's own (MODEL).

Header, body of any length, signature over both. A real image's header is AMD's; the model's firmware has no code, and
an image says instead which release of the ABI it is.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.report import SIGNATURE_COMPONENT


class ImageType(IntEnum):
    """What an image is the firmware of."""

    SEV = 1
    BOOT_LOADER = 2


IMAGE_HEADER = Layout(
    "FirmwareImageHeader",
    0x40,
    Cite("MODEL", "firmware image"),
    [
        uint("type", 0x00, 4, enum=ImageType),
        uint("length", 0x04, 4, note="of the whole image"),
        raw("product", 0x08, 16, note="name of the product line, ASCII, padded with zeros"),
        uint("revision_major", 0x18, 1, note="of the SNP ABI document"),
        uint("revision_minor", 0x19, 1),
        uint("build", 0x1A, 1),
        uint("svn", 0x1B, 1, note="SNP's security version, the TCB's component"),
        uint("memory", 0x1C, 4, note="bytes that the firmware needs of the chip's own memory"),
        bits("refuses_state", 0x20, 4, 0, note="it cannot take over what an older firmware left"),
    ],
)
IMAGE_SIGNATURE = Layout(
    "FirmwareImageSignature",
    2 * SIGNATURE_COMPONENT,
    Cite("MODEL", "firmware image"),
    [raw("r", 0, SIGNATURE_COMPONENT), raw("s", SIGNATURE_COMPONENT, SIGNATURE_COMPONENT)],
)
IMAGE_ALIGNMENT = 32
IMAGE_LIMIT = 0x100000
"""Bytes of the largest image, and of the memory that a firmware may need."""
