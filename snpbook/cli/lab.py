"""`snpbook lab`: JupyterLab with the notebooks, opened at the index.

In a clone Lab works on the clone's own notebooks. An installed wheel keeps its notebooks as they are and hands out
copies in `./snpbook-notebooks`, which belong to the reader from then on.
"""

import os
import shutil
import sys
from pathlib import Path

import click

from snpbook.spec.resources import resource

INDEX = "00_first_light.ipynb"
COPIES = "snpbook-notebooks"


@click.command
@click.option("--no-browser", is_flag=True, help="Serve only, and print the address.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to serve on (JupyterLab's default: 8888).")
@click.argument("jupyter", metavar="[-- JUPYTER ARGUMENTS]", nargs=-1, type=click.UNPROCESSED)
def lab(no_browser: bool, port: int | None, jupyter: tuple[str, ...]) -> None:
    """Open JupyterLab at the index notebook."""
    folder = resource("notebooks")
    if Path(__file__).parents[1] in folder.parents:
        folder = copy_missing(folder, Path.cwd() / COPIES)
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}"]
    command.append(f"--LabApp.default_url=/lab/tree/{INDEX}")
    if no_browser:
        command.append("--no-browser")
    if port:
        command.append(f"--port={port}")
    if os.name == "posix" and os.geteuid() == 0:
        command.append("--allow-root")  # containers and build machines; Lab listens on this machine only, with a token
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *jupyter])


def copy_missing(shipped: Path, target: Path) -> Path:
    """Copy the notebooks that `target` lacks; never touch one that is there."""
    names = sorted(path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file())
    missing = [name for name in names if not (target / name).exists()]
    for name in missing:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped / name, target / name)
    kept = len(names) - len(missing)
    click.echo(f"{target}: {len(missing)} notebooks copied, {kept} already there and left as they are")
    return target
