"""One server for all browser tests, and one browser and one page for each file and theme."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snpbook.spec.resources import resource
from snpbook.views.palette import THEMES, Theme
from tests.browser.lab_page import LabPage, browser, lab, opened


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


@pytest.fixture(scope="module", params=THEMES, ids=lambda theme: theme.name)
def theme(request: pytest.FixtureRequest) -> Theme:
    chosen: Theme = request.param
    return chosen


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
