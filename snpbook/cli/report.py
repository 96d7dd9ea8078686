"""`snpbook report`: read an attestation report, of this model or of a real machine, and say whether to believe it.

`show` decodes and believes nothing; `verify` asks whether the report is genuine, and then whether it is wanted. Exit
codes are those of `snpbook.cli.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import click

from snpbook.attest import verify as attest
from snpbook.attest.appraise import DEFAULT_POLICY, OPTIONS, appraise, check_nonce
from snpbook.attest.chain import MissingCertificate
from snpbook.attest.checks import Check, NotGenuine, Result
from snpbook.attest.roots import Roots
from snpbook.cli import errors
from snpbook.cli.evidence_files import NO_POLICY, gather, read_evidence, read_policy, read_roots
from snpbook.cli.report_fields import plain, report_json, report_rows, text
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.report import REPORT_DATA_SIZE

COLOURS = {Result.PASSED: "green", Result.FAILED: "red", Result.SKIPPED: "yellow"}
TOY_NOTE = "toy: keys that everybody knows, no proof of a real machine"
VERDICTS = {
    errors.Malformed: "malformed",
    errors.NotGenuine: "not genuine",
    errors.RefusedByPolicy: "refused by policy",
}


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


class Nonce(click.ParamType[bytes]):
    """A click type: 1 to 64 bytes in hexadecimal digits."""

    name = "nonce"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The bytes; a usage error where the text is no such number of them."""
        try:
            nonce = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            self.fail(f"{value!r} is no hexadecimal text", param, ctx)
        if not 1 <= len(nonce) <= REPORT_DATA_SIZE:
            self.fail(f"{len(nonce)} bytes: a nonce has 1 to {REPORT_DATA_SIZE}", param, ctx)
        return nonce


@dataclass(slots=True)
class Findings:
    """What a verification says on standard output, in the end as JSON or at once as text."""

    as_json: bool
    lines: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def say(self, name: str, value: str, note: str = "") -> None:
        """One line; `note` is for readers only."""
        self.lines[name] = value
        if not self.as_json:
            click.echo(f"{name.replace('_', ' '):9} {value}{note}")

    def leave_out(self, found: Iterable[str]) -> None:
        """Name the files of a directory that hold nothing of use."""
        self.left_out += found
        if not self.as_json:
            for each in self.left_out:
                click.echo(f"left out  {each}")

    def add(self, checks: Iterable[Check]) -> None:
        """Checks, in the order in which they were made."""
        made = list(checks)
        self.checks += made
        if not self.as_json:
            idle = [check for check in made if check.result is Result.SKIPPED and check.found == ""]
            _print_checks(check for check in made if check not in idle)
            if idle:
                click.echo(f"  {len(idle)} rules that the policy does not ask for")

    def end(self, verdict: str, problem: str = "") -> None:
        """The verdict, which ends the output; with what kept the evidence from being accepted, for scripts."""
        shown = f"genuine, {verdict}" if verdict == VERDICTS[errors.RefusedByPolicy] else verdict
        self.say("verdict", shown if not self.as_json else verdict)
        if self.as_json:
            told: dict[str, Any] = {**self.lines, "checks": [_check_json(check) for check in self.checks]}
            click.echo(json.dumps({**told, "left_out": self.left_out, "problem": problem}, indent=2))


@click.group(no_args_is_help=False)
def report() -> None:
    """Read, verify and appraise attestation reports."""


@report.command
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def show(file: str, as_json: bool) -> None:
    """Decode the report in FILE; nothing is verified.

    FILE holds a report as bytes, or as hexadecimal or base64 text: alone, followed by the certificate table of an
    extended request, or behind the header of the firmware's answer. It may be a directory of configfs-tsm, or - for
    standard input. A version beyond 5 is decoded like version 5, and bytes that the version does not name are listed.
    """
    evidence, parsed = read_evidence(file)
    if as_json:
        click.echo(json.dumps(report_json(evidence, parsed), indent=2))
        return
    for name, value in report_rows(evidence, parsed):
        click.echo(f"{name:20} {value}")


