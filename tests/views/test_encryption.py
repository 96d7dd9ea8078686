from dataclasses import replace

import numpy as np
import pytest

from snpbook.hardware.cache import LINE
from snpbook.hardware.tweaks import boot_constants, naples_constants
from snpbook.spec.encryption import KEY_RULES
from snpbook.spec.products import product
from snpbook.views.encryption import cache_lines, constants, generations, key_rules
from tests.views.reading import read


def test_generations_mark_what_is_unconfirmed() -> None:
    view = generations([product("naples"), product("rome"), product("genoa")])
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in view.text.splitlines()[3:6]]
    assert rows == [
        ["EPYC 7001 (Naples)", "AES-128 XEX", "bit 47", "43 bits", "15", "no"],
        ["EPYC 7002 (Rome)", "AES-128 XEX ?", "bit 47", "43 bits", "509", "no"],
        ["EPYC 9004 (Genoa)", "AES-256 XTS", "bit 51", "46 bits", "1,006", "yes"],
    ]
    read(view.html)


@pytest.mark.parametrize(
    ("field", "value"),
    [("c_bit", "bit 47"), ("asid_limit", "15"), ("physical_bits", "43 bits"), ("address_reduction", "43 bits")],
)
def test_every_value_of_a_generation_can_be_marked(field: str, value: str) -> None:
    row = generations([replace(product("naples"), unconfirmed=(field,))]).text.splitlines()[3]
    assert [cell.strip() for cell in row.split("  ") if cell.endswith(" ?")] == [f"{value} ?"]


def test_constants_say_where_they_come_from() -> None:
    naples = constants(naples_constants()[:4], "Naples").text
    assert naples.splitlines()[3].split() == ["t4", "0x10", *["82253838"] * 4, "published"]
    assert naples.splitlines()[6].endswith("stand-in")
    assert "stand-in: " in naples
    assert "stand-in" not in constants(boot_constants(b"x")[:4], "Rome").text


def test_every_rule_is_a_row() -> None:
    lines = key_rules().text.splitlines()
    assert len(lines) == len(KEY_RULES) + 4
    assert lines[3].startswith("host, guest without SEV")
    assert lines[-2].split()[-4:] == ["1", "any", "the", "guest's"]


def test_lines_of_a_cache() -> None:
    lines = np.array([(0xA000, 0, False), (0xA040, 7, True)], LINE)
    assert [line.split() for line in cache_lines(lines).text.splitlines()[3:]] == [
        ["0xa000", "none", "clean"], ["0xa040", "key", "of", "ASID", "7", "dirty"],
    ]  # fmt: skip
    assert cache_lines(lines[:0]).text == "No line in the cache"
