"""A small SVG writer: elements as strings, and the picture as an image that carries its own text alternative.

Pictures are SVG text, never PNG, whose bytes depend on the compression library. They are embedded as data addresses,
because inline SVG does not survive in a notebook that is not trusted.
"""

from base64 import b64encode
from html import escape

from snpbook.views.palette import LIGHT, Swatch, Theme

SANS = "system-ui,sans-serif"
MONO = "ui-monospace,Menlo,Consolas,monospace"


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element; in attribute names `_` stands for `-`, and a trailing one is dropped (`class_`)."""
    shown = "".join(f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items())
    return f"<{tag}{shown}>{''.join(children)}</{tag}>" if children else f"<{tag}{shown}/>"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def words(text: str, x: float, y: float, **attributes: object) -> str:
    """A line of text with its baseline at `y`."""
    return element("text", escape(text), x=x, y=y, **attributes)


def document(width: float, height: float, *children: str, theme: Theme = LIGHT) -> str:
    """A picture of `width` x `height` pixels on its own paper, so that it can be read in any colour scheme."""
    paper = element("rect", width=width, height=height, rx=4, fill=theme.surface)
    body = element("g", *children, font_family=SANS, font_size=12, fill=theme.text)
    return element(
        "svg", paper, body, xmlns="http://www.w3.org/2000/svg", width=width, height=height,
        viewBox=f"0 0 {width:g} {height:g}",
    )  # fmt: skip


def image(picture: str, alt: str) -> str:
    """An `img` element of a finished picture; `alt` says in words what it shows and may not be empty."""
    if not alt.strip():
        raise ValueError("a picture needs a text alternative: say what it shows")
    data = b64encode(picture.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}" style="max-width:100%">'


def pattern(identifier: str, swatch: Swatch, theme: Theme = LIGHT) -> str:
    """A definition for `defs`: the swatch's colour with its pattern in the ink's colour, for `fill="url(#...)"`."""
    tile = element("rect", width=8, height=8, fill=swatch.colour(theme))
    lines = element("path", d=swatch.pattern, fill="none", stroke=swatch.ink(theme), stroke_opacity=0.55)
    return element("pattern", tile, lines, id=identifier, width=8, height=8, patternUnits="userSpaceOnUse")


def chip(swatch: Swatch, theme: Theme = LIGHT) -> str:
    """A swatch as a small picture: colour and letter on the left, pattern on the right."""
    colour, ink = swatch.colour(theme), swatch.ink(theme)
    body = element("rect", x=0.5, y=0.5, width=35, height=17, rx=3, fill="url(#p)", stroke=theme.line)
    plain = element("rect", x=1, y=1, width=17, height=16, rx=2.5, fill=colour)
    letter = words(swatch.letter, 9.5, 13, fill=ink, font_size=12, font_weight=600, text_anchor="middle")
    return document(36, 18, element("defs", pattern("p", swatch, theme)), body, plain, letter)
