"""Do I want it? A genuine report held against a policy; every rule is judged, not only the first that fails.

A rule is one row of `RULES`: the policy's option, and how a report is judged by it. Source: SNP ABI (guest policy,
ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snpbook.attest.checks import Check, Result
from snpbook.attest.parse import SNP, Report
from snpbook.attest.verify import VerifiedReport
from snpbook.spec.report import ATTESTATION_REPORT

Judge = Callable[[Report, Any], tuple[bool, object, object]]
"""Takes a report and the option's value, gives (met, expected, found)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party wants of a report; an option that is None is not asked for.

    `measurement` is the launch digest (48 bytes). `report_data` is what the guest put in, such as a nonce: up to 64
    bytes, zeros behind. `ValueError` names an option of the wrong size.
    """

    name: str = "own"
    allow_debug: bool = False
    measurement: bytes | None = None
    report_data: bytes | None = None

    def __post_init__(self) -> None:
        for option, sizes in (("measurement", range(48, 49)), ("report_data", range(65))):
            value = getattr(self, option)
            if value is not None and len(value) not in sizes:
                raise ValueError(f"{option} of {len(value)} bytes: it takes {sizes.stop - 1}")


DEFAULT_POLICY = Policy("default")
"""What applies where nobody says otherwise: no debugging, and nothing else."""


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


def appraise(verified: VerifiedReport, policy: Policy = DEFAULT_POLICY) -> Appraisal:
    """Judge a genuine report by every rule of a policy."""
    return Appraisal(policy.name, tuple(_apply(option, verified.report, policy) for option in RULES))


def _apply(option: str, report: Report, policy: Policy) -> Check:
    wanted = getattr(policy, option)
    if wanted is None:
        return Check(f"policy.{option}", Result.SKIPPED, cite=SNP)
    met, expected, found = RULES[option](report, wanted)
    return Check(f"policy.{option}", Result.PASSED if met else Result.FAILED, expected, found, SNP)


def _debug(report: Report, allowed: bool) -> tuple[bool, object, object]:
    on = bool(report.policy.debug)
    return allowed or not on, "debug on or off" if allowed else "debug off", "debug on" if on else "debug off"


def _equals(field: str) -> Judge:
    def judge(report: Report, wanted: bytes) -> tuple[bool, object, object]:
        expected = wanted.ljust(ATTESTATION_REPORT.fields[field].size, b"\0")
        found = getattr(report.fields, field)
        return found == expected, expected, found

    return judge


RULES: dict[str, Judge] = {
    "allow_debug": _debug,
    "measurement": _equals("measurement"),
    "report_data": _equals("report_data"),
}
