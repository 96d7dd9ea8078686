"""Legacy SEV certificates: the 2084 bytes of PDH, PEK, OCA and CEK, and AMD's own format of ASK and ARK.

Nothing here knows X.509, which vouches for SNP only (`snpbook.spec.certificates`). Sources: SEV API (certificate
format), AMDESE/sev-tool, firmware 1.55.25; a real Naples chain.
"""

from collections.abc import Mapping
from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.launch import CURVE_P384, PUBLIC_KEY
from snpbook.spec.layout import Layout, Record, raw, uint


class CertUsage(IntEnum):
    """PUBKEY_USAGE and SIG_USAGE: what a key is for, and whose key signed."""

    ARK = 0x0000
    ASK = 0x0013
    INVALID = 0x1000
    """An unused signature slot; its algorithm is 0."""
    OCA = 0x1001
    PEK = 0x1002
    PDH = 0x1003
    CEK = 0x1004


class CertAlgo(IntEnum):
    """PUBKEY_ALGO and SIG_ALGO."""

    INVALID = 0x000
    RSA_SHA256 = 0x001
    ECDSA_SHA256 = 0x002
    ECDH_SHA256 = 0x003
    RSA_SHA384 = 0x101
    ECDSA_SHA384 = 0x102
    ECDH_SHA384 = 0x103


SEV_CERTIFICATE = Layout(
    "SevCertificate",
    0x824,
    Cite("SEV", "certificate format"),
    [
        uint("version", 0x000, 4),
        uint("api_major", 0x004, 1),
        uint("api_minor", 0x005, 1),
        raw("unused", 0x006, 2, note="signed like the rest: records keep every byte"),
        uint("pubkey_usage", 0x008, 4, enum=CertUsage),
        uint("pubkey_algo", 0x00C, 4, enum=CertAlgo),
        raw("pubkey", 0x010, 0x404, note="an EcPublicKey, or RsaPublicKey"),
        uint("sig1_usage", 0x414, 4, enum=CertUsage),
        uint("sig1_algo", 0x418, 4, enum=CertAlgo),
        raw("sig1", 0x41C, 0x200),
        uint("sig2_usage", 0x61C, 4, enum=CertUsage),
        uint("sig2_algo", 0x620, 4, enum=CertAlgo),
        raw("sig2", 0x624, 0x200),
    ],
)
CERT_VERSION = 1
CERT_SIGNED_SIZE = SEV_CERTIFICATE.offset("sig1_usage")
"""Both signatures cover the bytes before them: 0x000 to 0x413."""

RSA_PUBLIC_KEY = Layout(
    "RsaPublicKey",
    0x404,
    Cite("SEV", "RSA public key format"),
    [uint("modulus_bits", 0x000, 4), raw("exponent", 0x004, 0x200), raw("modulus", 0x204, 0x200)],
)

KEY_ALGOS: Mapping[CertUsage, CertAlgo] = {
    CertUsage.PDH: CertAlgo.ECDH_SHA256,
    CertUsage.PEK: CertAlgo.ECDSA_SHA256,
    CertUsage.OCA: CertAlgo.ECDSA_SHA256,
    CertUsage.CEK: CertAlgo.ECDSA_SHA256,
}
"""The keys of 2084-byte certificates, all on P-384."""

SIGNERS: Mapping[CertUsage, tuple[CertUsage, ...]] = {
    CertUsage.PDH: (CertUsage.PEK,),
    CertUsage.PEK: (CertUsage.OCA, CertUsage.CEK),
    CertUsage.OCA: (CertUsage.OCA,),
    CertUsage.CEK: (CertUsage.ASK,),
    CertUsage.ASK: (CertUsage.ARK,),
    CertUsage.ARK: (CertUsage.ARK,),
}
"""Whose keys sign a certificate. As exported by the firmware, a CEK is unsigned: AMD's service signs it."""


def unsigned_certificate(usage: CertUsage, x: int, y: int, api: tuple[int, int]) -> Record:
    """The certificate of a point on P-384, its signature slots unused; `api` is the version of who makes it."""
    size = PUBLIC_KEY.fields["qx"].size
    point = PUBLIC_KEY.pack(curve=CURVE_P384, qx=x.to_bytes(size, "little"), qy=y.to_bytes(size, "little"))
    return SEV_CERTIFICATE.record(
        version=CERT_VERSION,
        api_major=api[0],
        api_minor=api[1],
        pubkey_usage=usage,
        pubkey_algo=KEY_ALGOS[usage],
        pubkey=point,
        sig1_usage=CertUsage.INVALID,
        sig2_usage=CertUsage.INVALID,
    )


PERSISTENT_DATA = Layout(
    "LegacyPersistentData",
    0x18FC,
    Cite("MODEL", "persistent data of the legacy platform"),
    [
        raw("oca_key", 0x0000, 0x30, note="zero once an owner has brought his own certificate"),
        raw("pek_key", 0x0030, 0x30, note="private keys: P-384 scalars, big-endian"),
        raw("pdh_key", 0x0060, 0x30),
        raw("oca", 0x0090, SEV_CERTIFICATE.size),
        raw("pek", 0x08B4, SEV_CERTIFICATE.size),
        raw("pdh", 0x10D8, SEV_CERTIFICATE.size),
    ],
)
"""What outlives a reset, in flash or sealed in the area of INIT_EX; how it is laid out is not published (MODEL)."""
SCALAR_SIZE = 48


def _amd_certificate(bits: int) -> Layout:
    """Exponent, modulus and signature are as long as the modulus."""
    size = bits // 8
    return Layout(
        f"AmdCertificate{bits}",
        0x40 + 3 * size,
        Cite("SEV", "AMD certificate format"),
        [
            uint("version", 0x00, 4),
            raw("key_id", 0x04, 16),
            raw("certifying_id", 0x14, 16, note="the signer's key id"),
            uint("key_usage", 0x24, 4, enum=CertUsage),
            raw("unused", 0x28, 16),
            uint("exponent_bits", 0x38, 4),
            uint("modulus_bits", 0x3C, 4),
            raw("exponent", 0x40, size),
            raw("modulus", 0x40 + size, size),
            raw("signature", 0x40 + 2 * size, size, note="RSASSA-PSS over what stands before"),
        ],
    )


AMD_CERTIFICATES: Mapping[int, Layout] = {bits: _amd_certificate(bits) for bits in (2048, 4096)}
"""ARK and ASK by the bits of their modulus, integers little-endian: 2048 with SHA-256 on Naples, 4096 with SHA-384 from
Rome on (Rome: unconfirmed).
"""
AMD_CERTIFICATE_MODULUS_BITS = AMD_CERTIFICATES[2048].offset("modulus_bits")
"""Where a certificate tells which of the two it is."""
RSA_ALGOS: Mapping[int, CertAlgo] = {2048: CertAlgo.RSA_SHA256, 4096: CertAlgo.RSA_SHA384}
"""How keys of those sizes sign: RSASSA-PSS with a salt as long as the digest."""


def amd_certificate(data: bytes, offset: int = 0) -> Record:
    """The ASK or ARK at `offset`; `ValueError` where it is cut short or its modulus has an unknown size."""
    start = offset + AMD_CERTIFICATE_MODULUS_BITS
    bits = int.from_bytes(data[start : start + 4], "little")
    if bits not in AMD_CERTIFICATES:
        raise ValueError(f"AMD certificate: {bits} bits of modulus, not {' or '.join(map(str, AMD_CERTIFICATES))}")
    return AMD_CERTIFICATES[bits].unpack(data, offset)
