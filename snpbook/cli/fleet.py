"""`snpbook fleet`: a directory of reports judged in one go, a verdict a line.

Exit codes are those of `snpbook.cli.errors`; of a fleet it is that of the worst report, the one that got least far.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from snpbook.attest.fleet import ACCEPTED, MALFORMED, NOT_GENUINE, REFUSED, VERDICTS, FleetItem, verify_fleet
from snpbook.cli import errors
from snpbook.cli.evidence_files import may_hold_certificates, read_policy, read_roots
from snpbook.cli.report import Time

CERTIFICATES = "certs"
REPORTS, BESIDE = (".bin", ".hex"), (".pem", ".der")
ERRORS = {MALFORMED: errors.Malformed, NOT_GENUINE: errors.NotGenuine, REFUSED: errors.RefusedByPolicy}


@click.group(no_args_is_help=False)
def fleet() -> None:
    """Many reports at once."""


@fleet.command
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--roots", "root_set", default="amd", show_default=True, metavar="amd|toy|FILE", help="Whom to trust.")
@click.option(
    "--policy", "policy_file", metavar="FILE.toml|none", help="What is wanted (default: the built-in policy)."
)
@click.option("--now", type=Time(), metavar="ISO8601", help="Judge as of this time (default: the clock).")
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Threads (default: as many as processors).")
def verify(directory: Path, root_set: str, policy_file: str | None, now: datetime | None, workers: int | None) -> None:
    """Verify every report in DIRECTORY: NAME.bin or NAME.hex, with NAME.pem or NAME.der beside it.

    DIRECTORY/certs holds what many reports share, revocation lists too. One JSON object a line goes to standard output,
    a progress bar and a table of verdicts to a terminal. Roots, policy and time are as for `snpbook report verify`. The
    exit code is that of the worst report: 2 malformed before 3 not genuine before 4 refused before 0.
    """
    policy, roots, items = read_policy(policy_file), read_roots(root_set), list(_items(directory))
    if not items:
        raise errors.Malformed(f"{directory}: no reports", "A report is a file NAME.bin or NAME.hex.")
    counts: Counter[str] = Counter()
    failures: Counter[tuple[str, str]] = Counter()
    console = Console(stderr=True)
    with ThreadPoolExecutor(workers) as executor:
        verdicts = verify_fleet(items, roots, now or datetime.now(UTC), policy, executor)
        for verdict in track(verdicts, "verifying", len(items), console=console, disable=not console.is_terminal):
            counts[verdict.verdict] += 1
            failures[verdict.verdict, verdict.check] += 1
            click.echo(json.dumps(asdict(verdict)))
    if console.is_terminal:
        console.print(_table(failures))
    worst = next(verdict for verdict in VERDICTS if counts[verdict])
    if worst != ACCEPTED:
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        raise ERRORS[worst](f"{directory}: of {len(items)} reports {told}", "Each line names what failed first.")


def _table(failures: Mapping[tuple[str, str], int]) -> Table:
    """How many reports ended how, and at which check; the worst first."""
    table = Table("verdict", "first failed check", "reports")
    for (verdict, check), count in sorted(failures.items(), key=lambda row: (VERDICTS.index(row[0][0]), row[0][1])):
        table.add_row(verdict, check, str(count))
    return table


def _items(directory: Path) -> Iterator[FleetItem]:
    if not directory.is_dir():
        raise errors.Malformed(f"{directory}: no directory", "Name one with NAME.bin or NAME.hex in it.")
    folder = directory / CERTIFICATES
    members = sorted(folder.iterdir()) if folder.is_dir() else []
    shared = tuple(errors.read_input(member) for member in members if may_hold_certificates(member))
    files = [path for path in sorted(directory.iterdir()) if path.is_file() or not path.exists()]
    beside: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in BESIDE:
            beside.setdefault(path.stem, []).append(path)
    for path in files:
        if path.suffix.lower() in REPORTS:
            yield _item(path, beside.get(path.stem, []), shared)


def _item(path: Path, beside: Iterable[Path], shared: tuple[bytes, ...]) -> FleetItem:
    """One that cannot be read is none the less one of the fleet."""
    try:
        return FleetItem(path.name, errors.read_input(path), tuple(map(errors.read_input, beside)), shared)
    except errors.Malformed as error:
        return FleetItem(path.name, b"", unreadable=error.problem)
