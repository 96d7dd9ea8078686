"""One server for all browser tests, and one browser and one page for each file and theme."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snpbook.views.palette import THEMES, Theme
from tests.browser.lab_page import browser, lab


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
