"""The documents at the top say what is true: the example runs, links lead somewhere, the picture is current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from snpbook import __version__
from snpbook.cli.main import COMMANDS
from snpbook.tools import layers

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(ROOT.glob("*.md"))


def test_readme_example_runs(tmp_path: Path) -> None:
    example, printed = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", README, re.DOTALL).groups()
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == (printed, "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)#\"]+)", path.read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_names_every_command_and_chapter() -> None:
    assert [name for name in COMMANDS if f"snpbook {name}" not in README] == []
    assert [path.name for path in (ROOT / "notebooks").glob("*.ipynb") if f"notebooks/{path.name}" not in README] == []


def test_picture_of_the_layers_is_current() -> None:
    assert layers.PICTURE.read_text() == layers.svg()


def test_citation_and_changelog_name_this_version() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## ({re.escape(__version__)}|Unreleased)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
