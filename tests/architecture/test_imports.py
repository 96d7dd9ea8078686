"""What an import costs, and that every library in use is one the package asks for."""

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def _loaded(code: str) -> set[str]:
    """The modules in a fresh interpreter after running `code`."""
    code += "\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stderr.split())


def test_import_snpbook_loads_no_heavy_library() -> None:
    loaded = _loaded("import snpbook")
    assert "snpbook" in loaded
    assert not loaded & {"IPython", "PIL", "anywidget", "cryptography.x509", "ipywidgets", "numpy", "plotly"}


def test_the_model_loads_no_notebook_library() -> None:
    loaded = _loaded("import snpbook.system")
    assert "snpbook.hardware" in loaded
    assert not loaded & {"IPython", "PIL", "anywidget", "ipywidgets", "plotly", "traitlets"}


@pytest.mark.parametrize("command", ["measure", "report"])
def test_a_relying_party_command_loads_no_model(command: str) -> None:
    loaded = _loaded(f"from snpbook.cli.main import main; assert main(['{command}', '--help']) == 0")
    assert f"snpbook.cli.{command}" in loaded
    assert not loaded & {"IPython", "ipywidgets", "plotly", "snpbook.firmware", "snpbook.hardware", "snpbook.system"}


def test_every_library_in_use_is_asked_for() -> None:
    used = set()
    for path in (ROOT / "snpbook").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            used |= {name.partition(".")[0] for name in names}
    used -= {*sys.stdlib_module_names, "snpbook"}
    asked = {canonicalize_name(Requirement(line).name) for line in metadata.requires("snpbook") or []}
    providers = metadata.packages_distributions()
    assert {name for name in used if not asked & {canonicalize_name(d) for d in providers.get(name, [])}} == set()


def test_the_doors_name_every_part_of_the_silicon() -> None:
    """What host and guest may import of the hardware is a list; a new file joins it on purpose or not at all."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (doors,) = (c for c in config["tool"]["importlinter"]["contracts"] if c.get("id") == "doors")
    parts = {f"snpbook.hardware.{path.stem}" for path in (ROOT / "snpbook" / "hardware").glob("[a-z]*.py")}
    open_ = {
        f"snpbook.hardware.{name}" for name in ("dram", "executor", "exits", "guest_cpu", "host_instructions", "ports")
    }
    assert set(doors["forbidden_modules"]) == parts - open_
