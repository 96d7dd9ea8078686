"""AMD's certificate authority for one product line, with toy keys: fixed files, public by design.

The certificates carry AMD's own names, because verifiers check names; that they are toys shows in the pinned
fingerprints of `data/roots/toy.toml`, in file names and in every repr. Source: KDS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from snpbook.firmware.keys import Chip
from snpbook.spec.certificates import (
    HWID_SIZE,
    SPL_MAX,
    SPL_ORDER,
    UCODE_SPL_MAX,
    VCEK,
    VLEK,
    CaFacts,
    VekExtension,
    VekKind,
    product_line,
)
from snpbook.spec.pem import der_from_pem, pem_from_der
from snpbook.spec.policy import Tcb
from snpbook.spec.resources import resource

ISSUED = datetime(2026, 1, 1, tzinfo=UTC)
"""When the simulated world's attestation keys were certified: fixed, so that certificates are the same each time."""
Extension = tuple[VekExtension, int | str | bytes]


@dataclass(frozen=True, slots=True, repr=False)
class ToyAuthority:
    """One CA: its certificate (DER) and its private key, which everybody knows."""

    facts: CaFacts
    der: bytes
    key: rsa.RSAPrivateKey

    @property
    def pem(self) -> str:
        """The certificate as PEM, 64 characters a line."""
        return pem_from_der(self.der)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, in hex."""
        return sha256(self.der).hexdigest()

    def __repr__(self) -> str:
        return f"<toy {self.facts.common_name}, sha256 {self.fingerprint[:16]}>"


class AmdCa:
    """The three toy authorities of one product line, and the certificates that they issue.

    `product` is named as in `data/products`. All methods refuse bad arguments with a `ValueError` that begins with
    the argument's name. A certificate's bytes depend on the arguments only.
    """

    def __init__(self, product: str) -> None:
        self.product = product
        self.line = product_line(product)
        self.ark = _load(product, "ark", self.line.ark)
        self.ask = _load(product, "ask", self.line.ask)
        self.asvk = _load(product, "asvk", self.line.asvk)

    def __repr__(self) -> str:
        return f"AmdCa(toy, {self.line.name}, ARK sha256 {self.ark.fingerprint[:16]})"

    def chain_pem(self, service: str = "vcek") -> str:
        """What the KDS serves as `cert_chain` of "vcek" or "vlek": ASK or ASVK, then ARK."""
        intermediate = next(ca for ca in (self.ask, self.asvk) if ca.facts.service == service)
        return intermediate.pem + self.ark.pem

    def crl(self, issued: datetime, next_update: datetime, revoked: Iterable[int] = ()) -> bytes:
        """DER of the ARK's revocation list; `revoked` are serial numbers, withdrawn when it is issued."""
        from snpbook.vendor.certificates import revocation_list

        return revocation_list(self.ark.facts, self.ark.key, issued, next_update, revoked)

    def issue_vcek(self, chip_id: bytes, tcb: Tcb, public_key: ec.EllipticCurvePublicKey, issued: datetime) -> bytes:
        """DER of the certificate of a chip's key at `tcb`, valid for seven years; `chip_id` as reports carry it."""
        hwid, rest = chip_id[: self.line.hwid_size], chip_id[self.line.hwid_size :]
        if len(chip_id) != HWID_SIZE or any(rest):
            tail = f", zero from byte {self.line.hwid_size} on" if self.line.hwid_size < HWID_SIZE else ""
            raise ValueError(f"chip_id: a {self.line.name} chip has {HWID_SIZE} bytes{tail}; this is {chip_id.hex()!r}")
        content = self._content(self.line.vcek_product_name, tcb, (VekExtension.HWID, hwid))
        return self._issue(self.ask, VCEK, public_key, issued, content)

    def issue_vlek(self, csp_id: str, tcb: Tcb, public_key: ec.EllipticCurvePublicKey, issued: datetime) -> bytes:
        """DER of the certificate of a cloud provider's key at `tcb`, valid for one year.

        `csp_id` reads like "CN=cc-us-east-2.amazonaws.com". That Turin's has one too is unconfirmed.
        """
        if not csp_id or not csp_id.isascii():
            raise ValueError(f"csp_id: a provider's name in ASCII, not {csp_id!r}")
        content = self._content(self.line.name, tcb, (VekExtension.CSP_ID, csp_id))
        return self._issue(self.asvk, VLEK, public_key, issued, content)

    def provision(self, chip: Chip, tcb: Tcb, issued: datetime) -> bytes:
        """DER of the chip's VCEK at any `tcb`: AMD knows the secret, so it needs neither the machine nor a request."""
        if chip.product != self.product:
            raise ValueError(f"chip: {chip} is none of {self.product}")
        self._check_tcb(tcb)
        return self.issue_vcek(chip.chip_id, tcb, chip.vcek(tcb).public_key(), issued)

    def _check_tcb(self, tcb: Tcb) -> None:
        has_fmc = VekExtension.FMC_SPL in SPL_ORDER[self.line.struct_version]
        if (tcb.fmc is not None) != has_fmc:
            raise ValueError(f"tcb: {self.line.name} has {'an' if has_fmc else 'no'} fmc component, and this is {tcb}")
        for component, value in asdict(tcb).items():
            limit = UCODE_SPL_MAX if component == "microcode" else SPL_MAX
            if value is not None and not 0 <= value <= limit:
                raise ValueError(f"tcb: {component} is {value}, outside 0 to {limit}")

    def _content(self, product_name: str, tcb: Tcb, identity: Extension) -> list[Extension]:
        """The extensions of a VEK, in emission order; the reserved patch levels are 0."""
        self._check_tcb(tcb)
        levels = {
            VekExtension.FMC_SPL: tcb.fmc or 0,
            VekExtension.BL_SPL: tcb.bootloader,
            VekExtension.TEE_SPL: tcb.tee,
            VekExtension.SNP_SPL: tcb.snp,
            VekExtension.UCODE_SPL: tcb.microcode,
        }
        version = self.line.struct_version
        return [
            (VekExtension.STRUCT_VERSION, version),
            (VekExtension.PRODUCT_NAME, product_name),
            *((oid, levels.get(oid, 0)) for oid in SPL_ORDER[version]),
            identity,
        ]

    def _issue(
        self,
        issuer: ToyAuthority,
        kind: VekKind,
        public_key: ec.EllipticCurvePublicKey,
        issued: datetime,
        content: list[Extension],
    ) -> bytes:
        # Here and not above, because loading the X.509 code costs more than starting a machine.
        from snpbook.vendor.certificates import vek_certificate

        if not isinstance(public_key.curve, ec.SECP384R1):
            raise ValueError(f"public_key: an attestation key is on secp384r1, not {public_key.curve.name}")
        if issued.tzinfo is None:
            raise ValueError(f"issued: {issued} names no time zone")
        return vek_certificate(issuer.facts, issuer.key, kind, public_key, issued, content)


def _load(product: str, role: str, facts: CaFacts) -> ToyAuthority:
    certificate = resource("data", "roots", "toy", f"toy_{product}_{role}.pem").read_text()
    pem = resource("data", "roots", "toy", f"toy_{product}_{role}.key.pem").read_bytes()
    # Checking a 4096-bit key takes 0.3 s; these are our own files, and each signature is verified when it is made.
    key = load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError(f"toy_{product}_{role}.key.pem holds no RSA key: run python -m snpbook.tools.toy_roots")
    return ToyAuthority(facts, der_from_pem(certificate), key)
