"""The rules by which a genuine report is appraised: one row of `RULES` for each option of a policy.

A judge takes what was verified and the policy, and answers whether the rule is met, what was expected, what was found.
Options and meanings follow go-sev-guest's validation, tightened where a zero digest or a masked chip would pass there.
Source: SNP ABI (guest policy, ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID

from snpbook.attest.verify import VerifiedReport
from snpbook.spec.layout import Record
from snpbook.spec.policy import PLATFORM_INFO, Tcb, guest_policy
from snpbook.spec.report import ATTESTATION_REPORT


@dataclass(frozen=True, slots=True)
class Subject:
    """What is appraised: a genuine report, the certificate table that came with it, and whose keys count.

    `authors` and `ids` are digests of trusted author and ID keys; with `author_needed` an ID key alone will not do.
    """

    verified: VerifiedReport
    table: Mapping[UUID, bytes]
    authors: frozenset[bytes] = frozenset()
    ids: frozenset[bytes] = frozenset()
    author_needed: bool = False

    @property
    def fields(self) -> Record:
        """The report's fields."""
        return self.verified.report.fields

    @property
    def author(self) -> bytes | None:
        """The digest of the author's key; None where AUTHOR_KEY_EN is 0, or the digest, which then proves nothing."""
        digest: bytes = self.fields.author_key_digest
        return digest if self.fields.author_key_en and any(digest) else None

    @property
    def id_key(self) -> bytes | None:
        """The digest of the ID key; None without an ID block."""
        digest: bytes = self.fields.id_key_digest
        return digest if any(digest) else None


Verdict = tuple[bool, object, object]
"""Whether a rule is met, what it expected, what it found."""
Judge = Callable[[Subject, Any], Verdict]
"""Takes what is appraised and the option's value."""

PERMITTED = ("smt", "migrate_ma", "debug", "cxl_allow")
"""Bits of a guest policy that weaken it: a report may have only those that are allowed."""
DEMANDED = ("single_socket", "mem_aes_256_xts", "rapl_dis", "ciphertext_hiding", "page_swap_disable")
"""Bits that strengthen it: a report must have those that are asked for."""
PLATFORM_DEMANDED = ("ecc_en", "rapl_dis", "ciphertext_hiding_en", "alias_check_complete")
"""Bits of PLATFORM_INFO that strengthen a platform; the others, known or not, must be allowed."""
NO_CHIP = "a chip that nobody tells"
NO_KEY = "none"


def _allowed(bit: str) -> Judge:
    def judge(subject: Subject, allowed: bool) -> Verdict:
        on = bool(getattr(subject.verified.report.policy, bit))
        expected = f"{bit} on or off" if allowed else f"{bit} off"
        return allowed or not on, expected, f"{bit} {'on' if on else 'off'}"

    return judge


def _guest_policy(subject: Subject, word: int) -> Verdict:
    found, wanted = subject.verified.report.policy, guest_policy(word)
    faults = [f"{bit} allowed" for bit in PERMITTED if getattr(found, bit) and not getattr(wanted, bit)]
    faults += [f"no {bit}" for bit in DEMANDED if getattr(wanted, bit) and not getattr(found, bit)]
    if (found.abi_major, found.abi_minor) < (wanted.abi_major, wanted.abi_minor):
        faults.append(f"ABI {found.abi_major}.{found.abi_minor}")
    return not faults, f"{word:#x}", "; ".join(faults) or f"{subject.fields.policy:#x}"


def _platform_info(subject: Subject, wanted: int) -> Verdict:
    found = subject.fields.platform_info
    off, on = _set_bits(wanted & ~found), _set_bits(found & ~wanted)
    faults = [f"{bit} off" for bit in PLATFORM_DEMANDED if bit in off]
    faults += [f"{bit} on" for bit in on if bit not in PLATFORM_DEMANDED]
    return not faults, f"{wanted:#x}", "; ".join(faults) or f"{found:#x}"


def _set_bits(value: int) -> list[str]:
    """The names of the bits of a PLATFORM_INFO that are set; those without one by number."""
    names = {field.first_bit: name for name, field in PLATFORM_INFO.fields.items()}
    return [names.get(bit, f"unknown bit {bit}") for bit in range(PLATFORM_INFO.size * 8) if value >> bit & 1]


def _platform_bit(bit: str) -> Judge:
    def judge(subject: Subject, _: bool) -> Verdict:
        on = bool(getattr(subject.verified.report.platform_info, bit))
        return on, f"{bit} on", f"{bit} {'on' if on else 'off'}"

    return judge


def _equal(field: str) -> Judge:
    def judge(subject: Subject, wanted: bytes | int) -> Verdict:
        if isinstance(wanted, bytes):
            wanted = wanted.ljust(ATTESTATION_REPORT.fields[field].size, b"\0")
        found = getattr(subject.fields, field)
        return found == wanted, wanted, found

    return judge


def _at_least(field: str) -> Judge:
    def judge(subject: Subject, least: int) -> Verdict:
        found = getattr(subject.fields, field)
        return found >= least, f"at least {least}", found

    return judge


def _measurements(subject: Subject, wanted: Mapping[str, bytes]) -> Verdict:
    found = subject.fields.measurement
    name = next((name for name, digest in wanted.items() if digest == found), None)
    return name is not None, " or ".join(wanted) or "nothing at all", found if name is None else name


