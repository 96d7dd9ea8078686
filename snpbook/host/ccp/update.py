"""A newer firmware from the host's disk, loaded when the driver is: DOWNLOAD_FIRMWARE.

Whatever goes wrong, the kernel goes on with the firmware that runs. Source: Linux 6.12 drivers/crypto/ccp/sev-dev.c
(sev_get_firmware, sev_update_firmware).
"""

from __future__ import annotations

from snpbook.host.ccp.driver import Driver
from snpbook.host.ccp.persistent import Disk
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.firmware_image import IMAGE_ALIGNMENT
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmsa import CpuidSignature

FIRMWARE_FOLDER = "/lib/firmware/"
DOWNLOAD_SINCE = (0, 15)
"""The oldest API that has the command."""
COMMITS_AT_ONCE = (1, 50)
"""Older firmware commits the TCB of a new one only when that is loaded a second time."""


def firmware_files(signature: CpuidSignature) -> tuple[str, ...]:
    """Where an image is looked for: that of the model, that of its sixteen models, any."""
    family, model = signature.family, signature.model
    names = (
        f"amd/amd_sev_fam{family:02x}h_model{model:02x}h.sbin",
        f"amd/amd_sev_fam{family:02x}h_model{model >> 4 & 15:x}xh.sbin",
        "amd/sev.fw",
    )
    return tuple(FIRMWARE_FOLDER + name for name in names)


def update_firmware(driver: Driver, disk: Disk, version: tuple[int, int, int]) -> bool:
    """Load the image that the disk has for this processor, if there is one: whether the firmware took it."""
    files = firmware_files(driver.cpu.product.signature)
    image = next((disk[path] for path in files if path in disk), None)
    if image is None or version[:2] < DOWNLOAD_SINCE:
        return False
    try:
        pages = driver.memory.allocate(-(-(IMAGE_ALIGNMENT + len(image)) // PAGE_SIZE))
    except KernelError:
        return False
    address = (pages.start << PAGE_SHIFT) + IMAGE_ALIGNMENT
    driver.cpu.write(address, image)
    try:
        for _ in range(1 if version[:2] >= COMMITS_AT_ONCE else 2):
            driver.command(Command.DOWNLOAD_FIRMWARE, paddr=address, len=len(image))
    except KernelError:
        return False
    finally:
        driver.memory.release(pages)
    return True
