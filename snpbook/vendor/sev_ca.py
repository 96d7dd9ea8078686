"""AMD's certificate authority for SEV and SEV-ES with toy keys: ARK and ASK in AMD's own format, and CEKs.

From Milan on the RSA keys are those of the X.509 authorities, whose toy keys everybody knows. Sources: SEV API
(certificate format), the real Naples chain.
"""

from __future__ import annotations

from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from snpbook.firmware.keys import Chip
from snpbook.spec.releases import Release
from snpbook.spec.resources import resource
from snpbook.spec.sev_certificates import (
    AMD_CERTIFICATES,
    CERT_SIGNED_SIZE,
    CERT_VERSION,
    RSA_ALGOS,
    SEV_CERTIFICATE,
    CertAlgo,
    CertUsage,
    unsigned_certificate,
)
from snpbook.vendor import pss

_HASHES = {CertAlgo.RSA_SHA256: hashes.SHA256(), CertAlgo.RSA_SHA384: hashes.SHA384()}


class SevCa:
    """ASK and ARK of one product, named as in `data/products`."""

    def __init__(self, product: str) -> None:
        self.product = product
        folder = resource("data", "roots", "toy")
        self.ask, self.ark = ((folder / f"toy_{product}_sev_{role}.cert").read_bytes() for role in ("ask", "ark"))
        pem = (folder / f"toy_{product}_ask.key.pem").read_bytes()
        key = load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
        assert isinstance(key, rsa.RSAPrivateKey), "snpbook.tools.toy_roots made it"
        self._key = key

    def __repr__(self) -> str:
        return f"SevCa(toy, {self.product}, ARK sha256 {sha256(self.ark).hexdigest()[:16]})"

    @property
    def chain(self) -> bytes:
        """ASK, then ARK: what SEND_START wants."""
        return self.ask + self.ark

    def sign_cek(self, cek: bytes) -> bytes:
        """An exported CEK certificate (2084 bytes) with AMD's signature."""
        algo = RSA_ALGOS[self._key.key_size]
        signature = pss.sign(self._key, cek[:CERT_SIGNED_SIZE], _HASHES[algo])[::-1]
        size = SEV_CERTIFICATE.fields["sig1"].size
        cert = SEV_CERTIFICATE.unpack(cek)
        return bytes(cert.replace(sig1_usage=CertUsage.ASK, sig1_algo=algo, sig1=signature.ljust(size, b"\0")))

    def issue_cek(self, chip: Chip, release: Release) -> bytes:
        """The signed CEK certificate of a chip that left the factory with that firmware: AMD knows the secret."""
        if chip.product != self.product:
            raise ValueError(f"chip: {chip} is none of {self.product}")
        point = chip.cek.public_key().public_numbers()
        cek = unsigned_certificate(CertUsage.CEK, point.x, point.y, (release.major, release.minor))
        return self.sign_cek(bytes(cek))


def amd_certificate(usage: CertUsage, key: rsa.RSAPublicKey, ark: rsa.RSAPrivateKey) -> bytes:
    """The ARK, or the ASK, in AMD's format. A key's id is the beginning of its modulus's SHA-256 (MODEL)."""
    numbers, layout = key.public_numbers(), AMD_CERTIFICATES[key.key_size]
    size = key.key_size // 8
    cert = layout.record(
        version=CERT_VERSION,
        key_id=_key_id(key),
        certifying_id=_key_id(ark.public_key()),
        key_usage=usage,
        exponent_bits=key.key_size,
        modulus_bits=key.key_size,
        exponent=numbers.e.to_bytes(size, "little"),
        modulus=numbers.n.to_bytes(size, "little"),
    )
    signed = bytes(cert)[: layout.offset("signature")]
    return bytes(cert.replace(signature=pss.sign(ark, signed, _HASHES[RSA_ALGOS[ark.key_size]])[::-1]))


def _key_id(key: rsa.RSAPublicKey) -> bytes:
    return sha256(key.public_numbers().n.to_bytes(key.key_size // 8, "little")).digest()[:16]
