"""The wheel works by itself: built, unpacked and used outside the clone."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from snpbook import __version__
from tests.lab_server import ask, lab_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, to be put in front of Python's path."""
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def _python(site: Path, cwd: Path, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()


def test_wheel_carries_package_notebooks_and_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"snpbook", f"snpbook-{__version__}.dist-info"}
    assert {"snpbook/py.typed", "snpbook/share/notebooks/00_first_light.ipynb"} <= set(names)
    assert any(name.startswith("snpbook/share/data/products/") for name in names)
    assert not [name for name in names if "checkpoint" in name or "__pycache__" in name]


def test_wheel_finds_its_own_files(site: Path, tmp_path: Path) -> None:
    code = "from snpbook.spec.resources import resource; print(resource('data'), resource('notebooks'))"
    found = _python(site, tmp_path, "-c", code).split()
    assert found == [str(site / "snpbook/share/data"), str(site / "snpbook/share/notebooks")]


def test_wheel_runs_the_command_line(site: Path, tmp_path: Path) -> None:
    assert _python(site, tmp_path, "-m", "snpbook", "--version") == f"snpbook {__version__}"
    assert metadata.version("snpbook") == __version__


def test_wheel_serves_copies_of_the_notebooks(site: Path, tmp_path: Path) -> None:
    changed = tmp_path / "snpbook-notebooks" / "00_first_light.ipynb"
    changed.parent.mkdir()
    changed.write_text("mine")
    with lab_server(tmp_path, PYTHONPATH=str(site)) as base:
        served = {entry["name"] for entry in ask(base, "/api/contents")["content"]}
    shipped = {path.name for path in (site / "snpbook/share/notebooks").glob("*.ipynb")}
    assert shipped <= served
    assert changed.read_text() == "mine"
    assert f"{len(shipped) - 1} notebooks copied, 1 already there" in (tmp_path / "lab.log").read_text()