@report.command(epilog=f"Options of a policy file: {', '.join(OPTIONS)}. See snpbook.attest.appraise.Policy.")
@click.argument("file")
@click.option("--certs", multiple=True, metavar="FILE|DIR", help="Certificates and CRLs, DER or PEM; repeatable.")
@click.option("--roots", "root_set", default="amd", show_default=True, metavar="amd|toy|FILE", help="Whom to trust.")
@click.option(
    "--product", type=click.Choice(list(PRODUCT_LINES), case_sensitive=False), help="Insist on this product line."
)
@click.option(
    "--policy", "policy_file", metavar="FILE.toml|none", help="What is wanted (default: the built-in policy)."
)
@click.option("--nonce", type=Nonce(), metavar="HEX", help="REPORT_DATA must be this, with zeros behind it.")
@click.option("--now", type=Time(), metavar="ISO8601", help="Judge as of this time (default: the clock).")
@click.option("--allow-newer", is_flag=True, help="Take report versions beyond 5 as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def verify(
    file: str,
    certs: tuple[str, ...],
    root_set: str,
    product: str | None,
    policy_file: str | None,
    nonce: bytes | None,
    now: datetime | None,
    allow_newer: bool,
    as_json: bool,
) -> None:
    """Verify the report in FILE, then hold it against a policy.

    FILE is as for `show`. Certificates and revocation lists come from --certs, from the report's own certificate table,
    and from the directory that the environment variable SNPBOOK_CERTS names. Roots are pinned by fingerprint, AMD's by
    default; those of a FILE are its self-issued certificates. Without --policy the built-in one applies: debugging and
    migration agents off, nothing else; `none` asks for genuineness only. Exit code 0 means accepted, 2 malformed, 3 not
    genuine, 4 genuine but refused by the policy or for the nonce.
    """
    findings = Findings(as_json)
    try:
        _verify(findings, file, certs, root_set, product, policy_file, nonce, now or datetime.now(UTC), allow_newer)
    except (errors.NotGenuine, errors.RefusedByPolicy) as ending:
        findings.end(VERDICTS[type(ending)], ending.problem)
        raise
    except errors.Malformed as ending:
        if as_json:
            findings.end(VERDICTS[errors.Malformed], ending.problem)
        raise
    findings.end("accepted")


def _verify(
    findings: Findings,
    file: str,
    certs: tuple[str, ...],
    root_set: str,
    product: str | None,
    policy_file: str | None,
    nonce: bytes | None,
    now: datetime,
    allow_newer: bool,
) -> None:
    evidence, _ = read_evidence(file)
    policy, pool, roots = read_policy(policy_file), gather(file, evidence, certs), read_roots(root_set)
    bundle = pool.decoded()
    findings.leave_out(sorted(pool.left_out))
    findings.say("roots", roots.name, TOY_NOTE.removeprefix(roots.name) if roots.name == "toy" else "")
    try:
        verified = attest.verify(
            evidence.report, bundle.certificates, roots, now, product, crls=bundle.crls, allow_newer=allow_newer
        )
    except NotGenuine as refusal:
        findings.add(refusal.checks)
        raise errors.NotGenuine(f"{file}: not genuine: {refusal}", _remedy(refusal, roots)) from refusal
    findings.add(verified.checks)
    findings.say("product", verified.product)

    note = ": debug and migrate_ma off, nothing else" if policy is DEFAULT_POLICY else ""
    findings.say("policy", policy.name if policy else NO_POLICY, note)
    wanted = list(appraise(verified, policy, evidence.table).checks) if policy else []
    wanted += [check_nonce(verified, nonce)] if nonce is not None else []
    findings.add(wanted)
    failed = [check for check in wanted if check.result is Result.FAILED]
    if failed:
        told = ", ".join(
            f"{check.name} (expected {text(check.expected)}, found {text(check.found)})" for check in failed
        )
        whose = f"by policy {policy.name}" if policy and failed[0].name != "nonce" else "for the nonce"
        raise errors.RefusedByPolicy(f"{file}: genuine, but refused {whose}: {told}")


def _remedy(refusal: NotGenuine, roots: Roots) -> str:
    if isinstance(refusal, MissingCertificate):
        if refusal.url:
            return f"Add it with --certs; AMD publishes it at {refusal.url}"
        return "Add it with --certs; a VLEK, and the VCEK of a chip that hides its id, has the cloud provider."
    if refusal.check == "chain.root":
        return (
            f"Trusted are the roots of {roots.name}; name others with --roots if you know where this report comes from."
        )
    if refusal.check == "report.version":
        return "Add --allow-newer to take later versions, whose new fields nobody here knows."
    return f"The check {refusal.check} failed: do not trust this report."


def _print_checks(checks: Iterable[Check]) -> None:
    for check in checks:
        found = text(check.found)
        if check.result is Result.FAILED and check.expected != "":
            found += f" (expected {text(check.expected)})"
        click.echo(f"  {click.style(f'{check.result:8}', fg=COLOURS[check.result])} {check.name:32} {found}".rstrip())


def _check_json(check: Check) -> dict[str, Any]:
    told = {"name": check.name, "result": check.result.value}
    return {**told, "expected": plain(check.expected), "found": plain(check.found), "cite": check.cite}
