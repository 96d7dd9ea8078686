"""Do I want it? A genuine report held against a policy; every rule is judged, not only the first that fails.

What each option asks is a row of `snpbook.attest.rules.RULES`, how its value may be written one of `OPTIONS`. A policy
is Python or TOML, with the same names. Source: SNP ABI (guest policy, ATTESTATION_REPORT).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from uuid import UUID

from snpbook.attest import options as read
from snpbook.attest.checks import Check, Result
from snpbook.attest.parse import SNP
from snpbook.attest.rules import RULES, Subject
from snpbook.attest.verify import VerifiedReport
from snpbook.spec.launch import DIGEST_SIZE
from snpbook.spec.policy import PLATFORM_INFO, POLICY, Tcb, guest_policy
from snpbook.spec.report import ATTESTATION_REPORT, REPORT_DATA_SIZE

_digest = read.exactly(DIGEST_SIZE)
OPTIONS: Mapping[str, read.Read] = {
    "allow_debug": read.flag,
    "allow_migrate_ma": read.flag,
    "guest_policy": read.word(POLICY),
    "minimum_guest_svn": read.whole(32),
    "measurement": _digest,
    "measurements": read.measurements,
    "report_data": read.padded("report_data"),
    **{
        field: read.exactly(ATTESTATION_REPORT.fields[field].size)
        for field in ("host_data", "family_id", "image_id", "report_id", "report_id_ma")
    },
    "vmpl": read.whole(2),
    "chip_id": read.chip,
    "allowed_chips": read.each(read.chip),
    "denied_chips": read.each(read.chip),
    "minimum_tcb": read.tcb,
    "minimum_launch_tcb": read.tcb,
    "require_tcb_order": read.asked,
    "permit_provisional_firmware": read.flag,
    "minimum_build": read.whole(8),
    "minimum_version": read.version,
    "platform_info": read.word(PLATFORM_INFO),
    "require_alias_check": read.asked,
    "require_ciphertext_hiding": read.asked,
    "require_author_key": read.asked,
    "require_id_block": read.asked,
    "trusted_author_keys": read.each(read.public_key_digest),
    "trusted_author_key_hashes": read.each(_digest),
    "trusted_id_keys": read.each(read.public_key_digest),
    "trusted_id_key_hashes": read.each(_digest),
    "minimum_launch_mitigation_vector": read.whole(64),
    "minimum_current_mitigation_vector": read.whole(64),
    "cert_table_options": read.table_options,
}
"""How the value of each option is read, from TOML and from Python alike."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party wants of a report; an option that is None is not asked for.

    Bytes may be given as hexadecimal text, a TCB as `Tcb`, table or number, keys as PEM. `ValueError` names the option
    whose value cannot be meant. Debugging and migration agents are refused unless an option, `guest_policy` among them,
    allows them. `guest_policy` and `platform_info` bound the words of the report: of what weakens a guest it may have
    no more, of what strengthens it no less. `report_data` is 1 to 64 bytes, zeros behind. A trusted author vouches for
    any ID key; digests of zeros are never trusted. `cert_table_options` maps entries of the evidence's table (a GUID,
    or vcek, vlek, ask, ark, crl) to "require" or to their SHA-256.
    """

    name: str = "own"
    allow_debug: bool | None = None
    allow_migrate_ma: bool | None = None
    guest_policy: int | Mapping[str, int] | None = None
    minimum_guest_svn: int | None = None
    measurement: bytes | str | None = None
    measurements: Mapping[str, bytes | str] | None = None
    report_data: bytes | str | None = None
    host_data: bytes | str | None = None
    family_id: bytes | str | None = None
    image_id: bytes | str | None = None
    report_id: bytes | str | None = None
    report_id_ma: bytes | str | None = None
    vmpl: int | None = None
    chip_id: bytes | str | None = None
    allowed_chips: Iterable[bytes | str] | None = None
    denied_chips: Iterable[bytes | str] | None = None
    minimum_tcb: Tcb | Mapping[str, int] | int | None = None
    minimum_launch_tcb: Tcb | Mapping[str, int] | int | None = None
    require_tcb_order: bool | None = None
    permit_provisional_firmware: bool | None = None
    minimum_build: int | None = None
    minimum_version: tuple[int, int] | str | int | None = None
    platform_info: int | Mapping[str, int] | None = None
    require_alias_check: bool | None = None
    require_ciphertext_hiding: bool | None = None
    require_author_key: bool | None = None
    require_id_block: bool | None = None
    trusted_author_keys: Iterable[bytes | str] | None = None
    trusted_author_key_hashes: Iterable[bytes | str] | None = None
    trusted_id_keys: Iterable[bytes | str] | None = None
    trusted_id_key_hashes: Iterable[bytes | str] | None = None
    minimum_launch_mitigation_vector: int | None = None
    minimum_current_mitigation_vector: int | None = None
    cert_table_options: Mapping[str, bytes | str] | None = None

    def __post_init__(self) -> None:
        for option, read_value in OPTIONS.items():
            value = getattr(self, option)
            if value is not None:
                try:
                    object.__setattr__(self, option, read_value(value))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{option}: {error}") from error
        for kind in ("author", "id"):
            keys, option = getattr(self, f"trusted_{kind}_keys"), f"trusted_{kind}_key_hashes"
            if keys is not None:
                object.__setattr__(self, option, keys | (getattr(self, option) or frozenset()))
        for bit in ("debug", "migrate_ma"):
            if getattr(self, f"allow_{bit}") is None:
                wanted = guest_policy(self.guest_policy) if isinstance(self.guest_policy, int) else None
                object.__setattr__(self, f"allow_{bit}", bool(wanted and getattr(wanted, bit)))

    @property
    def trusted_authors(self) -> frozenset[bytes]:
        """Digests of the author keys that are trusted, of keys and hashes together."""
        return frozenset(digest for digest in self.trusted_author_key_hashes or () if isinstance(digest, bytes))

    @property
    def trusted_ids(self) -> frozenset[bytes]:
        """Digests of the ID keys that are trusted, of keys and hashes together."""
        return frozenset(digest for digest in self.trusted_id_key_hashes or () if isinstance(digest, bytes))

    @classmethod
    def from_toml(cls, text: str, name: str = "own") -> Policy:
        """The policy of a TOML document, called `name` unless it names itself; `ValueError` says what is wrong."""
        document: dict[str, Any] = {"name": name, **tomllib.loads(text)}
        unknown = sorted(set(document) - {option.name for option in fields(cls)})
        if unknown:
            raise ValueError(f"no option {unknown[0]!r}: one of {', '.join(OPTIONS)}")
        if not isinstance(document["name"], str):
            raise ValueError(f"name: takes text, not {document['name']!r}")
        return cls(**document)


DEFAULT_POLICY = Policy("default")
"""What applies where nobody says otherwise: no debugging, no migration agent, and nothing else."""


@dataclass(frozen=True, slots=True, repr=False)
class Appraisal:
    """The judgement on one report: a check per rule, skipped where the policy does not ask."""

    policy: str
    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<Appraisal by policy {self.policy}: {'accepted' if self.accepted else 'refused'}>"

    @property
    def failed(self) -> tuple[Check, ...]:
        """The rules that the report does not meet."""
        return tuple(check for check in self.checks if check.result is Result.FAILED)

    @property
    def accepted(self) -> bool:
        """No rule failed."""
        return not self.failed


def appraise(
    verified: VerifiedReport, policy: Policy = DEFAULT_POLICY, table: Mapping[UUID, bytes] | None = None
) -> Appraisal:
    """Judge a genuine report by every rule of a policy; `table` is the certificate table that came with it."""
    subject = Subject(
        verified,
        table or {},
        policy.trusted_authors,
        policy.trusted_ids,
        bool(policy.require_author_key),
    )
    return Appraisal(policy.name, tuple(_apply(option, subject, policy) for option in RULES))


def check_nonce(verified: VerifiedReport, nonce: bytes) -> Check:
    """Whether REPORT_DATA is the nonce (1 to 64 bytes) with zeros behind it."""
    if not 1 <= len(nonce) <= REPORT_DATA_SIZE:
        raise ValueError(f"a nonce of {len(nonce)} bytes: it has 1 to {REPORT_DATA_SIZE}")
    expected, found = nonce.ljust(REPORT_DATA_SIZE, b"\0"), verified.report.fields.report_data
    return Check("nonce", Result.PASSED if found == expected else Result.FAILED, expected, found, SNP)


def _apply(option: str, subject: Subject, policy: Policy) -> Check:
    wanted = getattr(policy, option)
    if wanted is None:
        return Check(f"policy.{option}", Result.SKIPPED, cite=SNP)
    met, expected, found = RULES[option](subject, wanted)
    return Check(f"policy.{option}", Result.PASSED if met else Result.FAILED, expected, found, SNP)
