"""Defects of origin: evidence that is malformed or not genuine, one for every check of `attest.verify`.

Where a defect lies inside something signed, it is signed again, so that nothing else is wrong. Left out are two checks
of a pinned root's own shape: a root with another shape has another fingerprint. Sources: SNP ABI, KDS, X509 (RFC 5280).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import SubjectKeyIdentifier
from cryptography.x509.oid import ExtensionOID

from snpbook.attest.certs import Certificate
from snpbook.attest.der import BOOLEAN, INTEGER, OCTET_STRING, children, element
from snpbook.evidence.defect import Defect, Spoil
from snpbook.evidence.kit import Kit, Stage, Verdict
from snpbook.evidence.maker import Maker
from snpbook.evidence.surgery import encoded_oid, extension, flipped, made_extension, resigned, tagged
from snpbook.firmware.keys import Chip
from snpbook.spec.certificates import ARK_KEY_USAGE, CA_YEARS, INTERMEDIATE_KEY_USAGE, PRODUCT_LINES, VekExtension
from snpbook.spec.policy import POLICY
from snpbook.spec.products import product as find_product
from snpbook.spec.report import ATTESTATION_REPORT, VERSIONS, SigningKey, reserved_ranges
from snpbook.vendor.ca import ToyAuthority
from snpbook.vendor.certificates import ca_certificate

_TRUE = tagged(BOOLEAN, b"\xff")
_YEARS = timedelta(days=366)
_E = VekExtension


def origin_defects() -> Iterator[Defect]:
    """All of them, in the order of the checks."""
    for name, tells, spoil in (
        ("report-cut-short", "the last byte of the report is missing", _cut_report),
        ("report-too-long", "a byte stands behind the report", lambda m, k: replace(k, report=k.report + b"\xff")),
        ("crl-cut-short", "the last byte of the revocation list is missing", lambda m, k: replace(k, crl=k.crl[:-1])),
    ):
        yield Defect(name, tells, Verdict(Stage.MALFORMED), spoil)
    for name, tells, check, spoil in (*_FORMAT, *_CHAIN, *_VEK, *_BINDING):
        yield Defect(name, tells, Verdict(Stage.NOT_GENUINE, check), spoil)
    for name, tells, check, spoil in _CHIP:
        yield Defect(name, tells, Verdict(Stage.NOT_GENUINE, check), spoil, signers=("vcek",))


def _cut_report(maker: Maker, kit: Kit) -> Kit:
    return replace(kit, report=kit.report[:-1])


def _fields(**fields: Any) -> Spoil:
    """The report says so, and is signed."""
    return lambda maker, kit: replace(kit, report=maker.report(**fields))


def _word(field: str, change: Callable[[int], int]) -> Spoil:
    return lambda maker, kit: replace(kit, report=maker.report(**{field: change(maker.fields[field])}))


def _reserved(maker: Maker, kit: Kit) -> Kit:
    first, _ = reserved_ranges(maker.fields["version"])[0]
    return replace(kit, report=maker.sign(flipped(kit.report, first)))


def _unsigned(maker: Maker, kit: Kit) -> Kit:
    return replace(kit, report=ATTESTATION_REPORT.pack(**{**maker.fields, "signing_key": SigningKey.NONE}))


def _unknown_key(maker: Maker, kit: Kit) -> Kit:
    """Bit 3 of the word, the middle one of SIGNING_KEY."""
    at, bit = ATTESTATION_REPORT.offset("signing_key"), 1 << 3
    body = bytearray(kit.report)
    body[at] |= bit
    return replace(kit, report=maker.sign(bytes(body)))


def _other_line(maker: Maker, kit: Kit) -> Kit:
    signature = find_product(_other(maker)).signature
    named = {"cpuid_family": signature.family, "cpuid_model": signature.model, "cpuid_stepping": signature.stepping}
    return replace(kit, report=maker.report(version=max(maker.fields["version"], 3), **named))


def _other(maker: Maker) -> str:
    return next(name for name in PRODUCT_LINES if name != maker.recipe.product)


def _without(which: Callable[[Maker], str]) -> Spoil:
    def spoil(maker: Maker, kit: Kit) -> Kit:
        return replace(kit, certificates={n: der for n, der in kit.certificates.items() if n != which(maker)})

    return spoil


def _vek(change: Callable[[Maker, bytes], bytes]) -> Spoil:
    return lambda maker, kit: _with(kit, maker.vek_file, change(maker, kit.certificates[maker.vek_file]))


def _intermediate(change: Callable[[Maker, bytes], bytes]) -> Spoil:
    def spoil(maker: Maker, kit: Kit) -> Kit:
        return _with(kit, maker.intermediate_file, change(maker, kit.certificates[maker.intermediate_file]))

    return spoil


def _with(kit: Kit, name: str, der: bytes) -> Kit:
    return replace(kit, certificates={**kit.certificates, name: der})


def _authority(maker: Maker) -> ToyAuthority:
    return maker.ca.asvk if maker.is_vlek else maker.ca.ask


def _vek_edit(old: Callable[[Maker, bytes], bytes], new: Callable[[bytes], bytes]) -> Spoil:
    def change(maker: Maker, der: bytes) -> bytes:
        found = old(maker, der)
        return resigned(der, _authority(maker).key, found, new(found))

    return _vek(change)


def _extension_edit(oid: str, new: Callable[[bytes], bytes]) -> Spoil:
    return _vek_edit(lambda maker, der: extension(der, oid), new)


def _valued(oid: str, value: bytes) -> Spoil:
    return _extension_edit(oid, lambda _: made_extension(oid, value))


def _foreign_root(maker: Maker, kit: Kit) -> Kit:
    """AMD's names from top to bottom, under a root key of somebody else."""
    line, authority = maker.ca.line, _authority(maker)
    forger = maker.ca.ask.key if maker.is_vlek else maker.ca.asvk.key
    root = ca_certificate(line, line.ark, forger.public_key(), forger)
    below = ca_certificate(line, authority.facts, authority.key.public_key(), forger)
    forged = _with(_with(kit, "ark.der", root), maker.intermediate_file, below)
    return replace(forged, crl=b"")


