"""`snpbook report`: read an attestation report, of this model or of a real machine, and say whether to believe it.

`show` decodes and believes nothing; `verify` asks whether the report is genuine, and then whether it is wanted. Exit
codes are those of `snpbook.cli.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path

import click

from snpbook.attest import verify as attest
from snpbook.attest.appraise import DEFAULT_POLICY, appraise
from snpbook.attest.certs import Certificate, load_certificates
from snpbook.attest.chain import MissingCertificate
from snpbook.attest.checks import Check, MalformedEvidence, NotGenuine, Result
from snpbook.attest.parse import Evidence, Report
from snpbook.attest.roots import ROOT_SETS, Roots, named_roots, own_roots
from snpbook.cli import errors
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.layout import Record
from snpbook.spec.policy import PLATFORM_INFO
from snpbook.spec.report import ATTESTATION_REPORT

CERTS_VARIABLE = "SNPBOOK_CERTS"
SUFFIXES = {".pem", ".der", ".crt", ".cer"}
"""Which files of a directory may hold certificates."""
COLOURS = {Result.PASSED: "green", Result.FAILED: "red", Result.SKIPPED: "yellow"}
TOY_NOTE = "toy: keys that everybody knows, no proof of a real machine"
FORM = "Give a report as bytes or hexadecimal text, alone or with the certificate table of an extended request."


class Time(click.ParamType[datetime]):
    """A click type: a moment in ISO 8601, in UTC where it names no other zone."""

    name = "time"

    def convert(self, value: str | datetime, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The moment; a usage error where the text is none."""
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: write it as 2026-05-31 or 2026-05-31T12:00:00Z", param, ctx)
        return moment.replace(tzinfo=moment.tzinfo or UTC)


@click.group(no_args_is_help=False)
def report() -> None:
    """Read, verify and appraise attestation reports."""


@report.command
@click.argument("file")
def show(file: str) -> None:
    """Decode the report in FILE; nothing is verified.

    FILE holds a report as bytes or as hexadecimal text, alone or with the certificate table of an extended request.
    """
    evidence, parsed = _read(file)
    product = parsed.product or "not named by the report"
    stray = " ".join(f"{offset:#05x}" for offset in ATTESTATION_REPORT.reserved_set(parsed.raw)) or "none"
    rows = [*_fields(parsed), ("product", product), ("reserved bytes set", stray)]
    rows.append(("certificates", f"{len(evidence.certificates)} in the report's own table"))
    for name, value in rows:
        click.echo(f"{name:20} {value}")


@report.command
@click.argument("file")
@click.option("--certs", multiple=True, metavar="FILE|DIR", help="Certificates, DER or PEM; may be given repeatedly.")
@click.option("--roots", "root_set", default="amd", show_default=True, metavar="amd|toy|FILE", help="Whom to trust.")
@click.option(
    "--product", type=click.Choice(list(PRODUCT_LINES), case_sensitive=False), help="Insist on this product line."
)
@click.option("--now", type=Time(), metavar="ISO8601", help="Judge as of this time (default: the clock).")
def verify(file: str, certs: tuple[str, ...], root_set: str, product: str | None, now: datetime | None) -> None:
    """Verify the report in FILE, then hold it against the built-in policy: debug off, nothing else.

    Certificates come from --certs, from the report's own certificate table, and from the directory that the
    environment variable SNPBOOK_CERTS names. Roots are pinned by fingerprint, AMD's by default; those of a FILE are
    its self-issued certificates. Exit code 0 means accepted, 3 not genuine, 4 genuine but refused by the policy.
    """
    evidence, _ = _read(file)
    roots = _roots(root_set)
    certificates = [*_table(file, evidence), *_certificates(certs)]
    click.echo(f"{'roots':9} {TOY_NOTE if roots.name == 'toy' else roots.name}")
    try:
        verified = attest.verify(evidence.report, certificates, roots, now or datetime.now(UTC), product)
    except NotGenuine as refusal:
        _print_checks(refusal.checks)
        click.echo("verdict   not genuine")
        raise errors.NotGenuine(f"{file}: not genuine: {refusal}", _remedy(refusal, roots)) from refusal
    appraisal = appraise(verified, DEFAULT_POLICY)
    _print_checks(verified.checks)
    click.echo(f"{'product':9} {verified.product}")
    click.echo(f"{'policy':9} {appraisal.policy}: debug off, nothing else")
    _print_checks(appraisal.checks)
    if not appraisal.accepted:
        click.echo("verdict   genuine, refused by policy")
        failed = ", ".join(
            f"{check.name} (expected {check.expected}, found {check.found})" for check in appraisal.failed
        )
        raise errors.RefusedByPolicy(f"{file}: genuine, but refused by policy {appraisal.policy}: {failed}")
    click.echo("verdict   accepted")


