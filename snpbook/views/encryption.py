"""Memory encryption as tables: the generations, the constants of a tweak, who decides on a key, the lines of a cache.

The facts come from `spec` and from the machine's own engine and cache; this file only chooses words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.tweaks import Origin, TweakConstant
from snpbook.spec.encryption import KEY_RULES, SCHEMES, Context, KeySource, Kind
from snpbook.spec.products import Product
from snpbook.views.microscope import key_name
from snpbook.views.static import Static
from snpbook.views.tables import table

_CONTEXTS = {
    Context.HOST: "host", Context.GUEST: "guest without SEV", Context.SEV: "SEV", Context.SEV_ES: "SEV-ES",
    Context.SNP: "SNP guest",
}  # fmt: skip
_KINDS = {
    Kind.DATA: "data", Kind.FETCH: "instruction fetch", Kind.GUEST_WALK: "walk of its page tables",
    Kind.NESTED_WALK: "walk of the nested tables",
}  # fmt: skip
_SOURCES = {KeySource.NONE: "none", KeySource.HOST: "the host's", KeySource.GUEST: "the guest's"}


def generations(products: Sequence[Product]) -> Static:
    """What each product does to memory; a question mark stands at what no source states."""
    rows = [
        (
            chip.title,
            SCHEMES[chip.encryption].title + _mark(chip, "encryption"),
            f"bit {chip.c_bit}" + _mark(chip, "c_bit"),
            f"{chip.encrypted_physical_bits} bits" + _mark(chip, "physical_bits", "address_reduction"),
            f"{chip.asid_limit:,}" + _mark(chip, "asid_limit"),
            ("yes" if chip.coherent else "no") + _mark(chip, "capabilities"),
        )
        for chip in products
    ]
    head = ["product", "cipher", "C-bit", "physical address", "guest keys", "caches coherent across keys"]
    return table("Memory encryption by generation", head, rows, note="? unconfirmed: no source states it")


def _mark(chip: Product, *fields: str) -> str:
    """What stands behind a value that one of these fields of the product decides."""
    return " ?" * any(field in chip.unconfirmed for field in fields)


def constants(some: Iterable[TweakConstant], title: str) -> Static:
    """Constants of a linear tweak: the XOR of those whose address bit is set is the tweak of a block."""
    rows = [(f"t{c.bit}", f"{1 << c.bit:#x}", c.value.hex(" ", 4), str(c.origin)) for c in some]
    head = ["constant", "address bit", "value", "origin"]
    note = "stand-in: the model's own, it is not published" if any(row[3] == Origin.STAND_IN for row in rows) else ""
    return table(f"Tweak constants: {title}", head, rows, mono=head[1:3], note=note)


def key_rules() -> Static:
    """The table that says under whose key an access reaches memory."""
    rows = []
    for rule in KEY_RULES:
        who = ", ".join(_CONTEXTS[context] for context in rule.contexts)
        what = "any" if len(rule.kinds) == len(Kind) else ", ".join(_KINDS[kind] for kind in rule.kinds)
        rows.append((who, what, _bit(rule.guest_c), _bit(rule.host_c), _SOURCES[rule.source]))
    head = ["who", "access", "guest's C-bit", "host's C-bit", "key"]
    note = "The host's C-bit is that of its own or of the nested tables. Source: APM2, tables 15-30 and 15-31"
    return table("Who decides encryption", head, rows, note=note)


def cache_lines(lines: NDArray[np.void]) -> Static:
    """The lines that a cache holds, an array of `hardware.cache.LINE`."""
    rows = [
        (f"{int(line['spa']):#_x}", key_name(int(line["key_id"])), "dirty" if line["dirty"] else "clean")
        for line in lines
    ]
    if not rows:
        return Static("No line in the cache", "<p>No line in the cache.</p>")
    return table("Lines in the cache", ["address", "key", "state"], rows, mono=["address"])


def _bit(value: bool | None) -> str:
    return "any" if value is None else str(int(value))
