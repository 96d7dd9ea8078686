"""One server for all browser tests, and one browser and one page for each file and theme."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from snpbook.spec.resources import resource
from snpbook.views.palette import THEMES, Theme
from tests.browser.lab_page import LabPage, browser, lab, opened
from tests.sampling import ALL


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of notebooks that the server shows."""
    path = tmp_path_factory.mktemp("lab") / "notebooks"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def base(folder: Path) -> Iterator[str]:
    with lab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as engine:
        yield engine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each file in both themes, or, as a sample, in the one that falls to it."""
    if "theme" in metafunc.fixturenames:
        its_own = THEMES[crc32(metafunc.module.__name__.encode()) % len(THEMES)]
        themes = THEMES if ALL else [its_own]
        metafunc.parametrize("theme", themes, ids=lambda theme: theme.name, scope="module")


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, folder: Path, base: str, chromium: Any, theme: Theme) -> Iterator[LabPage]:
    """The chapter that the test's file calls NAME, as it is kept: opened and not yet run."""
    name: str = request.module.NAME
    shutil.copy(Path(str(resource("notebooks"))) / name, folder)
    with opened(chromium, base, name, theme) as page:
        yield page
        page.check()


@pytest.fixture(scope="module")
def notebook(saved: LabPage) -> LabPage:
    """The chapter after a run of all its cells."""
    saved.run_all()
    saved.check()
    return saved
