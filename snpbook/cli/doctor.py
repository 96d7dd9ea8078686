"""`snpbook doctor`: does this installation have what the notebooks need, and if not, what to do.

Each check is one line; the versions asked for are those of the package's own metadata.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click
from jupyter_core.paths import jupyter_path
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from snpbook.cli.errors import Exit
from snpbook.spec.resources import resource

FRONT_ENDS = {"ipywidgets": "@jupyter-widgets/jupyterlab-manager", "anywidget": "anywidget"}
TERABYTE = 1 << 40
KERNEL_BUDGET = 400 << 20
"""What a kernel may need by the end of any notebook, in bytes."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked at, what was found, and what to do where it is not enough."""

    subject: str
    ok: bool
    found: str
    remedy: str = ""


@click.command
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check this installation: versions, widget front end, memory, data."""
    checks = [*versions(), *front_ends(), *memory(), *shipped()]
    width = max(len(check.subject) for check in checks)
    for check in checks:
        mark, remedy = ("OK", "") if check.ok else ("problem", f"  ->  {check.remedy}")
        click.echo(f"{mark:7}  {check.subject:{width}}  {check.found}{remedy}")
    ctx.exit(Exit.DONE if all(check.ok for check in checks) else Exit.FAILED)


def versions() -> Iterator[Check]:
    """Python and every library that the package asks for, against the bounds in its metadata."""
    python, bounds = platform.python_version(), SpecifierSet(metadata.metadata("snpbook")["Requires-Python"])
    yield Check("Python", bounds.contains(python), python, f"Install Python {bounds}.")
    for line in metadata.requires("snpbook") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, False, "not installed", remedy)
        else:
            yield Check(requirement.name, requirement.specifier.contains(found, prereleases=True), found, remedy)


def front_ends() -> Iterator[Check]:
    """The JavaScript halves of the widgets, where JupyterLab of this environment looks for them."""
    for library, extension in FRONT_ENDS.items():
        places = [Path(folder, extension) for folder in jupyter_path("labextensions")]
        found = next((place for place in places if (place / "package.json").is_file()), None)
        remedy = f"pip install --force-reinstall {library}, in the environment that runs JupyterLab"
        yield Check(f"{library} in JupyterLab", found is not None, str(found or "no front end"), remedy)


def memory() -> Iterator[Check]:
    """A 1 TB mapping that costs nothing until touched, and room for one kernel."""
    from snpbook.hardware.dram import Dram

    mapped = Dram(TERABYTE).mapped
    remedy = "Set vm.overcommit_memory to 0 or 1 and lift `ulimit -v`; until then large machines are slow."
    yield Check("1 TB of simulated DRAM", mapped, "one mapping" if mapped else "mapping refused", remedy)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
        yield Check("free memory", free >= KERNEL_BUDGET, f"{free >> 20} MiB", f"Free {KERNEL_BUDGET >> 20} MiB.")


def shipped() -> Iterator[Check]:
    """The folders that come with the package."""
    for folder in ("notebooks", "data"):
        try:
            yield Check(folder, True, str(resource(folder)))
        except FileNotFoundError as error:
            yield Check(folder, False, str(error), "Install snpbook again.")
