"""Facts of memory encryption: key ids, ciphers, published tweak constants, and the tables that say who decides.

Sources: APM2 15.34 (tables 15-30 and 15-31); the published Genoa firmware (key ids); SEVurity, table I (Naples); AMD's
patch series "SEV-SNP ciphertext hiding" for Linux (what a host reads).
"""

from dataclasses import dataclass
from enum import IntEnum


class KeyId(IntEnum):
    """Key ids that are no guest's; a guest's key id is its ASID. Genoa's numbers, used for every product (MODEL)."""

    UNENCRYPTED = 0
    IOMMU = 1008
    HOST = 1023
    """The key of SME, which the host asks for by C-bit, and of TSME, which needs no asking."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A memory cipher: the bytes of its key, whether the tweak is added behind the cipher as well as before it, and
    whether the tweak's constants are the same on every part and after every boot.
    """

    title: str
    key_size: int
    tweaks_output: bool = True
    fixed_tweak: bool = False


SCHEMES = {
    "naples-xe": Scheme("AES-128 XE", 16, tweaks_output=False, fixed_tweak=True),
    "naples-xex": Scheme("AES-128 XEX", 16, fixed_tweak=True),
    "xex-aes-128": Scheme("AES-128 XEX", 16),
    "xts-aes-256": Scheme("AES-256 XTS", 64),
}
"""By a product's `encryption`. A key of XTS is two AES keys, for data and for tweaks."""

NAPLES_PATTERN_SIZE = 4
"""Each of Naples's tweak constants is one pattern of 4 bytes, four times."""
NAPLES_PATTERNS = {
    4: bytes.fromhex("82253838"),
    5: bytes.fromhex("EC09079C"),
    6: bytes.fromhex("40000018"),
}
"""The patterns that are published, by address bit."""

HIDDEN_BYTE = 0xFF
"""What a host reads of a guest's private memory where the hardware hides ciphertext."""

LINE_SIZE = 64
"""Bytes of a cache line."""


class Context(IntEnum):
    """Who makes an access: software on the host, or a guest of a kind."""

    HOST = 0
    GUEST = 1
    SEV = 2
    SEV_ES = 3
    SNP = 4


class Kind(IntEnum):
    """What an access is for. A host's page walk is a NESTED_WALK: it reads tables that the host controls."""

    DATA = 0
    FETCH = 1
    GUEST_WALK = 2
    NESTED_WALK = 3


class Paging(IntEnum):
    """The guest's paging mode; its page tables have a C-bit in PAE and long mode only."""

    OFF = 0
    LEGACY = 1
    PAE = 2
    LONG = 3


class Vtom(IntEnum):
    """Virtual top of memory: off in SEV_FEATURES, or on and the access lies below it, or at or above it."""

    OFF = 0
    BELOW = 1
    ABOVE = 2


class KeySource(IntEnum):
    """Whose key an access gets."""

    NONE = 0
    HOST = 1
    GUEST = 2


@dataclass(frozen=True, slots=True)
class KeyRule:
    """One row of the tables. A C-bit of None does not matter; `host_c` is that of the host's or nested tables."""

    contexts: tuple[Context, ...]
    kinds: tuple[Kind, ...]
    guest_c: bool | None
    host_c: bool | None
    source: KeySource


_UNENCRYPTED = (Context.HOST, Context.GUEST)
_ENCRYPTED = (Context.SEV, Context.SEV_ES, Context.SNP)

KEY_RULES = (
    KeyRule(_UNENCRYPTED, tuple(Kind), None, False, KeySource.NONE),
    KeyRule(_UNENCRYPTED, tuple(Kind), None, True, KeySource.HOST),
    KeyRule(_ENCRYPTED, (Kind.FETCH, Kind.GUEST_WALK), None, None, KeySource.GUEST),
    KeyRule(_ENCRYPTED, (Kind.NESTED_WALK,), None, False, KeySource.NONE),
    KeyRule(_ENCRYPTED, (Kind.NESTED_WALK,), None, True, KeySource.HOST),
    KeyRule(_ENCRYPTED, (Kind.DATA,), False, False, KeySource.NONE),
    KeyRule(_ENCRYPTED, (Kind.DATA,), False, True, KeySource.HOST),
    KeyRule(_ENCRYPTED, (Kind.DATA,), True, None, KeySource.GUEST),
)
"""Who decides encryption, with SYSCFG.MemEncryptionModEn set; exactly one row applies to each access."""
