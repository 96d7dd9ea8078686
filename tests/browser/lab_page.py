"""A notebook in a real JupyterLab in a real browser, as its reader handles it: run, type, press keys, look."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from snpbook.views.palette import Theme
from tests.lab_server import PATIENCE, TOKEN, free_port, serving

playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MAP = ".snpbook-map canvas >> nth=0"
_CHAPTER = 3 * PATIENCE
"""Seconds that all cells of a chapter may take together, beside other tests."""
_FLAGS = [
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-domain-reliability", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
_SETTINGS = {
    "@jupyterlab/apputils-extension/themes.jupyterlab-settings": {"adaptive-theme": True},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
_PROMPTS = """() => Array.from(document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputArea-prompt'),
    prompt => Number((prompt.textContent.match(/\\d+/) || [0])[0]))"""
_ERROR = ".jp-OutputArea [data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea [data-mime-type*='error']"


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """A JupyterLab on the notebooks of `folder`, which follows the browser's colour scheme and asks nobody for news."""
    settings = folder.parent / "lab-settings"
    for name, content in _SETTINGS.items():
        path = settings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    port = free_port()
    arguments = ["--no-browser", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    if os.name == "posix" and os.geteuid() == 0:
        arguments.append("--allow-root")
    own = {"JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTERLAB_WORKSPACES_DIR": settings / "workspaces",
           "SNPBOOK_PROGRESS": settings / "progress.json"}  # fmt: skip
    with serving(folder.parent, port, "jupyterlab", *arguments, **{k: str(v) for k, v in own.items()}) as base:
        yield base


@contextmanager
def browser() -> Iterator["playwright.Browser"]:
    """Chromium, kept offline."""
    with playwright.sync_playwright() as engine:
        found = engine.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield found
        found.close()


class LabPage:
    """One open notebook. `errors` collects the page's errors, `strangers` the hosts asked outside this machine."""

    def __init__(self, page: "playwright.Page") -> None:
        self.page = page
        self.errors: list[str] = []
        self.strangers: set[str] = set()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._ask(request.url))

    def _ask(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in {"data", "blob", "about"} and parts.hostname != "127.0.0.1":
            self.strangers.add(address)

    def open(self, base: str, name: str) -> None:
        self.page.goto(f"{base}/lab/tree/{name}?token={TOKEN}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def choose(self, menu: str, entry: str) -> None:
        """Choose an entry of a menu."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def run_all(self) -> None:
        """Clear what is shown, run every cell by the menu, and wait for the last answer or the first error."""
        self.page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        self.choose("Edit", "Clear Outputs of All Cells")
        self.page.wait_for_function(f"({_PROMPTS})().every(count => count === 0)")
        self.choose("Run", "Run All Cells")
        script = f"error => ({_PROMPTS})().every(count => count > 0) || document.querySelector(error)"
        self.page.wait_for_function(script, arg=_ERROR, timeout=_CHAPTER * 1000)

    def cell(self, text: str) -> "playwright.Locator":
        """The code cell whose source holds `text`."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").filter(
            has=self.page.locator(".jp-InputArea-editor", has_text=text)
        )

    def line(self, source: str) -> "playwright.Locator":
        """The code cell that is the line `source` and nothing else, in sight."""
        editor = self.page.locator(".jp-InputArea-editor .cm-content", has_text=re.compile(f"^{re.escape(source)}$"))
        cell = self.page.locator(".jp-Notebook .jp-CodeCell").filter(has=editor)
        cell.scroll_into_view_if_needed()
        return cell

    def output(self, text: str) -> str:
        """What the cell whose source holds `text` has answered, in sight or not."""
        return str(self.cell(text).locator(".jp-OutputArea-output").last.text_content())

    def retype(self, text: str, source: str) -> None:
        """Replace the source of the cell that holds `text`, by keyboard, run it, and wait for its answer."""
        cell = self.cell(text)
        number = cell.evaluate(
            "cell => Array.from(document.querySelectorAll('.jp-Notebook .jp-CodeCell')).indexOf(cell)"
        )
        before = self.page.evaluate(_PROMPTS)[number]
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("ControlOrMeta+Enter")
        self.page.wait_for_function(f"([number, before]) => ({_PROMPTS})()[number] > before", arg=[number, before])

    def check(self) -> None:
        """No error on the page, no widget that failed to show, nobody asked outside this machine."""
        assert self.errors == []
        assert self.page.get_by_text("Error displaying widget").count() == 0
        assert self.page.locator(_ERROR).all_inner_texts() == []
        assert self.strangers == set()

    def colours(self) -> set[str]:
        """The colours that fill at least four pixels of the map's canvas, as `#RRGGBB`."""
        pixels = self.page.locator(MAP).evaluate("""canvas => {
            const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height), found = {};
            for (let i = 0; i < data.length; i += 4)
              if (data[i + 3] === 255) {
                const colour = (data[i] << 16) | (data[i + 1] << 8) | data[i + 2];
                found[colour] = (found[colour] || 0) + 1;
              }
            return found;
        }""")
        return {f"#{int(colour):06X}" for colour, count in pixels.items() if count >= 4}

    def label(self) -> str:
        """The accessible name of the map's canvas."""
        return str(self.page.locator(MAP).get_attribute("aria-label"))


@contextmanager
def opened(chromium: "playwright.Browser", base: str, name: str, theme: Theme) -> Iterator[LabPage]:
    """The notebook `name` of the server at `base`, opened in a window in the colours of `theme`."""
    with chromium.new_context(viewport={"width": 1400, "height": 1800}, color_scheme=theme.name) as context:
        page = LabPage(context.new_page())
        page.open(base, name)
        yield page
