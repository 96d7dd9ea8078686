"""Chains and reports made to order with the library's own builder: AMD's names, a foreign root, and any defect.

Nothing here is shared with the vendor's package, so a shape that both got wrong in the same way would show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from snpbook.attest.certs import Certificate
from snpbook.attest.crl import RevocationList
from snpbook.attest.roots import Roots
from snpbook.spec.report import ATTESTATION_REPORT, SIGNED_SIZE
from snpbook.spec.resources import resource
from tests.reference.attestation import items

AMD = "1.3.6.1.4.1.3704.1"
ISSUED, EXPIRES = datetime(2025, 1, 1, tzinfo=UTC), datetime(2032, 1, 1, tzinfo=UTC)
VEK_KEY = ec.derive_private_key(0x5EED, ec.SECP384R1())
CHIP_ID = bytes(range(1, 65))
TCB = 0xDE08000000000003


@cache
def toy_key(name: str) -> rsa.RSAPrivateKey:
    """One of the RSA keys that the repository carries: as good as any, and there already."""
    key = load_pem_private_key(
        resource("data", "roots", "toy", f"toy_milan_{name}.key.pem").read_bytes(),
        None,
        unsafe_skip_rsa_key_validation=True,
    )
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def amd(common_name: str, organisation: str = "Advanced Micro Devices") -> x509.Name:
    values = {
        NameOID.ORGANIZATIONAL_UNIT_NAME: "Engineering", NameOID.COUNTRY_NAME: "US",
        NameOID.LOCALITY_NAME: "Santa Clara", NameOID.STATE_OR_PROVINCE_NAME: "CA",
        NameOID.ORGANIZATION_NAME: organisation, NameOID.COMMON_NAME: common_name,
    }  # fmt: skip
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in values.items()])


def der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    octets = size.to_bytes(-(-size.bit_length() // 8), "big")
    return bytes([tag, *([size] if size < 128 else [0x80 + len(octets), *octets])]) + content


def resigned(cert: bytes, key: rsa.RSAPrivateKey, edit: Callable[[bytes], bytes]) -> bytes:
    """A certificate or list with an edited signed part, its length kept right, and a good signature over that."""
    ((_, body, _),) = items(cert)
    (_, tbs, _), (_, _, algorithm), _ = items(body)
    edited = der(0x30, edit(tbs))
    signature = key.sign(edited, padding.PSS(padding.MGF1(SHA384()), 48), SHA384())
    return der(0x30, edited, edit(algorithm), der(3, b"\0", signature))


def integer(value: int) -> bytes:
    body = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([2, len(body)]) + body


def text(value: str) -> bytes:
    return bytes([0x16, len(value)]) + value.encode()


def milan_extensions(tcb: tuple[int, int, int, int] = (3, 0, 8, 0xDE)) -> dict[str, bytes]:
    """AMD's extensions of a Milan VCEK, by the end of their identifier."""
    bootloader, tee, snp, microcode = tcb
    zeros = {suffix: integer(0) for suffix in ("3.4", "3.5", "3.6", "3.7")}
    return {
        "1": integer(0), "2": text("Milan-B0"), "3.1": integer(bootloader), "3.2": integer(tee), **zeros,
        "3.3": integer(snp), "3.8": integer(microcode), "4": CHIP_ID,
    }  # fmt: skip


def turin_extensions() -> dict[str, bytes]:
    """AMD's extensions of a Turin VCEK: another structure, eight bytes of chip id."""
    levels = {"3.9": 1, "3.1": 2, "3.2": 3, "3.3": 4, "3.5": 0, "3.6": 0, "3.7": 0, "3.8": 0x51}
    return {"1": integer(1), "2": text("Turin"), **{k: integer(v) for k, v in levels.items()}, "4": CHIP_ID[:8]}


