"""A service of an SVSM, bound to a report: what the software at VMPL0 says of its vTPM, and who vouches for it.

The report is the SVSM's own where it is of VMPL0: a guest at VMPL2 cannot have one made. Its REPORT_DATA is the SHA-512
of the nonce and the manifest, so that the manifest is as genuine as the report. Whether that SVSM is the wanted one,
its measurement says (`attest.appraise`). Source: Secure VM Service Module for SEV-SNP Guests (58019), chapter 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256, sha512
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers

from snpbook.attest.checks import Check, Checklist
from snpbook.attest.verify import VerifiedReport
from snpbook.spec.svsm import MANIFEST_ENTRY, MANIFEST_HEADER, NONCE_SIZE, SERVICES_MANIFEST, VTPM_SERVICE
from snpbook.spec.tpm import ALG_SHA256, EK_BITS, EK_EXPONENT, ek_modulus

SVSM = "SVSM attestation protocol"


@dataclass(frozen=True, slots=True, repr=False)
class BoundKey:
    """The endorsement key of a vTPM that a genuine report vouches for. Only `bound_endorsement_key` makes one."""

    report: VerifiedReport
    public: bytes
    """TPMT_PUBLIC, as the vTPM shows it."""
    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<BoundKey RSA-{EK_BITS} {self.name.hex()[:16]}.., {self.report!r}>"

    @property
    def name(self) -> bytes:
        """The key's name by TPM rules: its algorithm and the hash of its public area."""
        return ALG_SHA256.to_bytes(2, "big") + sha256(self.public).digest()

    @property
    def key(self) -> RSAPublicKey:
        return RSAPublicNumbers(EK_EXPONENT, ek_modulus(self.public)).public_key()


def bound_endorsement_key(report: VerifiedReport, manifest: bytes, nonce: bytes) -> BoundKey:
    """The vTPM's key out of a manifest: of that service alone, or of all services.

    `nonce` is what the relying party chose, and `manifest` what came with the report. Raises `NotGenuine` at the first
    check that fails.
    """
    checks = Checklist()
    vmpl = report.report.fields.vmpl
    checks.require("svsm.vmpl", vmpl == 0, "the report is none of the software at VMPL0", 0, vmpl, SVSM)
    size = len(nonce)
    checks.require("svsm.nonce", size == NONCE_SIZE, "a nonce of another size binds nothing", NONCE_SIZE, size, SVSM)
    expected, found = sha512(nonce + manifest).digest(), report.report.fields.report_data
    rule = "REPORT_DATA binds another nonce or manifest"
    checks.require("svsm.report_data", expected == found, rule, expected.hex(), found.hex(), SVSM)
    public = _vtpm_manifest(manifest, checks)
    try:
        modulus = ek_modulus(public)
        form = modulus.bit_length() == EK_BITS and modulus % 2 == 1
        what = f"a modulus of {modulus.bit_length()} bits"
    except ValueError as error:
        form, what = False, str(error)
    rule = "the manifest is no endorsement key"
    checks.require("svsm.manifest", form, rule, f"TPMT_PUBLIC, RSA-{EK_BITS}, template L-1", what, SVSM)
    return BoundKey(report, public, tuple(checks.made))


def _vtpm_manifest(manifest: bytes, checks: Checklist) -> bytes:
    """What the vTPM says of itself, alone or in the manifest of all services."""
    if not manifest.startswith(SERVICES_MANIFEST.bytes_le):
        return manifest
    rule = "the table of services does not describe its manifest"
    whole = len(manifest) >= MANIFEST_HEADER.size
    head = MANIFEST_HEADER.unpack(manifest.ljust(MANIFEST_HEADER.size, b"\0"))
    end = MANIFEST_HEADER.size + head.count * MANIFEST_ENTRY.size
    good = whole and head.size == len(manifest) >= end
    checks.require("svsm.services", good, rule, f"{head.size} bytes, {head.count} services", len(manifest), SVSM)
    entries = [MANIFEST_ENTRY.unpack(manifest, at) for at in range(MANIFEST_HEADER.size, end, MANIFEST_ENTRY.size)]
    said = {UUID(bytes_le=e.guid): manifest[e.offset : e.offset + e.size] for e in entries}
    inside = all(end <= e.offset <= e.offset + e.size <= len(manifest) for e in entries) and len(said) == len(entries)
    checks.require("svsm.entries", inside, rule, f"data from {end} on, each service once", entries, SVSM)
    services = ", ".join(map(str, said))
    checks.require("svsm.vtpm", VTPM_SERVICE in said, "the manifest lists no vTPM", VTPM_SERVICE, services, SVSM)
    return said[VTPM_SERVICE]
