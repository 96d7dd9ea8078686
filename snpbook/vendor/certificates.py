"""X.509 certificates in the exact shape of AMD's, deterministic: same content, same bytes.

The to-be-signed part comes from `cryptography`'s builder; what the builder cannot do is mended in `_sign` alone:
serial number 0, a PSS trailer field spelt out, a PSS salt of our choosing. Sources: KDS, X509 (RFC 5280, RFC 4055).
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID, NameOID

from snpbook.spec.certificates import (
    ARK_KEY_USAGE,
    CA_YEARS,
    DISTINGUISHED_NAME,
    INTERMEDIATE_KEY_USAGE,
    KDS_URL,
    PSS_ALGORITHM,
    PSS_ALGORITHM_EXPLICIT,
    TRAILER_OMITTED_FROM,
    VEK_SERIAL,
    CaFacts,
    ProductLine,
    VekExtension,
    VekKind,
)
from snpbook.vendor import pss

_VERSION_3 = bytes.fromhex("a003020102")
_INTEGER, _BIT_STRING, _IA5_STRING, _SEQUENCE = 0x02, 0x03, 0x16, 0x30


def ca_certificate(
    line: ProductLine, facts: CaFacts, public_key: rsa.RSAPublicKey, ark_key: rsa.RSAPrivateKey
) -> bytes:
    """DER of the line's ARK, ASK or ASVK, whichever `facts` describe; the ARK's key signs all three."""
    subject_id = x509.SubjectKeyIdentifier.from_public_key(public_key)
    url = x509.UniformResourceIdentifier(f"{KDS_URL}/{facts.service}/v1/{line.name}/crl")
    revocations = x509.CRLDistributionPoints([x509.DistributionPoint([url], None, None, None)])
    extensions: list[tuple[x509.ExtensionType, bool]]
    if facts is line.ark:
        usage = x509.UnrecognizedExtension(ExtensionOID.KEY_USAGE, ARK_KEY_USAGE)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        extensions = [(usage, True), (subject_id, False), (constraints, True), (revocations, False)]
    else:
        usage = x509.UnrecognizedExtension(ExtensionOID.KEY_USAGE, INTERMEDIATE_KEY_USAGE)
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ark_key.public_key())
        extensions = [(subject_id, False), (issuer_id, False), (constraints, True), (usage, True), (revocations, False)]
    builder = _builder(line.ark.common_name, facts.common_name, public_key, facts.not_before, CA_YEARS, extensions)
    return _sign(builder, ark_key, facts.serial, PSS_ALGORITHM_EXPLICIT)


def vek_certificate(
    issuer: CaFacts,
    issuer_key: rsa.RSAPrivateKey,
    kind: VekKind,
    public_key: ec.EllipticCurvePublicKey,
    issued: datetime,
    content: Iterable[tuple[VekExtension, int | str | bytes]],
) -> bytes:
    """DER of a VCEK or VLEK with those extensions, in that order: int as INTEGER, str as IA5String, bytes raw."""
    issued = issued.astimezone(UTC)
    extensions = [
        (x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), _extension_value(value)), False)
        for oid, value in content
    ]
    builder = _builder(issuer.common_name, kind.common_name, public_key, issued, kind.years, extensions)
    explicit = issued.date() < TRAILER_OMITTED_FROM
    return _sign(builder, issuer_key, VEK_SERIAL, PSS_ALGORITHM_EXPLICIT if explicit else PSS_ALGORITHM)


def revocation_list(
    ark: CaFacts, ark_key: rsa.RSAPrivateKey, issued: datetime, next_update: datetime, revoked: Iterable[int]
) -> bytes:
    """DER of the ARK's CRL, with the extensions that RFC 5280 asks for (unconfirmed), its time as number (MODEL)."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(ark.common_name))
        .last_update(issued)
        .next_update(next_update)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ark_key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(int(issued.timestamp())), critical=False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued).build()
        builder = builder.add_revoked_certificate(entry)
    tbs = builder.sign(ark_key, hashes.SHA384(), rsa_padding=pss.PADDING).tbs_certlist_bytes
    return _der(_SEQUENCE, tbs, PSS_ALGORITHM, _der(_BIT_STRING, b"\0", pss.sign(ark_key, tbs)))


def _builder(
    issuer: str,
    subject: str,
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    not_before: datetime,
    years: int,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(_name(issuer))
        .subject_name(_name(subject))
        .public_key(public_key)
        .not_valid_before(not_before)
        .not_valid_after(_years_later(not_before, years))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder


def _sign(builder: x509.CertificateBuilder, key: rsa.RSAPrivateKey, serial: int, algorithm: bytes) -> bytes:
    """The builder's certificate with that serial number and algorithm identifier, signed deterministically.

    The builder refuses serial 0 and always leaves the trailer field out, so it makes a template whose first fields
    (version, serial, algorithm) are then replaced. The template is dropped unread: its own signature is random.
    """
    template = builder.serial_number(1).sign(key, hashes.SHA384(), rsa_padding=pss.PADDING).tbs_certificate_bytes
    first_fields = _VERSION_3 + _der_integer(1) + PSS_ALGORITHM
    rest = template[template.index(first_fields) + len(first_fields) :]
    tbs = _der(_SEQUENCE, _VERSION_3, _der_integer(serial), algorithm, rest)
    return _der(_SEQUENCE, tbs, algorithm, _der(_BIT_STRING, b"\0", pss.sign(key, tbs)))


def _name(common_name: str) -> x509.Name:
    fields = [x509.NameAttribute(x509.ObjectIdentifier(oid), value) for oid, value in DISTINGUISHED_NAME]
    return x509.Name([*fields, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _years_later(moment: datetime, years: int) -> datetime:
    """The same date and time of a later year; 29 February becomes the 28th (the model's own choice)."""
    leap_day = (moment.month, moment.day) == (2, 29)
    return moment.replace(year=moment.year + years, day=28 if leap_day else moment.day)


def _extension_value(value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _der_integer(value)
    return _der(_IA5_STRING, value.encode("ascii")) if isinstance(value, str) else value


def _der_integer(value: int) -> bytes:
    """A non-negative INTEGER: a leading zero octet where the top bit would read as a sign."""
    return _der(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes(-(-size.bit_length() // 8), "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content
