"""Which check refuses a piece of evidence, and that everything about the refusal is told."""

from collections.abc import Sequence
from datetime import datetime

import pytest

from snpbook.attest.certs import Certificate
from snpbook.attest.checks import NotGenuine, Result
from snpbook.attest.crl import RevocationList
from snpbook.attest.roots import Roots
from snpbook.attest.verify import verify
from tests.attest.own_chain import OwnChain
from tests.attest.vectors import NOW

GOOD = OwnChain()


def failed_check(
    report: bytes,
    certificates: Sequence[Certificate],
    roots: Roots,
    product: str | None = None,
    now: datetime = NOW,
    crls: Sequence[RevocationList] = (),
) -> str:
    """The name of the check that fails."""
    with pytest.raises(NotGenuine) as refusal:
        verify(report, certificates, roots, now, product, crls=crls)
    assert refusal.value.checks[-1].name == refusal.value.check
    assert refusal.value.checks[-1].result is Result.FAILED
    assert [check for check in refusal.value.checks[:-1] if check.result is Result.FAILED] == []
    assert refusal.value.rule
    assert refusal.value.cite
    return refusal.value.check


def judged(chain: OwnChain, **fields: object) -> str:
    """The check at which our chain fails over a report with those fields, although its own root is trusted."""
    return failed_check(chain.report(**fields), chain.certificates, chain.roots)
