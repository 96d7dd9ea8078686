"""Many reports: each verified and appraised as one would be, with what hangs above thousands of them read once.

The work is handed out in batches to whatever executor the caller brings, and comes back in order. Everything that
crosses is bytes and values, so that another process or machine can do it. Source: SNP ABI (ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

from snpbook.attest.appraise import Policy, appraise
from snpbook.attest.bundle import Bundle
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.evidence import Evidence
from snpbook.attest.roots import Roots
from snpbook.attest.verify import verify

BATCH = 100
"""Reports that are handed out at once."""
ACCEPTED, MALFORMED, NOT_GENUINE, REFUSED = "accepted", "malformed", "not genuine", "refused by policy"
VERDICTS = (MALFORMED, NOT_GENUINE, REFUSED, ACCEPTED)
"""From the worst on: the lower the stage at which evidence ends."""


class Executor(Protocol):
    """What of a `concurrent.futures.Executor` is used."""

    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any]) -> Iterator[Any]:
        """The results in order."""
        ...


@dataclass(frozen=True, slots=True)
class FleetItem:
    """A report as it came, its own certificate files, and those of all: of these, what cannot be decoded is left out.

    `unreadable` says why there are no bytes, where that is so.
    """

    name: str
    report: bytes
    certificates: tuple[bytes, ...] = ()
    shared: tuple[bytes, ...] = ()
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class FleetVerdict:
    """What became of one: one of `VERDICTS`, the check that failed first and why, and whose report it is."""

    name: str
    verdict: str
    check: str = ""
    reason: str = ""
    product: str = ""
    chip: str = ""
    measurement: str = ""


def verify_fleet(
    items: Iterable[FleetItem], roots: Roots, now: datetime, policy: Policy | None, executor: Executor
) -> Iterator[FleetVerdict]:
    """Judge every item, in order; without a policy for genuineness only. `now` has a time zone."""
    judge = partial(judge_batch, roots=roots, now=now, policy=policy)
    for verdicts in executor.map(judge, list(_batches(items))):
        yield from verdicts


def judge_batch(items: Sequence[FleetItem], roots: Roots, now: datetime, policy: Policy | None) -> list[FleetVerdict]:
    """One batch, wherever it is done."""
    return [_judge(item, roots, now, policy) for item in items]


def _batches(items: Iterable[FleetItem]) -> Iterator[list[FleetItem]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _judge(item: FleetItem, roots: Roots, now: datetime, policy: Policy | None) -> FleetVerdict:
    try:
        if item.unreadable:
            raise MalformedEvidence(item.unreadable)
        evidence = Evidence.read(item.report)
        bundles = [_read(blob) for blob in (*item.certificates, *evidence.certificates, *evidence.crls)]
        bundles += [_read_if_possible(blob) for blob in item.shared]
        certificates = [each for bundle in bundles for each in bundle.certificates]
        crls = [each for bundle in bundles for each in bundle.crls]
        verified = verify(evidence.report, certificates, roots, now, crls=crls)
    except MalformedEvidence as error:
        return FleetVerdict(item.name, MALFORMED, reason=str(error))
    except NotGenuine as refusal:
        return FleetVerdict(item.name, NOT_GENUINE, refusal.check, str(refusal))
    failed = appraise(verified, policy, evidence.table).failed if policy else ()
    return FleetVerdict(
        item.name,
        REFUSED if failed else ACCEPTED,
        failed[0].name if failed else "",
        f"policy {policy.name}: {', '.join(check.name for check in failed)}" if policy and failed else "",
        verified.product,
        verified.chip_id.hex() if verified.chip_id else "",
        verified.report.fields.measurement.hex(),
    )


@lru_cache(maxsize=4096)
def _read(blob: bytes) -> Bundle:
    """Remembered by content: the files above a chip's reports are the same each time."""
    return Bundle.read(blob)


@lru_cache(maxsize=4096)
def _read_if_possible(blob: bytes) -> Bundle:
    try:
        return Bundle.read(blob)
    except (MalformedEvidence, NotGenuine):
        return Bundle()
