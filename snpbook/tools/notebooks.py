"""The notebook tool: `python -m snpbook.tools.notebooks {build,clean,check} [FILE ...]`.

`build` executes, cleans and writes; `clean` brings a notebook to the one form in which it is kept; `check` refuses, by
name, whatever `clean` would change, what is too large, holds widget state or an error nobody expects, or lacks a part
of a chapter's anatomy (see `snpbook.tools.anatomy`). Without files, all notebooks are meant.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from snpbook.exercises.progress import VARIABLE
from snpbook.spec.resources import resource
from snpbook.tools import anatomy

Notebook = Any
"""A notebook in `nbformat`'s own type, which has no annotations."""

LIMIT = 200_000
"""The largest notebook, in bytes."""
PATIENCE = 60
"""How long a cell may run, in seconds."""

WIDGET = "application/vnd.jupyter.widget-view+json"
EXPECTED = "raises-exception"
_DROPPED = {WIDGET, "image/png", "image/jpeg"}
_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 where a notebook fails to run or to pass the check."""
    parser = argparse.ArgumentParser(prog="python -m snpbook.tools.notebooks", description="Build and check notebooks.")
    parser.add_argument("command", choices=["build", "clean", "check"])
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    found = 0
    for path in options.files or sorted(resource("notebooks").glob("*.ipynb")):
        if options.command == "check":
            faults = check(path)
            found += len(faults)
            print("\n".join(f"{path.name}: {fault}" for fault in faults) or f"{path.name}: in order")
            continue
        notebook = load(path.read_text(encoding="utf-8"))
        try:
            clean = cleaned(executed(notebook, path.parent) if options.command == "build" else notebook)
        except CellExecutionError as error:
            found += 1
            print(f"{path.name}: {error}")
            continue
        path.write_text(text(clean), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 1 if found else 0


def executed(notebook: Notebook, folder: Path) -> Notebook:
    """The notebook with fresh outputs, run in `folder`; the reader's own progress file is left alone."""
    result = deepcopy(notebook)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(result, timeout=PATIENCE, kernel_name="python3", coalesce_streams=True, resources=place)
    with tempfile.TemporaryDirectory() as scratch:
        client.execute(env={**os.environ, VARIABLE: str(Path(scratch, "progress.json"))})
    return result


def cleaned(notebook: Notebook) -> Notebook:
    """The notebook in the form in which it is kept: the same for the same content, whoever ran it."""
    result = deepcopy(notebook)
    result.metadata = _METADATA
    result.nbformat, result.nbformat_minor = 4, 5
    count = 0
    for cell, identifier in zip(result.cells, _identifiers(result.cells), strict=True):
        tags = cell.metadata.get("tags")
        cell.id, cell.metadata = identifier, {"tags": tags} if tags else {}
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [_output(output, count) for output in cell.outputs]
    return result


def _identifiers(cells: list[Any]) -> list[str]:
    """A name for each cell: its section's heading in small letters, and its number in the section."""
    names, section, taken = [], "start", Counter[str]()
    for cell in cells:
        heading = re.search(r"^##? +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            section = re.sub(r"[^a-z0-9]+", "-", heading[1].lower()).strip("-")[:50] or "section"
        taken[section] += 1
        names.append(f"{section}-{taken[section]}")
    return names


def _output(output: Any, count: int) -> Any:
    kept = deepcopy(output)
    if "execution_count" in kept:
        kept.execution_count = count
    if "data" in kept:
        kept.data = {kind: value for kind, value in kept.data.items() if kind not in _DROPPED}
        kept.metadata = {}
    if kept.output_type == "error":  # frames hold the paths of one machine
        kept.traceback = [f"{kept.ename}: {kept.evalue}"]
    return kept


def load(content: str) -> Notebook:
    """The notebook in a file's text."""
    return nbformat.reads(content, as_version=4)  # type: ignore[no-untyped-call]


def text(notebook: Notebook) -> str:
    """The text of a notebook's file: keys sorted, one newline at the end."""
    written: str = nbformat.writes(notebook, version=4)  # type: ignore[no-untyped-call]
    return written.rstrip("\n") + "\n"


def check(path: Path) -> list[str]:
    """What is wrong with a notebook, by name; empty where it is in order."""
    content = path.read_text(encoding="utf-8")
    notebook = load(content)
    faults = []
    if "widgets" in notebook.metadata or any(WIDGET in o.get("data", {}) for _, o in _outputs(notebook)):
        faults.append("widget state: it belongs to a kernel that is gone; run `clean`")
    if content != text(cleaned(notebook)):
        faults.append("form: `clean` would change it")
    if len(content.encode()) > LIMIT:
        faults.append(f"size: {len(content.encode()):,} bytes, more than {LIMIT:,}")
    for cell, output in _outputs(notebook):
        if output.output_type == "error" and EXPECTED not in cell.metadata.get("tags", []):
            faults.append(f"error: cell {cell.id} ends in {output.ename} and has no tag {EXPECTED}")
    return faults + anatomy.faults(notebook.cells)


def _outputs(notebook: Notebook) -> list[tuple[Any, Any]]:
    return [(cell, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


if __name__ == "__main__":
    sys.exit(main())
