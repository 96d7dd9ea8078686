"""Reading a view's HTML as a screen reader does: pictures, tables, and what the page's sanitiser lets through."""

import base64
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

VOID = {"img", "br"}
ALLOWED = {
    "table", "caption", "thead", "tbody", "tr", "th", "td", "img", "p", "span", "div", "details", "summary", "strong",
    "b", "pre", "br",
}  # fmt: skip


class Page(HTMLParser):
    """A parsed fragment. `pictures` holds (alternative text, SVG), `tables` the captions, `words` all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.pictures: list[tuple[str, ET.Element]] = []
        self.tables: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag in ALLOWED, f"<{tag}> does not survive in a notebook that is not trusted"
        assert not [name for name in values if name.startswith("on")]
        if tag == "img":
            prefix = "data:image/svg+xml;base64,"
            address = values["src"] or ""
            assert address.startswith(prefix)
            self.pictures.append((values.get("alt") or "", ET.fromstring(base64.b64decode(address[len(prefix) :]))))
        if tag == "th":
            assert values.get("scope") in {"col", "row"}
        if tag == "table":
            self.tables.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] == "caption":
            self.tables[-1] += data


def read(html: str) -> Page:
    """The fragment, every picture of which has a text alternative and every table a caption."""
    page = Page(html)
    assert all(alt.strip() for alt, _ in page.pictures)
    assert all(caption.strip() for caption in page.tables)
    return page
