"""The certificates that vouch for an attestation key: names, serials, dates, extension identifiers.

One root (ARK) per product line signs two intermediates: the ASK, which signs chip keys (VCEK), and the
ASVK, which signs the keys of cloud providers (VLEK). VCEK and VLEK together are called VEK.
Sources: KDS (VCEK certificate and KDS interface), and AMD's published certificates, byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

KDS_URL = "https://kdsintf.amd.com"

DISTINGUISHED_NAME = (
    ("2.5.4.11", "Engineering"),
    ("2.5.4.6", "US"),
    ("2.5.4.7", "Santa Clara"),
    ("2.5.4.8", "CA"),
    ("2.5.4.10", "Advanced Micro Devices"),
)
"""Every subject and issuer, in encoding order: unit, country, locality, state, organisation; the common name follows.

All are UTF8String, the country is PrintableString.
"""

RSA_BITS = 4096
RSA_EXPONENT = 65537
RSA_KEY_ALGORITHM = bytes.fromhex("300d06092a864886f70d0101010500")
P384_KEY_ALGORITHM = bytes.fromhex("301006072a8648ce3d020106052b81040022")
"""The DER AlgorithmIdentifiers of the two kinds of keys: rsaEncryption in CA certificates, secp384r1 in VEKs."""
P384_POINT_SIZE = 97
"""An uncompressed point: the octet 4 and two coordinates."""

PSS_SALT_SIZE = 48
"""All certificates are signed RSASSA-PSS with SHA-384, MGF1-SHA-384 and a salt of the digest's size."""

_SHA384 = "300d06096086480165030402020500"
_PSS_PARAMETERS = f"a00f{_SHA384}a11c301a06092a864886f70d010108{_SHA384}a203020130"
PSS_ALGORITHM = bytes.fromhex(f"304106092a864886f70d01010a3034{_PSS_PARAMETERS}")
"""The DER AlgorithmIdentifier of those signatures; the trailer field has its default and is left out."""

PSS_ALGORITHM_EXPLICIT = bytes.fromhex(f"304606092a864886f70d01010a3039{_PSS_PARAMETERS}a303020101")
"""The same with the default trailer field spelt out, which DER forbids and AMD did."""

TRAILER_OMITTED_FROM = date(2024, 11, 6)
"""First issuing date seen of a VEK whose PSS parameters leave out the default trailer field.

The last one seen that spells it out is of 2024-08-06; CA certificates always do. A verifier accepts both.
"""

ARK_KEY_USAGE = bytes.fromhex("03020106")
"""keyCertSign and cRLSign."""

INTERMEDIATE_KEY_USAGE = bytes.fromhex("03020104")
"""keyCertSign. AMD counts one unused bit where DER, which drops trailing zero bits, would count two."""

CA_YEARS = 25
VEK_SERIAL = 0

HWID_SIZE = 64
"""Bytes of CHIP_ID."""
HWID_SIZES = {0: HWID_SIZE, 1: 8}
"""Bytes of it that a VCEK names, by structVersion."""
SPL_MAX = 127
UCODE_SPL_MAX = 255


@dataclass(frozen=True, slots=True)
class VekKind:
    """A chip's key or a cloud provider's: the subject's common name, and the years from issue to expiry."""

    common_name: str
    years: int


VCEK = VekKind("SEV-VCEK", 7)
VLEK = VekKind("SEV-VLEK", 1)


class VekExtension(StrEnum):
    """Object identifiers of a VEK's extensions, none of them critical.

    Each holds a DER INTEGER or IA5String, but `HWID`, which holds the raw bytes of the chip id.
    """

    STRUCT_VERSION = "1.3.6.1.4.1.3704.1.1"
    PRODUCT_NAME = "1.3.6.1.4.1.3704.1.2"
    BL_SPL = "1.3.6.1.4.1.3704.1.3.1"
    TEE_SPL = "1.3.6.1.4.1.3704.1.3.2"
    SNP_SPL = "1.3.6.1.4.1.3704.1.3.3"
    SPL_4 = "1.3.6.1.4.1.3704.1.3.4"
    SPL_5 = "1.3.6.1.4.1.3704.1.3.5"
    SPL_6 = "1.3.6.1.4.1.3704.1.3.6"
    SPL_7 = "1.3.6.1.4.1.3704.1.3.7"
    UCODE_SPL = "1.3.6.1.4.1.3704.1.3.8"
    FMC_SPL = "1.3.6.1.4.1.3704.1.3.9"
    HWID = "1.3.6.1.4.1.3704.1.4"
    CSP_ID = "1.3.6.1.4.1.3704.1.5"


_V = VekExtension
SPL_ORDER = {
    0: (_V.BL_SPL, _V.TEE_SPL, _V.SPL_4, _V.SPL_5, _V.SPL_6, _V.SPL_7, _V.SNP_SPL, _V.UCODE_SPL),
    1: (_V.FMC_SPL, _V.BL_SPL, _V.TEE_SPL, _V.SNP_SPL, _V.SPL_5, _V.SPL_6, _V.SPL_7, _V.UCODE_SPL),
}
"""Security patch levels in the order in which AMD emits them, by structVersion."""


@dataclass(frozen=True, slots=True)
class CaFacts:
    """What tells one CA certificate from another: `service` names the KDS path of its revocation list."""

    common_name: str
    serial: int
    not_before: datetime
    service: str


@dataclass(frozen=True, slots=True)
class ProductLine:
    """The certificate hierarchy of one product line.

    `name` is the KDS's spelling and the VLEK's productName, `vcek_product_name` the VCEK's: "Milan-B0"
    stands on every Milan stepping. `hwid_size` bytes of CHIP_ID identify a chip; the rest of it is zero.
    """

    name: str
    vcek_product_name: str
    struct_version: int
    hwid_size: int
    ark: CaFacts
    ask: CaFacts
    asvk: CaFacts


def _line(
    name: str, vcek_product_name: str, struct_version: int, hwid_size: int, *issued: tuple[int, str]
) -> ProductLine:
    common_names = (f"ARK-{name}", f"SEV-{name}", f"SEV-VLEK-{name}")
    facts = [
        CaFacts(common_name, serial, datetime.fromisoformat(not_before), service)
        for common_name, (serial, not_before), service in zip(
            common_names, issued, ("vcek", "vcek", "vlek"), strict=True
        )
    ]
    return ProductLine(name, vcek_product_name, struct_version, hwid_size, *facts)


PRODUCT_LINES = {
    "milan": _line(
        "Milan",
        "Milan-B0",
        0,
        HWID_SIZE,
        (0x10000, "2020-10-22T17:23:05Z"),
        (0x10001, "2020-10-22T18:24:20Z"),
        (0x10101, "2022-11-16T22:45:24Z"),
    ),
    "genoa": _line(
        "Genoa",
        "Genoa",
        0,
        HWID_SIZE,
        (0x20000, "2022-01-26T15:34:37Z"),
        (0x20002, "2022-10-31T13:33:48Z"),
        (0x20101, "2022-11-18T20:48:34Z"),
    ),
    "turin": _line(
        "Turin",
        "Turin",
        1,
        8,
        (0x30000, "2023-05-15T20:03:12Z"),
        (0x30001, "2023-05-15T20:25:21Z"),
        (0x30101, "2023-05-15T21:09:41Z"),
    ),
}


def product_line(product: str) -> ProductLine:
    """The hierarchy of a product named as in `data/products`; `ValueError` names the known ones."""
    if product not in PRODUCT_LINES:
        raise ValueError(f"no certificates for product {product!r}: one of {', '.join(PRODUCT_LINES)}")
    return PRODUCT_LINES[product]
