"""The pins that `make`, the tests and Binder install agree with each other and with the bounds of the package."""

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from snpbook.tools.pins import closure

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ROOT / "constraints.txt"
BINDER = ROOT / "binder" / "requirements.txt"


def _pins(path: Path) -> dict[str, str]:
    """The pins of a file, every line of which must be `name==version` and nothing else."""
    lines = path.read_text().splitlines()
    strange = [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line)]
    assert not strange, f"{path.name}: not an exact pin: {strange}"
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize(
    ("path", "requirements"),
    [
        (CONSTRAINTS, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]),
        (BINDER, PROJECT["dependencies"]),
    ],
    ids=["constraints", "binder"],
)
def test_pins_satisfy_the_bounds(path: Path, requirements: list[str]) -> None:
    pins = _pins(path)
    for requirement in map(Requirement, requirements):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_pins_are_complete() -> None:
    assert closure("snpbook", ["test"]).keys() <= _pins(CONSTRAINTS).keys()
    assert closure("snpbook").keys() <= _pins(BINDER).keys()


def test_binder_runs_the_tested_versions() -> None:
    assert _pins(BINDER).items() <= _pins(CONSTRAINTS).items()


def test_binder_python_is_new_enough() -> None:
    runtime = (ROOT / "binder" / "runtime.txt").read_text().strip()
    assert SpecifierSet(PROJECT["requires-python"]).contains(runtime.removeprefix("python-"))


def test_binder_installs_the_package_alone() -> None:
    post_build = ROOT / "binder" / "postBuild"
    assert os.access(post_build, os.X_OK)
    installs = [line for line in post_build.read_text().splitlines() if "pip install" in line]
    assert installs
    assert all("--no-deps" in line for line in installs)
