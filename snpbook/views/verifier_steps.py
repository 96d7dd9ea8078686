"""A verifier's steps as lights: each passed, failed, skipped or not reached, with the check that decided.

The steps are those of `attest.verify` in their order, then the policy, then the nonce.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snpbook.attest.checks import Check, Result
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.views.values import show

STEPS = ("format", "chain", "signing key", "signature", "binding", "policy", "nonce")
_BY_PREFIX = {
    "report.signature_algo": "format", "report.signature": "signature", "report.product": "chain", "report.": "format",
    "certificates.": "chain", "chain.": "chain", "vek.": "signing key", "binding.": "binding", "policy.": "policy",
    "nonce": "nonce",
}  # fmt: skip


def step_of(check: str) -> str:
    """The step that a check belongs to."""
    return next(step for prefix, step in _BY_PREFIX.items() if check.startswith(prefix))


def verifier_steps(checks: Iterable[Check], verdict: str) -> Static:
    """A row a step, and the verdict below."""
    by_step: dict[str, list[Check]] = {step: [] for step in STEPS}
    for check in checks:
        by_step[step_of(check.name)].append(check)
    rows = [(step, *_light(made)) for step, made in by_step.items()]
    return table("The verifier's steps", ["step", "light", "checks"], rows, note=f"Verdict: {verdict}")


def _light(made: Sequence[Check]) -> tuple[str, str]:
    failed = [check for check in made if check.result is Result.FAILED]
    passed = sum(check.result is Result.PASSED for check in made)
    if failed:
        first = failed[0]
        return mark(
            Result.FAILED, "failed"
        ), f"{first.name}: expected {show(first.expected)}, found {show(first.found)}"
    if passed:
        return mark(Result.PASSED, "passed"), f"{passed} passed"
    return mark(Result.SKIPPED, "not reached" if not made else "skipped"), ""
