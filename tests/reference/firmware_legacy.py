"""Every legacy command of the firmware sheet's section 1.3, by the name that its number has there.

RING_BUFFER (0F) is missing: ring mode is refused by name.
"""

from tests.reference import firmware_legacy_guests, firmware_legacy_platform, firmware_legacy_transport
from tests.reference.firmware_rows import Spec

SPECS: dict[str, Spec] = {
    **firmware_legacy_platform.SPECS,
    **firmware_legacy_guests.SPECS,
    **firmware_legacy_transport.SPECS,
}