def _allowed_chips(subject: Subject, chips: frozenset[bytes]) -> Verdict:
    chip = subject.verified.chip_id
    return chip in chips, f"one of {len(chips)} chips", chip or NO_CHIP


def _denied_chips(subject: Subject, chips: frozenset[bytes]) -> Verdict:
    chip = subject.verified.chip_id
    return chip is not None and chip not in chips, f"none of {len(chips)} chips", chip or NO_CHIP


def _minimum_tcb(field: str) -> Judge:
    def judge(subject: Subject, least: Mapping[str, int] | int) -> Verdict:
        found = subject.verified.tcb(field)
        if isinstance(least, int):
            floor = Tcb.from_int(least, turin=found.fmc is not None)
            return found.at_least(floor), f"at least {floor}", str(found)
        met = all((getattr(found, name) or 0) >= value for name, value in least.items())
        return met, "at least " + " ".join(f"{name} {value}" for name, value in least.items()), str(found)

    return judge


def _tcb_order(subject: Subject, _: bool) -> Verdict:
    names = ("reported_tcb", "committed_tcb", "current_tcb")
    reported, committed, current = map(subject.verified.tcb, names)
    met = committed.at_least(reported) and current.at_least(committed)
    return met, "reported <= committed <= current", "; ".join(map(str, (reported, committed, current)))


def _provisional(subject: Subject, permitted: bool) -> Verdict:
    """Versions compare as a whole, build last: the builds of two versions count apart."""
    fields = subject.fields
    old = fields.committed_major, fields.committed_minor, fields.committed_build
    new = fields.current_major, fields.current_minor, fields.current_build
    committed, current = subject.verified.tcb("committed_tcb"), subject.verified.tcb("current_tcb")
    found = "committed {}.{}.{} {}, current {}.{}.{} {}".format(*old, committed, *new, current)
    if permitted:
        return old <= new and current.at_least(committed), "committed not above current", found
    return (old, committed) == (new, current), "committed is current", found


def _minimum_version(subject: Subject, least: tuple[int, int]) -> Verdict:
    found = subject.fields.current_major, subject.fields.current_minor
    return found >= least, "at least {}.{}".format(*least), "{}.{}".format(*found)


def _author_key(subject: Subject, _: bool) -> Verdict:
    return subject.author is not None, "an author's key", subject.author or NO_KEY


def _id_block(subject: Subject, _: bool) -> Verdict:
    return subject.id_key is not None, "an ID block", subject.id_key or NO_KEY


def _author_keys(subject: Subject, authors: frozenset[bytes]) -> Verdict:
    met = subject.author in authors or (not subject.author_needed and subject.id_key in subject.ids)
    return met, f"one of {len(authors)} authors", subject.author or NO_KEY


def _id_keys(subject: Subject, ids: frozenset[bytes]) -> Verdict:
    met = subject.id_key in ids or subject.author in subject.authors
    return met, f"one of {len(ids)} ID keys", subject.id_key or NO_KEY


def _mitigations(field: str) -> Judge:
    def judge(subject: Subject, wanted: int) -> Verdict:
        if not subject.verified.report.has_mitigation_vectors:
            return not wanted, f"{wanted:#x}", f"none in version {subject.fields.version}"
        found = getattr(subject.fields, field)
        return found & wanted == wanted, f"{wanted:#x}", f"{found:#x}"

    return judge


def _cert_table(subject: Subject, options: Mapping[UUID, bytes | None]) -> Verdict:
    faults = []
    for identifier, digest in options.items():
        blob = subject.table.get(identifier)
        if blob is None:
            faults.append(f"no {identifier}")
        elif digest not in (None, sha256(blob).digest()):
            faults.append(f"{identifier} with sha256 {sha256(blob).hexdigest()}")
    return not faults, " ".join(map(str, options)), "; ".join(faults) or "all there"


RULES: dict[str, Judge] = {
    "allow_debug": _allowed("debug"),
    "allow_migrate_ma": _allowed("migrate_ma"),
    "guest_policy": _guest_policy,
    "minimum_guest_svn": _at_least("guest_svn"),
    "measurement": _equal("measurement"),
    "measurements": _measurements,
    **{field: _equal(field) for field in ("report_data", "host_data", "family_id", "image_id", "report_id")},
    "report_id_ma": _equal("report_id_ma"),
    "vmpl": _equal("vmpl"),
    "chip_id": _equal("chip_id"),
    "allowed_chips": _allowed_chips,
    "denied_chips": _denied_chips,
    "minimum_tcb": _minimum_tcb("reported_tcb"),
    "minimum_launch_tcb": _minimum_tcb("launch_tcb"),
    "require_tcb_order": _tcb_order,
    "permit_provisional_firmware": _provisional,
    "minimum_build": _at_least("current_build"),
    "minimum_version": _minimum_version,
    "platform_info": _platform_info,
    "require_alias_check": _platform_bit("alias_check_complete"),
    "require_ciphertext_hiding": _platform_bit("ciphertext_hiding_en"),
    "require_author_key": _author_key,
    "require_id_block": _id_block,
    "trusted_author_key_hashes": _author_keys,
    "trusted_id_key_hashes": _id_keys,
    "minimum_launch_mitigation_vector": _mitigations("launch_mit_vector"),
    "minimum_current_mitigation_vector": _mitigations("current_mit_vector"),
    "cert_table_options": _cert_table,
}
"""A judge for each option that asks something of a report, in the order of an appraisal."""
