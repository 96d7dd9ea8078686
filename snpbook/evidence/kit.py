"""One piece of evidence as files, and what a correct verifier says of it.

The files are a report, the certificates around it, a revocation list and, where the defect lies in what is wanted, a
policy. Roots are never among them: an ARK that comes with evidence is a certificate like any other. Sources: SNP ABI
(ATTESTATION_REPORT), KDS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

from snpbook.attest.appraise import Policy, appraise, check_nonce
from snpbook.attest.bundle import Bundle
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import Check, MalformedEvidence, NotGenuine, Result
from snpbook.attest.evidence import Evidence
from snpbook.attest.roots import Roots
from snpbook.attest.verify import verify

REPORT, CERTIFICATES, CRL = "report.bin", "certs", "crl.der"
POLICY, EXPECTED = "policy.toml", "expected.json"
ROOT_SET = "toy"


class Stage(IntEnum):
    """How far evidence gets, by the exit code of `snpbook report verify`."""

    ACCEPTED = 0
    MALFORMED = 2
    NOT_GENUINE = 3
    REFUSED = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where evidence ends, and the first check that it fails, named as in `data/verifiers.toml`."""

    stage: Stage
    check: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Kit:
    """Evidence, and under what circumstances it is judged.

    `certificates` are DER by file name, `crl` is empty where there is none. `policy` holds options of
    `attest.appraise.Policy`; without any the default policy applies. `now` has a time zone; `nonce` is None where
    nobody asks.
    """

    report: bytes
    certificates: Mapping[str, bytes]
    crl: bytes
    now: datetime
    policy: Mapping[str, Any] = field(default_factory=dict)
    nonce: bytes | None = None

    def __repr__(self) -> str:
        return f"Kit({len(self.report)} bytes of report, {' '.join(self.certificates)}, judged at {self.now:%Y-%m-%d})"

    @property
    def readable(self) -> list[Certificate]:
        """The certificates that can be decoded: a directory's others are of no use to anybody."""
        found: list[Certificate] = []
        for der in self.certificates.values():
            try:
                found += Bundle.read(der).certificates
            except (MalformedEvidence, NotGenuine):
                continue
        return found

    def judge(self, roots: Roots) -> Verdict:
        """What snpbook's own verifier says of it."""
        return self.checked(roots)[0]

    def checked(self, roots: Roots) -> tuple[Verdict, tuple[Check, ...]]:
        """The same with every check that was made; all rules of the policy are, even where one fails."""
        try:
            evidence = Evidence.read(self.report)
            beside = (*evidence.certificates, *evidence.crls, *([self.crl] if self.crl else []))
            bundles = [Bundle.read(data) for data in beside]
            certificates = [*self.readable, *(each for bundle in bundles for each in bundle.certificates)]
            crls = [each for bundle in bundles for each in bundle.crls]
            verified = verify(evidence.report, certificates, roots, self.now, crls=crls)
        except MalformedEvidence:
            return Verdict(Stage.MALFORMED), ()
        except NotGenuine as refusal:
            return Verdict(Stage.NOT_GENUINE, refusal.check), refusal.checks
        wanted = list(appraise(verified, Policy(**self.policy), evidence.table).checks)
        wanted += [check_nonce(verified, self.nonce)] if self.nonce is not None else []
        failed = [check.name for check in wanted if check.result is Result.FAILED]
        verdict = Verdict(Stage.REFUSED, failed[0]) if failed else Verdict(Stage.ACCEPTED)
        return verdict, (*verified.checks, *wanted)

    def files(self, defect: str | None, expected: Verdict) -> dict[str, bytes]:
        """What a directory of evidence holds, by path; the paths have forward slashes."""
        found = {REPORT: self.report}
        found |= {f"{CERTIFICATES}/{name}": der for name, der in self.certificates.items()}
        found |= {CRL: self.crl} if self.crl else {}
        found |= {POLICY: _toml(self.policy).encode()} if self.policy else {}
        told = {
            "defect": defect,
            "exit": int(expected.stage),
            "failing_check": expected.check,
            "roots": ROOT_SET,
            "now": self.now.isoformat(),
            "nonce": self.nonce.hex() if self.nonce is not None else None,
            "policy": POLICY if self.policy else "default",
            "arguments": self._arguments(),
        }
        return found | {EXPECTED: (json.dumps(told, indent=2) + "\n").encode()}

    def _arguments(self) -> list[str]:
        """What follows `snpbook report verify` in that directory."""
        told = [REPORT, "--roots", ROOT_SET, "--now", self.now.isoformat(), "--certs", CERTIFICATES]
        told += ["--certs", CRL] if self.crl else []
        told += ["--policy", POLICY] if self.policy else []
        return told + (["--nonce", self.nonce.hex()] if self.nonce is not None else [])


def _toml(options: Mapping[str, Any]) -> str:
    """A line an option; text, numbers, truth values and lists are written in TOML as in JSON."""
    return "".join(f"{name} = {_value(value)}\n" for name, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(name)} = {_value(each)}" for name, each in value.items()) + " }"
    return json.dumps(value)
