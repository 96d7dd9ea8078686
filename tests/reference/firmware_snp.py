"""Every SNP command of the firmware sheet's section 1.5, by the name that its number has there."""

from tests.reference import (
    firmware_snp_guests,
    firmware_snp_launch,
    firmware_snp_pages,
    firmware_snp_platform,
    firmware_snp_swap,
)  # fmt: skip
from tests.reference.firmware_rows import Spec

SPECS: dict[str, Spec] = {
    **firmware_snp_platform.SPECS,
    **firmware_snp_guests.SPECS,
    **firmware_snp_launch.SPECS,
    **firmware_snp_pages.SPECS,
    **firmware_snp_swap.SPECS,
}
