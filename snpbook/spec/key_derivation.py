"""Key derivation: the labels under which the firmware derives its keys, and what goes into a guest's derived key.

All keys come from one function, SP 800-108 in counter mode with HMAC-SHA256. Sources: SNP ABI (MSG_KEY_REQ),
SEV API (session keys), firmware 1.55.25.
"""

from enum import IntEnum, IntFlag

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint

VCEK_LABEL = "sev-versioned-chip-endorsement-key"
VLEK_LABEL = "sev-versioned-loaded-attestation-key"
VLEK_WRAPPING_LABEL = "vlek-wrapping-key"
CEK_LABEL = "sev-chip-endorsement-key"
GUEST_KEY_LABEL = "gmsg-keyreq"
MASTER_SECRET_LABEL = "sev-master-secret"
KEK_LABEL = "sev-kek"
KIK_LABEL = "sev-kik"

HASHSTICK_SIZE = 48
HASHSTICKS = 8
"""One for each byte of TCB_VERSION; the last roots the keys of chip or provider."""
GUEST_KEY_SIZE = 32
SESSION_KEY_SIZE = 16
"""Master secret, KEK, KIK, TEK and TIK of a legacy session."""
EXTRA_BITS = 64
"""A private key is a derived number so much longer than the curve's order, reduced (FIPS 186-5 A.2.1)."""


class RootKey(IntEnum):
    """ROOT_KEY_SELECT: an endorsement key's hashstick, or the guest's own migration root key."""

    VEK = 0
    VMRK = 1


class GuestField(IntFlag):
    """GUEST_FIELD_SELECT: what of the guest goes into the key; other bits must be zero."""

    POLICY = 1 << 0
    IMAGE_ID = 1 << 1
    FAMILY_ID = 1 << 2
    MEASUREMENT = 1 << 3
    GUEST_SVN = 1 << 4
    TCB_VERSION = 1 << 5
    LAUNCH_MIT_VECTOR = 1 << 6
    """ABI 1.58."""


class IdKeySelect(IntEnum):
    """Whose key digest is mixed in."""

    NONE = 0
    ID_KEY = 1
    AUTHOR_KEY = 2


MIXED_DIGEST_SIZE = 32
"""Of measurement and key digest only the first 32 of 48 bytes are mixed in."""

KEY_MIX = Layout(
    "GuestKeyMix",
    0xA8,
    Cite("FW", "MSG_KEY_REQ, context of the derivation"),
    [
        bits("root_key_select", 0x00, 4, 0, enum=RootKey),
        bits("id_key_select", 0x00, 4, 1, 2, enum=IdKeySelect),
        uint("guest_field_select", 0x08, 8),
        uint("vmpl", 0x10, 4),
        uint("guest_svn", 0x14, 4),
        uint("tcb_version", 0x18, 8),
        uint("policy", 0x20, 8),
        raw("image_id", 0x28, 16),
        raw("family_id", 0x38, 16),
        raw("measurement", 0x48, MIXED_DIGEST_SIZE),
        raw("host_data", 0x68, 32),
        raw("key_digest", 0x88, MIXED_DIGEST_SIZE),
    ],
)
"""Fields that are not selected are zero; VMPL, host data and key digest are always there."""
