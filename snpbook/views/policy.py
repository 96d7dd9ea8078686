"""A guest policy bit by bit: what the owner demands or allows."""

from __future__ import annotations

from snpbook.spec.layout import Layout
from snpbook.views.static import Static
from snpbook.views.tables import table


def policy(layout: Layout, value: int, verdict: str) -> Static:
    """The fields of a policy, with their meaning, and what came of a launch with it."""
    record = layout.unpack(value.to_bytes(layout.size, "little"))
    rows = []
    for name, field in layout.fields.items():
        first, last = field.first_bit, field.first_bit + max(field.width, 8 * field.size * (field.kind == "uint")) - 1
        place = f"bit {first}" if first == last else f"bits {first}..{last}"
        rows.append((place, name, str(getattr(record, name)), field.note))
    return table(f"Policy {value:#x}", ["where", "field", "value", "meaning"], rows, mono=["value"], note=verdict)