def _expired_root(maker: Maker, kit: Kit) -> Kit:
    end = Certificate.read(maker.ca.ark.der).not_after
    return Maker(replace(maker.recipe, now=end + timedelta(days=1))).kit()


def _old_intermediate(maker: Maker, _: bytes) -> bytes:
    authority = _authority(maker)
    facts = replace(authority.facts, not_before=maker.issued - (CA_YEARS + 1) * _YEARS)
    return ca_certificate(maker.ca.line, facts, authority.key.public_key(), maker.ca.ark.key)


def _no_authority(maker: Maker, der: bytes) -> bytes:
    lists_only = bytes([*INTERMEDIATE_KEY_USAGE[:-1], ARK_KEY_USAGE[-1] ^ INTERMEDIATE_KEY_USAGE[-1]])
    return resigned(der, maker.ca.ark.key, INTERMEDIATE_KEY_USAGE, lists_only)


def _other_key_identifier(maker: Maker, der: bytes) -> bytes:
    named = SubjectKeyIdentifier.from_public_key(maker.ca.ark.key.public_key()).digest
    return resigned(der, maker.ca.ark.key, named, flipped(named, 0))


def _subject(_: Maker, der: bytes) -> bytes:
    subject = children(der, children(der, element(der))[0])[5]
    return der[subject.start : subject.end]


def _spki(maker: Maker, _: bytes) -> bytes:
    return maker.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _rsa_key(maker: Maker, der: bytes) -> bytes:
    key = _authority(maker).key
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return resigned(der, key, _spki(maker, der), spki)


def _version_1(maker: Maker, der: bytes) -> bytes:
    """A certificate of version 1 writes no version and has no extensions."""
    key, fields = _authority(maker).key, children(der, children(der, element(der))[0])
    first, last = (der[part.start : part.end] for part in (fields[0], fields[-1]))
    return resigned(resigned(der, key, last, b""), key, first, b"")