def _read(file: str) -> tuple[Evidence, Report]:
    try:
        evidence = Evidence.read(errors.read_input(file))
        return evidence, Report.parse(evidence.report)
    except MalformedEvidence as error:
        raise errors.Malformed(f"{file}: {error}", FORM) from error


def _load(source: str | Path, data: bytes) -> list[Certificate]:
    try:
        return load_certificates(data)
    except MalformedEvidence as error:
        raise errors.Malformed(
            f"{source}: {error}", "Give certificates as DER, or as PEM with BEGIN CERTIFICATE."
        ) from error
    except NotGenuine as refusal:
        raise errors.NotGenuine(f"{source}: {refusal}", "Fetch the certificate again from where it comes.") from refusal


def _table(file: str, evidence: Evidence) -> Iterator[Certificate]:
    for der in evidence.certificates:
        yield from _load(f"{file}: its certificate table", der)


def _certificates(paths: Iterable[str]) -> Iterator[Certificate]:
    """What the paths hold; in a directory, a file that is no certificate is named and left out."""
    configured = os.environ.get(CERTS_VARIABLE)
    if configured and not Path(configured).is_dir():
        raise errors.Malformed(
            f"{configured}: no directory", f"Mend or unset the environment variable {CERTS_VARIABLE}."
        )
    for path in map(Path, [*paths, *([configured] if configured else [])]):
        if not path.is_dir():
            yield from _load(path, errors.read_input(path))
            continue
        for member in sorted(path.iterdir()):
            if member.suffix in SUFFIXES and member.is_file():
                try:
                    yield from load_certificates(errors.read_input(member))
                except (MalformedEvidence, NotGenuine) as error:
                    click.echo(f"left out  {member}: {error}")


def _roots(root_set: str) -> Roots:
    if root_set in ROOT_SETS:
        return named_roots(root_set)
    if not Path(root_set).is_file():
        raise errors.Malformed(
            f"{root_set}: no such root set or file", f"Name {', '.join(ROOT_SETS)} or a file with an ARK."
        )
    try:
        return own_roots(root_set, _load(root_set, errors.read_input(root_set)))
    except MalformedEvidence as error:
        raise errors.Malformed(f"{root_set}: {error}", f"Name {', '.join(ROOT_SETS)} or a file with an ARK.") from error


def _remedy(refusal: NotGenuine, roots: Roots) -> str:
    if isinstance(refusal, MissingCertificate):
        if refusal.url:
            return f"Add it with --certs; AMD publishes it at {refusal.url}"
        return "Add it with --certs; a VLEK, and the VCEK of a chip that hides its id, has the cloud provider."
    if refusal.check == "chain.root":
        return (
            f"Trusted are the roots of {roots.name}; name others with --roots if you know where this report comes from."
        )
    return f"The check {refusal.check} failed: do not trust this report."


def _print_checks(checks: Iterable[Check]) -> None:
    for check in checks:
        found = _text(check.found)
        if check.result is Result.FAILED and check.expected != "":
            found += f" (expected {_text(check.expected)})"
        click.echo(f"  {click.style(f'{check.result:8}', fg=COLOURS[check.result])} {check.name:32} {found}")


def _fields(parsed: Report) -> Iterator[tuple[str, str]]:
    for name, value in parsed.fields:
        if name.endswith("_tcb"):
            yield name, f"{value:#018x}  {parsed.tcb(name, parsed.product)}"
        elif name == "policy":
            yield name, f"{value:#x}  {_flags(parsed.policy)}"
        elif name == "platform_info":
            yield name, f"{value:#x}  {_flags(PLATFORM_INFO.unpack(value.to_bytes(PLATFORM_INFO.size, 'little')))}"
        else:
            yield name, value.name if isinstance(value, IntEnum) else _text(value)


def _flags(record: Record) -> str:
    return " ".join(name if value == 1 else f"{name}={value}" for name, value in record if value)


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