@dataclass(frozen=True)
class OwnChain:
    """What to make: every field may be given a defect."""

    product: str = "Milan"
    extensions: dict[str, bytes] = field(default_factory=milan_extensions)
    vek_name: str = "SEV-VCEK"
    ask_name: str = ""
    organisation: str = "Advanced Micro Devices"
    ark_key: rsa.RSAPrivateKey = field(default_factory=lambda: toy_key("ark"))
    ask_key: rsa.RSAPrivateKey = field(default_factory=lambda: toy_key("ask"))
    ask_signer: rsa.RSAPrivateKey | None = None
    vek_key: ec.EllipticCurvePrivateKey = VEK_KEY
    hash: HashAlgorithm = field(default_factory=SHA384)
    salt: int = 48
    ask_is_ca: bool = True
    ask_path: int | None = 0
    ask_critical: bool = True
    ask_extension: x509.ExtensionType | None = None
    ark_signs_lists: bool = True
    vek_edit: Callable[[bytes], bytes] | None = None
    issued: datetime = ISSUED
    expires: datetime = EXPIRES
    critical: bool = False
    foreign_extension: bool = False

    @cached_property
    def ark(self) -> Certificate:
        name = amd(f"ARK-{self.product}", self.organisation)
        extend = _ca(None, crl_sign=self.ark_signs_lists)
        return self._certificate(name, name, self.ark_key.public_key(), self.ark_key, extend)

    @cached_property
    def ask(self) -> Certificate:
        name = amd(self.ask_name or f"SEV-{self.product}")
        extensions = _ca(self.ask_path, self.ask_critical, self.ask_extension) if self.ask_is_ca else _no_ca()
        signer = self.ask_signer or self.ark_key
        return self._certificate(
            name, amd(f"ARK-{self.product}", self.organisation), self.ask_key.public_key(), signer, extensions
        )

    @cached_property
    def vek(self) -> Certificate:
        def extend(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
            for suffix, value in self.extensions.items():
                extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{AMD}.{suffix}"), value)
                builder = builder.add_extension(extension, self.critical)
            if self.foreign_extension:
                builder = builder.add_extension(x509.OCSPNoCheck(), critical=False)
            return builder

        issuer = amd(self.ask_name or f"SEV-{self.product}")
        vek = self._certificate(amd(self.vek_name), issuer, self.vek_key.public_key(), self.ask_key, extend)
        return Certificate.read(resigned(vek.der, self.ask_key, self.vek_edit)) if self.vek_edit else vek

    def crl(
        self,
        *serials: int,
        issued: datetime = ISSUED,
        days: int = 3650,
        signer: rsa.RSAPrivateKey | None = None,
        critical: bool = False,
    ) -> RevocationList:
        """The root's revocation list."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(amd(f"ARK-{self.product}", self.organisation))
        builder = builder.last_update(issued).next_update(issued + timedelta(days=days))
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued)
            builder = builder.add_revoked_certificate(revoked.build())
        builder = builder.add_extension(x509.CRLNumber(1), critical)
        scheme = padding.PSS(padding.MGF1(SHA384()), 48)
        signed = builder.sign(signer or self.ark_key, SHA384(), rsa_padding=scheme)
        return RevocationList.read(signed.public_bytes(Encoding.DER))

    @property
    def certificates(self) -> list[Certificate]:
        return [self.vek, self.ask, self.ark]

    @property
    def roots(self) -> Roots:
        return Roots("own", frozenset([self.ark.fingerprint]))

    def report(self, **fields: object) -> bytes:
        """A report that this chain's VEK signed, good unless `fields` say otherwise."""
        good = {"version": 2, "policy": 0x30000, "signature_algo": 1, "chip_id": CHIP_ID, "reported_tcb": TCB}
        return self.sign(ATTESTATION_REPORT.pack(**{**good, **fields}))

    def sign(self, body: bytes) -> bytes:
        signed = body[:SIGNED_SIZE]
        r, s = decode_dss_signature(self.vek_key.sign(signed, ec.ECDSA(SHA384())))
        return signed + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)

    def but(self, **defects: object) -> OwnChain:
        return replace(self, **defects)  # type: ignore[arg-type]

    def _certificate(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
        signer: rsa.RSAPrivateKey,
        extend: Callable[[x509.CertificateBuilder], x509.CertificateBuilder],
    ) -> Certificate:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(7)
        builder = extend(builder.not_valid_before(self.issued).not_valid_after(self.expires))
        scheme = padding.PSS(padding.MGF1(self.hash), self.salt)
        return Certificate.read(builder.sign(signer, self.hash, rsa_padding=scheme).public_bytes(Encoding.DER))  # type: ignore[arg-type]


def _ca(
    path_length: int | None,
    critical: bool = True,
    other: x509.ExtensionType | None = None,
    crl_sign: bool = False,
) -> Callable[[x509.CertificateBuilder], x509.CertificateBuilder]:
    usage = x509.KeyUsage(False, False, False, False, False, True, crl_sign, False, False)
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)

    def extend(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        builder = builder.add_extension(constraints, critical).add_extension(usage, critical)
        return builder.add_extension(other, not isinstance(other, x509.AuthorityKeyIdentifier)) if other else builder

    return extend


def _no_ca() -> Callable[[x509.CertificateBuilder], x509.CertificateBuilder]:
    return lambda builder: builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