def _crl(change: Callable[[Maker, bytes], bytes]) -> Spoil:
    return lambda maker, kit: replace(kit, crl=change(maker, kit.crl))


def _critical_crl(maker: Maker, der: bytes) -> bytes:
    number = encoded_oid(ExtensionOID.CRL_NUMBER.dotted_string)
    return resigned(der, maker.ca.ark.key, number, number + _TRUE)


def _long_signature(_: Maker, kit: Kit) -> Kit:
    return replace(kit, report=flipped(kit.report, _last("signature_s")))


def _changed(field: str) -> Spoil:
    return lambda maker, kit: replace(kit, report=flipped(kit.report, ATTESTATION_REPORT.offset(field)))


def _last(field: str) -> int:
    return ATTESTATION_REPORT.offset(field) + ATTESTATION_REPORT.fields[field].size - 1


def _other_tcb(maker: Maker, _: bytes) -> bytes:
    return maker.vek(tcb=replace(maker.tcb, snp=maker.tcb.snp ^ 1))


def _other_chip(maker: Maker, _: bytes) -> bytes:
    return maker.vek(chip=Chip.from_seed(f"another than {maker.recipe.seed}", maker.recipe.product))


_Rows = Iterable[tuple[str, str, str, Spoil]]
_FIRST_STRAY = next(bit for bit in range(8 * POLICY.size) if POLICY.reserved_mask >> bit & 1)
_LAST = VERSIONS[-1]

