"""Evidence without a machine: AMD knows every chip's secret, so a report and its chain are made from a recipe alone.

Report fields, product, TCB and time are free; all that is signed is signed by the toy keys that verify it. Sources:
SNP ABI (ATTESTATION_REPORT), KDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property, lru_cache
from hashlib import sha256, sha384, sha512
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.evidence.kit import Kit
from snpbook.firmware.keys import Chip, attestation_key, sign_report
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.policy import DEFAULT_POLICY, Tcb
from snpbook.spec.products import FirmwareBuild
from snpbook.spec.products import product as find_product
from snpbook.spec.report import (
    ATTESTATION_REPORT,
    ECDSA_P384_SHA384,
    FIELDS_SINCE,
    REPORT_SIZE,
    SIGNED_SIZE,
    VERSIONS,
    SigningKey,
)
from snpbook.spec.seen_firmware import SEEN_FIRMWARE
from snpbook.vendor.ca import AmdCa
from snpbook.vendor.vlek import provider_sticks

AGE, CRL_LIFETIME = timedelta(days=30), timedelta(days=30)
"""How long before the report the VEK was issued; how long the revocation list of its day is current (MODEL)."""
PROVIDER = "CN=snpbook.example"
Holder = Chip | str
"""Whose key a VEK is: a chip's, or a provider's by name."""
SIGNED_FIELDS = tuple(name for name, part in ATTESTATION_REPORT.fields.items() if part.offset < SIGNED_SIZE)
SIGNERS = {"vcek": SigningKey.VCEK, "vlek": SigningKey.VLEK}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What evidence to make: good, unless `fields` say otherwise.

    `now` is when it is judged and has a time zone. `version` and `tcb` are by default those of the product's firmware,
    and all four TCBs of the report are that one. `fields` are those of `spec.report.ATTESTATION_REPORT`. Everything
    random follows from `seed`. A `ValueError` names the argument that cannot be meant.
    """

    now: datetime
    product: str = "genoa"
    signer: str = "vcek"
    version: int | None = None
    tcb: Tcb | None = None
    guest_policy: int = DEFAULT_POLICY
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: str = "evidence"

    def __post_init__(self) -> None:
        if self.now.tzinfo is None:
            raise ValueError(f"now: {self.now} names no time zone")
        if self.signer not in SIGNERS:
            raise ValueError(f"signer: {self.signer!r} is none of {', '.join(SIGNERS)}")
        if self.version is not None and self.version not in VERSIONS:
            raise ValueError(f"version: {self.version} is none of {', '.join(map(str, VERSIONS))}")
        unknown = sorted(set(self.fields) - set(SIGNED_FIELDS))
        if unknown:
            raise ValueError(f"fields: what is signed has no {unknown[0]!r}: {', '.join(SIGNED_FIELDS)}")


