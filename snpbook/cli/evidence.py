"""`snpbook evidence`: reports with chain, revocation list and expected verdict, for other people's tests.

Exit codes are those of `snpbook.cli.errors`; the evidence's own verdict is in its `expected.json`.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from snpbook.cli.report import Time
from snpbook.cli.words import Word
from snpbook.evidence.kit import CERTIFICATES, CRL, EXPECTED, POLICY, Kit, Stage, Verdict
from snpbook.evidence.make import DEFECTS
from snpbook.evidence.make import make as make_kit
from snpbook.evidence.maker import SIGNED_FIELDS, SIGNERS, Recipe
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.policy import DEFAULT_POLICY, Tcb
from snpbook.spec.report import ATTESTATION_REPORT, VERSIONS

GOOD = "good"


class TcbText(click.ParamType[Tcb]):
    """A click type: components of a TCB as name=number, separated by commas, such as snp=23,microcode=0x54."""

    name = "tcb"

    def convert(self, value: str | Tcb, param: click.Parameter | None, ctx: click.Context | None) -> Tcb:
        """The TCB; a usage error where the text is none."""
        if isinstance(value, Tcb):
            return value
        known = [component.name for component in fields(Tcb)]
        found: dict[str, int] = {}
        for part in value.split(","):
            name, _, number = part.partition("=")
            if name not in known or name in found:
                self.fail(f"{part!r} is no component: one of {', '.join(known)}, each once, as snp=23", param, ctx)
            found[name] = Word(8).convert(number, param, ctx)
        return Tcb(**found)


class FieldText(click.ParamType[tuple[str, Any]]):
    """A click type: NAME=VALUE for a field of the report, bytes as hexadecimal digits."""

    name = "field"

    def convert(
        self, value: str | tuple[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Name and value; a usage error for an unknown field or a value that it cannot hold."""
        if isinstance(value, tuple):
            return value
        name, _, told = value.partition("=")
        if name not in SIGNED_FIELDS:
            self.fail(f"no field {name!r}: {', '.join(SIGNED_FIELDS)}", param, ctx)
        try:
            found: Any = int(told, 0) if ATTESTATION_REPORT.fields[name].kind != "raw" else bytes.fromhex(told)
            ATTESTATION_REPORT.pack(**{name: found})
        except ValueError as error:
            self.fail(f"{name}: {error}", param, ctx)
        return name, found


@click.group(no_args_is_help=False)
def evidence() -> None:
    """Evidence made to order: a conformance kit for verifiers. All keys are toys."""


@evidence.command
@click.argument("directory", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--product", type=click.Choice(list(PRODUCT_LINES), case_sensitive=False), default="genoa", show_default=True
)
@click.option("--signer", type=click.Choice(list(SIGNERS)), default="vcek", show_default=True, help="Whose key signs.")
@click.option("--report-version", type=click.Choice([*map(str, VERSIONS)]), help="Default: the firmware's.")
@click.option("--tcb", type=TcbText(), metavar="NAME=N,...", help="TCB of report and VEK (default: the firmware's).")
@click.option("--policy", type=Word(64), default=DEFAULT_POLICY, show_default="0x30000", help="Guest policy.")
@click.option("--field", "values", type=FieldText(), multiple=True, metavar="NAME=VALUE", help="A field of the report.")
@click.option("--seed", default="evidence", show_default=True, help="Chip and digests follow from this.")
@click.option("--now", type=Time(), metavar="ISO8601", help="When it is judged (default: the clock).")
@click.option("--defect", metavar="NAME", help="What is wrong with it.")
@click.option("--all", "everything", is_flag=True, help="Good evidence and every defect, each in DIRECTORY/NAME.")
@click.option("--list-defects", is_flag=True, help="Name the defects, with the verdict that each must meet.")
def make(
    directory: Path | None,
    product: str,
    signer: str,
    report_version: str | None,
    tcb: Tcb | None,
    policy: int,
    values: tuple[tuple[str, Any], ...],
    seed: str,
    now: datetime | None,
    defect: str | None,
    everything: bool,
    list_defects: bool,
) -> None:
    """Write evidence into DIRECTORY: report.bin, certs/, crl.der, expected.json, and policy.toml where one refuses it.

    expected.json has the exit code of `snpbook report verify` (0 accepted, 2 malformed, 3 not genuine, 4 refused), the
    first check that fails, and under what roots, time, nonce and policy that is so. The ARK in certs/ is evidence and
    no root: pin the toy roots by their fingerprints.
    """
    if list_defects:
        for each in DEFECTS.values():
            click.echo(f"{each.name:24} {int(each.verdict.stage)} {each.verdict.check or '':34} {each.tells}")
        return
    if directory is None:
        raise click.UsageError("Missing argument 'DIRECTORY'.")
    if defect is not None and (defect not in DEFECTS or everything):
        wrong = "cannot be combined with --all" if everything else f"there is no {defect!r}; see --list-defects"
        raise click.UsageError(f"--defect: {wrong}.")
    try:
        recipe = Recipe(
            now or datetime.now(UTC).replace(microsecond=0),
            product,
            signer,
            int(report_version) if report_version else None,
            tcb,
            policy,
            dict(values),
            seed,
        )
        if not everything:
            _write(directory, defect, *make_kit(recipe, defect))
            return
        for name in (None, *(each.name for each in DEFECTS.values() if signer in each.signers)):
            _write(directory / (name or GOOD), name, *make_kit(recipe, name))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error


def _write(directory: Path, defect: str | None, kit: Kit, verdict: Verdict) -> None:
    if (directory / EXPECTED).is_file():  # what an earlier run wrote, and this one would not
        for stale in [*(directory / CERTIFICATES).glob("*.der"), directory / CRL, directory / POLICY]:
            stale.unlink(missing_ok=True)
    for name, data in kit.files(defect, verdict).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    check = f", {verdict.check}" if verdict.check else ""
    told = Stage(verdict.stage).name.lower().replace("_", " ")
    click.echo(f"{directory}: {defect or GOOD}, to be {told}{check}; see {EXPECTED}")
