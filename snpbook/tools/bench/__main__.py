"""The command: measures the rows asked for, prints a table, and exits with 1 unless every gate was shown to hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from snpbook.tools.bench import (
    acceptance,
    conversions,
    digest,
    encryption,
    fleet,
    guests,
    launch,
    memory,
    peers,
    rmp,
    verification,
)
from snpbook.tools.bench.measure import STEADY, Kind, Measurement, NotMeasurableError, Row, measure

ROWS = [
    *encryption.ROWS,
    *rmp.ROWS,
    *memory.ROWS,
    *launch.ROWS,
    *digest.ROWS,
    *guests.ROWS,
    *conversions.ROWS,
    *acceptance.ROWS,
    *verification.ROWS,
    *peers.ROWS,
    *fleet.ROWS,
]

_FINE = ("holds", "reported", "left out")
_FILE_WIDTH = 120  # of the table where no terminal sets one

Outcome = Measurement | NotMeasurableError


def chosen(only: str) -> list[Row]:
    """The rows whose names start with one of the comma-separated names, in any case; all for an empty text.

    Raises `click.UsageError` for a name that no row has.
    """
    names = [name.strip().casefold() for name in only.split(",")]
    known = sorted({row.name for row in ROWS})
    for name in names:
        if not any(row.casefold().startswith(name) for row in known):
            raise click.UsageError(f"--only: no row is called {name!r}; rows: {', '.join(known)}")
    return [row for row in ROWS if row.name.casefold().startswith(tuple(names))]


def verdict(row: Row, outcome: Outcome) -> str:
    """A word or two: `holds`, `missed` (with `noisy` where the machine was), `reported`, `not measured`, `left out`."""
    if isinstance(outcome, NotMeasurableError):
        return "left out" if row.optional else "not measured"
    if row.only_reported:
        return "reported"
    return ("holds" if row.gate.holds(outcome.ratio) else "missed") + (", noisy" if outcome.noisy else "")


def table(outcomes: Iterable[tuple[Row, Outcome]]) -> Table:
    """All rows. Times, in microseconds per unit of the row, belong to this machine only."""
    result = Table("row", "ours : reference", "gate", title="snpbook bench: ratios within one run")
    for heading in ("ratio", "us", "us ref.", "spread"):
        result.add_column(heading, justify="right")
    result.add_column("verdict")
    for row, outcome in outcomes:
        text = verdict(row, outcome)
        style = "green" if text.startswith(_FINE) else "bold red"
        figures = ["", "", "", ""]
        if isinstance(outcome, Measurement) and row.gate.kind is Kind.MEMORY:
            figures[0] = f"{outcome.ratio:.3g}"
        elif isinstance(outcome, Measurement):
            times = [f"{seconds * 1e6:.2f}" for seconds in (outcome.candidate, outcome.reference)]
            figures = [f"{outcome.ratio:.3g}", *times, f"{outcome.spread:.2f}"]
        result.add_row(row.name, row.title, str(row.gate), *figures, text, style=style)
    return result


def remarks(outcomes: Iterable[tuple[Row, Outcome]]) -> Iterable[str]:
    """What the table does not say: why a row was not measured, rates, what noise means."""
    for row, outcome in outcomes:
        if isinstance(outcome, NotMeasurableError):
            yield f"{row.name} ({row.title}) {verdict(row, outcome)}: {outcome}"
            continue
        if row.units:
            yield f"{row.name} ({row.title}): {1 / outcome.candidate:.4g} {row.units} a second"
        if outcome.noisy:
            yield (
                f"{row.name} ({row.title}) noisy: twice the reference itself varied more than {STEADY}-fold. "
                f"Measure it on a quieter machine: python -m snpbook.tools.bench --only {row.name}"
            )


@click.command()
@click.option("--only", default="", metavar="E,R,L1", help="Rows or parts to measure, by the start of their names.")
def main(only: str) -> None:
    """Measure the goals of speed, each as a ratio to a reference in the same run."""
    rows = chosen(only)
    outcomes: list[tuple[Row, Outcome]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(rows))
        for row in rows:
            progress.update(task, description=f"measuring {row.name}")
            try:
                outcomes.append((row, measure(row)))
            except NotMeasurableError as reason:
                outcomes.append((row, reason))
            progress.advance(task)
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    console.print(table(outcomes))
    for remark in remarks(outcomes):
        console.print(remark, highlight=False)
    held = all(verdict(row, outcome).startswith(_FINE) for row, outcome in outcomes)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
