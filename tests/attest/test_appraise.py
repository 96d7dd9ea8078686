"""Do I want it? Every rule is judged, the default policy asks for no debugging and nothing else."""

import pytest

from snpbook.attest.appraise import DEFAULT_POLICY, RULES, Policy, appraise
from snpbook.attest.checks import Result
from snpbook.attest.verify import VerifiedReport, verify
from tests.attest.own_chain import OwnChain
from tests.attest.vectors import NOW

CHAIN = OwnChain()
DEBUG = 1 << 19


def genuine(**fields: object) -> VerifiedReport:
    return verify(CHAIN.report(**fields), CHAIN.certificates, CHAIN.roots, NOW)


def verdicts(verified: VerifiedReport, policy: Policy) -> dict[str, str]:
    return {check.name.removeprefix("policy."): str(check.result) for check in appraise(verified, policy).checks}


def test_the_default_policy() -> None:
    appraisal = appraise(genuine())
    assert appraisal.accepted
    assert repr(appraisal) == "<Appraisal by policy default: accepted>"
    refused = appraise(genuine(policy=0x30000 | DEBUG))
    assert [check.name for check in refused.failed] == ["policy.allow_debug"]
    assert appraise(genuine(policy=0x30000 | DEBUG), Policy(allow_debug=True)).accepted
    assert verdicts(genuine(), DEFAULT_POLICY) == {
        "allow_debug": "passed", "measurement": "skipped", "report_data": "skipped",
    }  # fmt: skip


def test_every_rule_is_judged() -> None:
    verified = genuine(policy=0x30000 | DEBUG, measurement=b"m" * 48, report_data=b"nonce".ljust(64, b"\0"))
    wanted = Policy("strict", measurement=b"m" * 48, report_data=b"nonce")
    assert verdicts(verified, wanted) == {"allow_debug": "failed", "measurement": "passed", "report_data": "passed"}
    other = Policy("strict", measurement=b"x" * 48, report_data=b"nonc")
    appraisal = appraise(verified, other)
    assert verdicts(verified, other) == dict.fromkeys(RULES, "failed")
    check = appraisal.checks[1]
    assert (check.result, check.expected, check.found) == (Result.FAILED, b"x" * 48, b"m" * 48)
    assert not appraisal.accepted


@pytest.mark.parametrize("options", [{"measurement": b"m" * 47}, {"measurement": b""}, {"report_data": b"n" * 65}])
def test_an_option_of_the_wrong_size_is_refused(options: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Policy(**options)  # type: ignore[arg-type]