class Maker:
    """Makes the parts of one recipe's evidence, again and with differences as often as a defect asks for them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.ca = _ca(recipe.product)
        self.chip = Chip.from_seed(recipe.seed, recipe.product)
        self.tcb = recipe.tcb or self.firmware.tcb
        self.is_vlek = recipe.signer == "vlek"
        self.issued = recipe.now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - AGE

    def __repr__(self) -> str:
        return f"Maker({self.ca!r}, {self.recipe.signer}, {self.tcb})"

    @property
    def firmware(self) -> FirmwareBuild:
        """What the reporting machine runs."""
        name = self.recipe.product
        build = find_product(name).firmware
        return build if build and build.report_version else SEEN_FIRMWARE[name]

    @cached_property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """The VCEK or VLEK at the TCB."""
        return _key(self._holder, self.tcb)

    @property
    def _holder(self) -> Holder:
        return PROVIDER if self.is_vlek else self.chip

    @property
    def authority(self) -> str:
        """Which of the vendor's authorities signs the VEK: "ask" or "asvk"."""
        return "asvk" if self.is_vlek else "ask"

    def report(self, **fields: Any) -> bytes:
        """The recipe's report with some fields changed, signed."""
        return self.sign(ATTESTATION_REPORT.pack(**{**self.fields, **fields}))

    def sign(self, body: bytes) -> bytes:
        """A report with those first 672 bytes, whatever they are."""
        r, s = sign_report(self.key, body[:SIGNED_SIZE])
        return (body[:SIGNED_SIZE] + r + s).ljust(REPORT_SIZE, b"\0")

    def vek(self, tcb: Tcb | None = None, chip: Chip | None = None, issued: datetime | None = None) -> bytes:
        """DER of the key's certificate; with another TCB or chip it lies."""
        product, owner = self.recipe.product, self._holder if chip is None else chip
        return _vek(product, self._holder, self.tcb, owner, tcb or self.tcb, issued or self.issued)

    def crl(self, *revoked: int, day: datetime | None = None) -> bytes:
        """DER of the ARK's revocation list of the day."""
        return _crl(self.recipe.product, day or self.issued + AGE, revoked)

    def kit(self) -> Kit:
        """The recipe's evidence."""
        intermediate = self.ca.asvk if self.is_vlek else self.ca.ask
        files = {self.vek_file: self.vek(), self.intermediate_file: intermediate.der, "ark.der": self.ca.ark.der}
        return Kit(self.report(), files, self.crl(), self.recipe.now)

    @property
    def vek_file(self) -> str:
        """The name of the VEK's file."""
        return f"{self.recipe.signer}.der"

    @property
    def intermediate_file(self) -> str:
        """The name of the file of what signed the VEK."""
        return f"{self.authority}.der"

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of the recipe's report."""
        recipe, build, seed = self.recipe, self.firmware, self.recipe.seed.encode()
        signature = find_product(recipe.product).signature
        version = recipe.version or build.report_version
        found: dict[str, Any] = {
            "version": version,
            "policy": recipe.guest_policy,
            "signature_algo": ECDSA_P384_SHA384,
            "platform_info": build.platform_info,
            "signing_key": SIGNERS[recipe.signer],
            "report_data": sha512(b"report data" + seed).digest(),
            "measurement": sha384(b"measurement" + seed).digest(),
            "host_data": sha256(b"host data" + seed).digest(),
            "report_id": sha256(b"report id" + seed).digest(),
            "report_id_ma": b"\xff" * 32,
            "chip_id": bytes(len(self.chip.chip_id)) if self.is_vlek else self.chip.chip_id,
            "cpuid_family": signature.family,
            "cpuid_model": signature.model,
            "cpuid_stepping": signature.stepping,
        }
        for prefix in ("current", "committed"):
            named = {"major": build.abi.major, "minor": build.abi.minor, "build": build.build}
            found |= {f"{prefix}_{part}": value for part, value in named.items()}
        tcbs = ("current_tcb", "committed_tcb", "reported_tcb", "launch_tcb")
        found |= dict.fromkeys(tcbs, int(self.tcb))
        return {name: value for name, value in found.items() if version >= FIELDS_SINCE.get(name, 0)} | dict(
            recipe.fields
        )


_ca = cache(AmdCa)


@lru_cache(256)
def _key(holder: Holder, tcb: Tcb) -> ec.EllipticCurvePrivateKey:
    if isinstance(holder, str):
        return attestation_key(provider_sticks(holder, tcb)[-1], VLEK_LABEL)
    return holder.vcek(tcb)


@lru_cache(256)
def _vek(product: str, holder: Holder, at: Tcb, owner: Holder, tcb: Tcb, issued: datetime) -> bytes:
    """The holder's key at a TCB, as a certificate for that owner and TCB.

    Remembered, as the list is: a signature takes a tenth of a second, and each piece of evidence has both.
    """
    key = _key(holder, at).public_key()
    if isinstance(owner, str):
        return _ca(product).issue_vlek(owner, tcb, key, issued)
    return _ca(product).issue_vcek(owner.chip_id, tcb, key, issued)


@lru_cache(256)
def _crl(product: str, day: datetime, revoked: tuple[int, ...]) -> bytes:
    return _ca(product).crl(day, day + CRL_LIFETIME, revoked)