_FORMAT: _Rows = (
    ("report-version-1", "the report's version is older than any", "report.version", _fields(version=1)),
    ("report-version-newer", "the report's version is newer than any known", "report.version", _fields(
        version=_LAST + 1)),
    ("policy-bit-17-clear", "a bit of the guest policy that must be one is zero", "report.policy.one", _word(
        "policy", lambda word: word & ~int.from_bytes(POLICY.pack(one=1), "little"))),
    ("policy-reserved-bit", "a reserved bit of the guest policy is set", "report.policy.reserved", _word(
        "policy", lambda word: word | 1 << _FIRST_STRAY)),
    ("signature-algorithm", "the report names an unknown signature algorithm", "report.signature_algo",
        _word("signature_algo", lambda word: word + 1)),
    ("reserved-byte", "a reserved byte of the report is not zero, and signed", "report.reserved", _reserved),
    ("signing-key-unknown", "SIGNING_KEY has a value that nobody knows", "report.signing_key", _unknown_key),
    ("unsigned", "the host masks the chip key: signature of zeros, SIGNING_KEY 7", "report.signed", _unsigned),
    ("cpuid-unknown", "the CPUID bytes name no product line", "report.cpuid", _fields(version=_LAST, cpuid_family=1)),
    ("other-product", "the report's CPUID names another product line than the chain", "report.product", _other_line),
)  # fmt: skip
_CHAIN: _Rows = (
    ("no-vek", "the certificate of the signing key is missing", "certificates.vek", _without(lambda m: m.vek_file)),
    ("no-intermediate", "the ASK or ASVK is missing", "certificates.intermediate", _without(
        lambda m: m.intermediate_file)),
    ("no-root", "the ARK is missing", "certificates.root", _without(lambda m: "ark.der")),
    ("duplicate-extension", "the VEK names its microcode twice", "certificates.vek", _extension_edit(
        _E.UCODE_SPL, lambda found: found + found)),
    ("foreign-root", "a whole chain with AMD's names under a root of somebody else", "chain.root", _foreign_root),
    ("intermediate-no-ca", "the ASK or ASVK may not sign certificates", "chain.intermediate.authority", _intermediate(
        _no_authority)),
    ("intermediate-signature", "a bit of the ASK's or ASVK's signature is turned", "chain.intermediate.signature",
        _intermediate(lambda m, der: flipped(der, -1))),
    ("vek-signature", "a bit of the VEK's signature is turned", "chain.vek.signature", _vek(
        lambda m, der: flipped(der, -1))),
    ("wrong-name", "the VEK's subject belongs to another organisation", "chain.names", _vek_edit(
        _subject, lambda found: found.replace(b"Micro Devices", b"Micro Gadgets"))),
    ("wrong-key-identifier", "the ASK or ASVK names another key of the root", "chain.key_identifier", _intermediate(
        _other_key_identifier)),
    ("root-expired", "judged after the root's last day", "chain.root.dates", _expired_root),
    ("intermediate-expired", "the ASK or ASVK is past its last day", "chain.intermediate.dates", _intermediate(
        _old_intermediate)),
    ("expired", "the VEK is past its last day", "chain.vek.dates", _vek(
        lambda m, der: m.vek(issued=m.issued - 8 * _YEARS))),
    ("not-yet-valid", "the VEK's first day is to come", "chain.vek.dates", _vek(
        lambda m, der: m.vek(issued=m.issued + _YEARS))),
    ("crl-signature", "a bit of the revocation list's signature is turned", "chain.revocation.signature", _crl(
        lambda m, der: flipped(der, -1))),
    ("crl-critical", "the revocation list has an unknown critical extension", "chain.revocation.critical", _crl(
        _critical_crl)),
    ("revoked", "the ASK or ASVK is revoked", "chain.revocation.serial", _crl(
        lambda m, der: m.crl(_authority(m).facts.serial))),
    ("crl-stale", "the revocation list is out of date", "chain.revocation.dates", _crl(
        lambda m, der: m.crl(day=m.issued - _YEARS))),
)  # fmt: skip
_VEK: _Rows = (
    ("vek-rsa-key", "the VEK is an RSA key", "vek.key", _vek(_rsa_key)),
    ("vek-version-1", "the VEK is X.509 version 1, without extensions", "vek.version", _vek(_version_1)),
    ("struct-version", "the VEK's structVersion is unknown", "vek.struct_version", _valued(
        _E.STRUCT_VERSION, tagged(INTEGER, b"\2"))),
    ("missing-extension", "the VEK does not name its seventh patch level", "vek.extensions", _extension_edit(
        _E.SPL_7, lambda _: b"")),
    ("foreign-extension", "the VEK has an extension that AMD's have not", "vek.extensions", _extension_edit(
        _E.SPL_7, lambda found: found + made_extension(f"{_E.SPL_7}.1", tagged(INTEGER, b"\0")))),
    ("critical-extension", "an extension of the VEK is critical", "vek.critical", _vek_edit(
        lambda m, der: encoded_oid(_E.SPL_7), lambda found: found + _TRUE)),
    ("patch-level-range", "a patch level of the VEK is above 127", "vek.patch_levels", _valued(
        _E.SPL_7, tagged(INTEGER, b"\0\x80"))),
    ("product-name-type", "the VEK's product name is no IA5String", "vek.text", _valued(
        _E.PRODUCT_NAME, tagged(OCTET_STRING, b"Genoa"))),
)  # fmt: skip
_BINDING: _Rows = (
    ("signature-form", "a component of the report's signature is longer than 384 bits", "report.signature.form",
        _long_signature),
    ("wrong-signature", "a bit of the report's signature is turned", "report.signature", _changed("signature_r")),
    ("changed-measurement", "a bit of the measurement was turned after signing", "report.signature", _changed(
        "measurement")),
    ("vek-of-other-product", "the VEK's product name is of no line that its chain is for", "binding.product", _valued(
        _E.PRODUCT_NAME, b"\x16\4Rome")),
    ("wrong-tcb", "the VEK is for another TCB than the report's", "binding.tcb", _vek(_other_tcb)),
)  # fmt: skip
_CHIP: _Rows = (
    ("short-hwid", "the chip id in the VCEK lacks a byte", "vek.hwid", _extension_edit(
        _E.HWID, lambda found: made_extension(_E.HWID, b"short"))),
    ("wrong-chip-id", "the VCEK is for another chip", "binding.chip_id", _vek(_other_chip)),
)  # fmt: skip
