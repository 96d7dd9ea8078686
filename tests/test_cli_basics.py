"""The command line's contract: exit codes, one or two lines on standard error, sizes, `lab`, `doctor`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook import __version__
from snpbook.cli import doctor
from snpbook.cli import main as cli
from snpbook.cli.errors import CliError, Malformed, NotGenuine, RefusedByPolicy, read_input
from snpbook.cli.lab import copy_missing
from snpbook.cli.sizes import Size
from snpbook.spec.refusal import Refusal
from snpbook.spec.sizes import parse_size
from tests.lab_server import ask, lab_server

Run = Callable[[BaseException], int]


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that raises the error given, and return the exit code."""

    def run(error: BaseException) -> int:
        @click.command
        def broken() -> None:
            raise error

        monkeypatch.setattr(cli, "snpbook", broken)
        return cli.main([])

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CliError("no"), 1),
        (Malformed("report.bin: 5 bytes", "A report has 1184."), 2),
        (NotGenuine("report.bin: signature"), 3),
        (RefusedByPolicy("report.bin: debug is on"), 4),
        (click.UsageError("--vcpus 0"), 64),
        (click.BadParameter("3K is no whole page"), 64),
        (Refusal("page is not assigned", expected=1, found=0), 1),
        (FileNotFoundError(2, "No such file or directory", "out.bin"), 1),
        (ZeroDivisionError("division\nby zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_end_with_their_code_in_two_lines(
    ending: Run, error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(error) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") <= 2
    assert "Traceback" not in output.err


def test_error_tells_problem_then_remedy(ending: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ending(Malformed("report.bin: 5 bytes", "A report has 1184."))
    assert capsys.readouterr().err == "snpbook: report.bin: 5 bytes\n  A report has 1184.\n"


def test_debug_shows_where_an_unexpected_error_came_from(ending: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNPBOOK_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["lab", "--port", "0"], ["doctor", "surplus"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 64
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("snpbook: ")
    assert output.err.count("\n") == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"snpbook {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"\n  {name}" not in output] == []


def test_a_reader_who_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m snpbook --help | true; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1)
    assert run.stderr == ""


def test_read_input_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "report.bin").write_bytes(b"report")
    assert read_input(tmp_path / "report.bin") == b"report"
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(Malformed, match=str(path)):
            read_input(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4K", 4096), ("512M", 512 << 20), ("512 MiB", 512 << 20), ("2G", 2 << 30), ("1tib", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "M", "3K", "0", "-4K", "1.5G", "512MB", "512 X", "4096 4096", "٤٠٩٦"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no memory size|whole number of 4096-byte pages"):
        Size().convert(text, None, None)


@given(pages=st.integers(1, 1 << 40), unit=st.sampled_from("KMGT"))
def test_a_size_is_its_number_times_its_unit(pages: int, unit: str) -> None:
    assert parse_size(f"{4 * pages}{unit}") == 4 * pages * 1024 ** ("KMGT".index(unit) + 1)


def test_lab_copies_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped, target = tmp_path / "shipped", tmp_path / "snpbook-notebooks"
    for name in ("00_first_light.ipynb", "01_next.ipynb", "apps/map.ipynb"):
        (shipped / name).parent.mkdir(parents=True, exist_ok=True)
        (shipped / name).write_text("shipped")
    target.mkdir()
    (target / "01_next.ipynb").write_text("mine")
    copy_missing(shipped, target)
    assert (target / "01_next.ipynb").read_text() == "mine"
    assert (target / "apps" / "map.ipynb").read_text() == "shipped"
    assert "2 notebooks copied, 1 already there" in capsys.readouterr().out


def test_lab_serves_the_notebooks_of_the_clone(tmp_path: Path) -> None:
    with lab_server(tmp_path) as base:
        assert "00_first_light.ipynb" in {entry["name"] for entry in ask(base, "/api/contents")["content"]}
    assert "/lab/tree/00_first_light.ipynb" in (tmp_path / "lab.log").read_text()
    assert not (tmp_path / "snpbook-notebooks").exists()


def test_doctor_finds_this_installation_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    libraries = ("numpy", "cryptography", "jupyterlab", "ipywidgets", "anywidget", "plotly")
    for subject in ("Python", *libraries, "notebooks", "data"):
        assert [line for line in lines if line.startswith("OK") and f" {subject} " in line], subject


def test_doctor_tells_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "jupyter_path", lambda *_: [])
    asked = ["numpy>=99", "no-such-library>=1", "other; extra == 'x'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: asked)
    assert cli.main(["doctor"]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert len(problems) == 4
    assert "pip install 'numpy>=99'" in problems[0]
    assert "not installed" in problems[1]
    assert all("pip install --force-reinstall" in line for line in problems[2:])
