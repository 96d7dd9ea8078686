"""What a VEK certificate says about its chip: patch levels, product, chip or cloud provider.

The extensions must be exactly AMD's, each once, none critical; their order is free. Source: KDS (certificate
extensions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.attest import der as asn1
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import Check, Checklist
from snpbook.spec.certificates import HWID_SIZES, SPL_MAX, SPL_ORDER, UCODE_SPL_MAX, VekExtension
from snpbook.spec.report import SigningKey

KDS = "KDS VCEK extensions"
_STEPPING = re.compile(r"(?P<line>[A-Z][a-z]+)(-[A-Z][0-9])?")


@dataclass(frozen=True, slots=True)
class VekContent:
    """The extensions of a VCEK (which has a `hwid`) or VLEK (which has a `csp_id`).

    `tcb` is a TCB_VERSION as reports have it: one byte per patch level, in the product's order.
    """

    struct_version: int
    product_name: str
    tcb: int
    hwid: bytes | None
    csp_id: str | None

    @property
    def line(self) -> str | None:
        """The product line that the product's name begins with, before a stepping such as -B0; else None."""
        match = _STEPPING.fullmatch(self.product_name)
        return match["line"] if match else None


@lru_cache(maxsize=4096)
def read_vek(certificate: Certificate, kind: SigningKey) -> tuple[VekContent, tuple[Check, ...]]:
    """Hold a certificate against the profile of a VEK and decode it; `NotGenuine` where it does not fit.

    Remembered, because a VEK signs many reports.
    """
    checks = Checklist()
    key = certificate.public_key
    usable = isinstance(key.key, ec.EllipticCurvePublicKey)
    checks.require("vek.key", usable, "a VEK is an EC key on P-384", "EC secp384r1", key.kind, KDS)
    version = certificate.version
    checks.require("vek.version", version is x509.Version.v3, "a VEK is X.509 version 3", "v3", version.name, KDS)

    values = {extension.oid.dotted_string: _value(extension) for extension in certificate.extensions}
    struct_version = _integer(values.get(VekExtension.STRUCT_VERSION, b""))
    rule = "the VEK's structVersion is unknown"
    checks.require("vek.struct_version", struct_version in SPL_ORDER, rule, "0 or 1", struct_version, KDS)
    assert struct_version is not None
    owner = VekExtension.HWID if kind is SigningKey.VCEK else VekExtension.CSP_ID
    levels = SPL_ORDER[struct_version]
    expected = {VekExtension.STRUCT_VERSION, VekExtension.PRODUCT_NAME, owner, *levels}
    found = " ".join(sorted(set(values) ^ expected)) or "none other"
    rule = f"a {kind.name} has exactly AMD's extensions"
    checks.require("vek.extensions", set(values) == expected, rule, "exactly AMD's", found, KDS)
    critical = " ".join(extension.oid.dotted_string for extension in certificate.extensions if extension.critical)
    rule = "no extension of a VEK is critical"
    checks.require("vek.critical", not critical, rule, "none", critical or "none", KDS)

    patch_levels = [_integer(values[level]) for level in levels]
    limits = [UCODE_SPL_MAX if level is VekExtension.UCODE_SPL else SPL_MAX for level in levels]
    fits = [level is not None and level <= limit for level, limit in zip(patch_levels, limits, strict=True)]
    rule = "a patch level is no DER INTEGER in its range"
    found = " ".join("none" if level is None else str(level) for level in patch_levels)
    checks.require("vek.patch_levels", all(fits), rule, f"0 to {SPL_MAX}, ucode {UCODE_SPL_MAX}", found, KDS)
    product_name = _text(values[VekExtension.PRODUCT_NAME])
    csp_id = _text(values[VekExtension.CSP_ID]) if owner is VekExtension.CSP_ID else None
    texts = product_name is not None and (csp_id is not None or owner is VekExtension.HWID)
    found = " ".join(filter(None, (product_name, csp_id)))
    checks.require("vek.text", texts, "a name in the VEK is no IA5String", "IA5String", found, KDS)
    size = HWID_SIZES[struct_version]
    hwid = _bare(values[VekExtension.HWID], size) if owner is VekExtension.HWID else None
    met, found = hwid is None or len(hwid) == size, f"{len(hwid)} bytes" if hwid is not None else "none"
    checks.require("vek.hwid", met, "the chip's id has another length", f"{size} bytes", found, KDS)

    tcb = int.from_bytes(bytes(level or 0 for level in patch_levels), "little")
    return VekContent(struct_version, product_name or "", tcb, hwid, csp_id), tuple(checks.made)


def _value(extension: x509.Extension[x509.ExtensionType]) -> bytes:
    """The content of one of AMD's extensions, which no library knows; empty for any other."""
    return extension.value.value if isinstance(extension.value, x509.UnrecognizedExtension) else b""


def _bare(value: bytes, size: int) -> bytes:
    """The chip's id, which AMD gives bare, out of the OCTET STRING that the encoding of extensions would ask for."""
    whole = _whole(value) if len(value) > size else None
    return value[whole.content :] if whole and whole.tag == asn1.OCTET_STRING else value


def _integer(value: bytes) -> int | None:
    whole = _whole(value)
    return asn1.integer(value, whole) if whole else None


def _text(value: bytes) -> str | None:
    whole = _whole(value)
    body = value[whole.content :] if whole and whole.tag == asn1.IA5_STRING else None
    return body.decode("ascii") if body is not None and body.isascii() else None


def _whole(value: bytes) -> asn1.Element | None:
    """The one element that a value is, None where it is none or has a tail."""
    try:
        whole = asn1.element(value)
    except asn1.DerError:
        return None
    return whole if whole.end == len(value) else None
