"""QEMU's own words and defaults: names of objects, the firmware's codes as it prints them, the size of blobs.

Sources: QEMU 10 target/i386/sev.c, qapi/qom.json; texts that no log or patch shows are unconfirmed.
"""

from __future__ import annotations

from collections.abc import Mapping

PROGRAM = "qemu-system-x86_64"
SEV_DEVICE = "/dev/sev"
WORKAROUNDS_SIZE = 16
"""Bytes of `guest-visible-workarounds` (GOSVW)."""
HOST_DATA_SIZE = 32
REDUCED_PHYS_BITS = range(1, 64)
"""What `reduced-phys-bits` may be: how many bits of a guest physical address encryption takes away."""
DEFAULT_REDUCED_PHYS_BITS = 1

FIRMWARE_ERRORS: Mapping[int, str] = dict(
    enumerate(
        (
            "", "Platform state is invalid", "Guest state is invalid", "Platform configuration is invalid",
            "Buffer too small", "Platform is already owned", "Certificate is invalid", "Policy is not allowed",
            "Guest is not active", "Invalid address", "Bad signature", "Bad measurement", "ASID is already owned",
            "Invalid ASID", "WBINVD is required", "DF_FLUSH is required", "Guest handle is invalid", "Invalid command",
            "Guest is active", "Hardware error", "Hardware unsafe", "Feature not supported", "Invalid parameter",
            "Required firmware resource depleted", "Part-specific integrity check failure",
        )
    )
)  # fmt: skip
"""What QEMU prints for a status of the firmware; later ones are "unknown error"."""
UNKNOWN_FIRMWARE_ERROR = "unknown error"
