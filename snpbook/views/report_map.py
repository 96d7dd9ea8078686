"""The report as a byte map: every byte in the colour of its field, and the fields with their values.

Where a field lies comes from `spec.report` alone.
"""

from __future__ import annotations

from enum import Enum

from snpbook.attest.parse import Report
from snpbook.spec.report import ATTESTATION_REPORT, SIGNED_SIZE
from snpbook.views.palette import GROUND, LIGHT, PAGES
from snpbook.views.static import Static
from snpbook.views.svg import MONO, document, element, image, words
from snpbook.views.tables import Markup, table

_ROW, _CELL, _LEFT, _TOP, _TALL = 32, 19, 52, 22, 15


def report_map(raw: bytes) -> Static:
    """The map and the table; bytes to which the report's version gives no field are grey."""
    report = Report.parse(raw)
    rows = [(name, ATTESTATION_REPORT.fields[name].where, _show(value)) for name, value in report.named.items()]
    signed = f"Signed: bytes 0 to {SIGNED_SIZE - 1:#x}. Source: {ATTESTATION_REPORT.cite}"
    listing = table(
        "Attestation report, 1184 bytes", ["field", "place", "value"], rows, mono=["place", "value"], note=signed
    )
    alt = (
        f"Byte map of an attestation report of version {report.fields.version}: 37 rows of 32 bytes, coloured by field."
    )
    return Static(listing.text, Markup(image(_picture(report), alt), alt) + listing.html)


def _picture(report: Report) -> str:
    owners = [""] * len(report.raw)
    for name in report.named:
        field = ATTESTATION_REPORT.fields[name]
        owners[field.offset : field.offset + field.size] = [name] * field.size
    shapes, fills = [], (LIGHT.surface, PAGES[GROUND].light)
    style = {"font_family": MONO, "font_size": 10, "fill": LIGHT.quiet}
    height = _TOP + len(owners) // _ROW * _TALL
    for start in range(0, len(owners), _ROW):
        y = _TOP + start // _ROW * _TALL
        shapes.append(words(f"{start:#05x}", 4, y + 11, **style))
        for first, end in _runs(owners, start):
            x, width = _LEFT + (first - start) * _CELL, (end - first) * _CELL
            fill = fills[0] if owners[first] else fills[1]
            shapes.append(element("rect", x=x, y=y, width=width, height=_TALL, fill=fill, stroke=LIGHT.line))
            name = owners[first]
            if len(name) * 6 <= width:
                shapes.append(words(name, x + width / 2, y + 11, font_size=10, text_anchor="middle"))
    signed = _TOP + SIGNED_SIZE // _ROW * _TALL
    shapes.append(element("rect", x=_LEFT - 3, y=signed - 1, width=_ROW * _CELL + 6, height=2, fill=LIGHT.quiet))
    shapes.append(words("above the line: signed", _LEFT, 14, **style))
    return document(_LEFT + _ROW * _CELL + 8, height + 6, *shapes)


def _runs(owners: list[str], start: int) -> list[tuple[int, int]]:
    """The runs of bytes of one field in a row."""
    cuts = [at for at in range(start, start + _ROW) if at == start or owners[at] != owners[at - 1]]
    return list(zip(cuts, [*cuts[1:], start + _ROW], strict=True))


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() if any(value) else f"{len(value)} bytes of zeros"
    if isinstance(value, Enum):
        return f"{value.value} ({value.name})"
    return f"{value:#x}" if isinstance(value, int) else str(value)
