"""`python -m snpbook.tools.layers`: draw `docs/layers.svg`, the picture of the packages and who may see whom.

Rows follow the layers of the import contract in `pyproject.toml`, so the picture cannot disagree with the rule that
the tests keep. Every text stands on a box of its own colour, which reads the same on a light and on a dark page.
"""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "layers.svg"

SAYS = {
    "labs": "what a notebook imports",
    "cli": "snpbook measure, report ...",
    "testing": "fakes for your tests",
    "tools": "notebooks, data, speed",
    "widgets": "live forms of the views",
    "exercises": "checks, hints, answers",
    "views": "state to HTML, SVG, text",
    "evidence": "good and broken reports",
    "attacks": "the malicious host",
    "regimes": "ways to keep private memory",
    "system": "one machine, its host, its guests",
    "vendor": "AMD: roots, chips, certificates",
    "host": "kernel, KVM, VMM",
    "guest": "inside the encrypted VM",
    "attest": "the relying party",
    "firmware": "AMD-SP: keys and SNP commands",
    "hardware": "DRAM, encryption, RMP, instructions",
    "trace": "what happened, as events",
    "spec": "layouts, numbers, tables, citations",
}
SEES = {
    "attacks": "the powers of host and hardware, nothing else",
    "vendor": "sees firmware.keys",
    "host": "sees hardware, not the guest",
    "guest": "sees hardware, not the host",
    "attest": "sees spec and nothing else",
}
PARTIES = {"vendor", "host", "guest", "attest", "attacks", "firmware", "hardware"}

WIDTH, ROW, LINE, GAP, MARGIN = 900, 50, 19, 8, 16
PAGE, PARTY, PLAIN, INK = "#ffffff", "#cfe8f7", "#eceff1", "#1a1a1a"


def layers() -> list[list[str]]:
    """The packages of each layer, top first, as the import contract lists them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = next(one for one in project["tool"]["importlinter"]["contracts"] if one["id"] == "layers")
    return [layer.split(" | ") for layer in contract["layers"]]


def svg() -> str:
    """The picture, the same text for the same contract."""
    rows = layers()
    boxes: list[str] = []
    top = MARGIN
    for row in rows:
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        height = ROW + LINE * any(name in SEES for name in row)
        for place, name in enumerate(row):
            left = MARGIN + place * (width + GAP)
            fill = PARTY if name in PARTIES else PLAIN
            frame = f'x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="4" stroke="{INK}"'
            boxes.append(f'<rect {frame} fill="{fill}"/>')
            lines = [(name, 'font-size="16" font-weight="bold"'), (SAYS[name], 'font-size="13"')]
            if name in SEES:
                lines.append((SEES[name], 'font-size="12" font-style="italic"'))
            for index, (text, style) in enumerate(lines, 1):
                middle, base = left + width / 2, top + 3 + index * LINE
                boxes.append(f'<text x="{middle:g}" y="{base}" {style}>{escape(text)}</text>')
        top += height + GAP
    bottom = top - GAP + MARGIN
    told = "; ".join(", ".join(row) for row in rows)
    size = f'viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}"'
    style = f'font-family="system-ui, sans-serif" fill="{INK}" text-anchor="middle"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>',
        "<title>The layers of snpbook: imports run downwards only</title>",
        f"<desc>From top to bottom: {escape(told)}.</desc>",
        f'<rect width="{WIDTH}" height="{bottom}" rx="8" fill="{PAGE}"/>',
        *boxes,
    ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg())
