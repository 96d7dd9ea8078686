"""The references against the model: the table's own arithmetic and the decoded columns, on random input."""

import numpy as np

from snpbook.exercises.reverse_map_table import decode, double_mappings, rmp_end
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.rmp import RMP_ENTRY


def test_decode_equals_the_layout() -> None:
    rng = np.random.default_rng(2)
    for low in rng.integers(0, 1 << 64, 500, np.uint64).tolist():
        entry = RMP_ENTRY.unpack(low.to_bytes(8, "little") + bytes(8))
        assert decode(low) == {
            "asid": entry.asid, "gpa": entry.gfn << 12, "pages": 512 if entry.page_size else 1,
            "validated": bool(entry.validated),
        }  # fmt: skip


def test_the_end_of_the_table_is_the_documents() -> None:
    assert rmp_end(0x10_0000, 4 << 30) == 0x110_3FFF
    for memory in range(4096, 4096 * 2000, 4096 * 37):
        where = RmpRange(0x10_0000, rmp_end(0x10_0000, memory))
        assert where.fits(1 << 52)
        assert 0 <= where.entries - memory // 4096 < 512


def test_double_mappings_equal_a_count() -> None:
    rng = np.random.default_rng(5)
    fields = [
        {
            "assigned": 1,
            "validated": int(rng.integers(2)),
            "asid": int(rng.integers(1, 3)),
            "gfn": int(rng.integers(40)),
        }
        for _ in range(120)
    ]
    words = np.frombuffer(b"".join(RMP_ENTRY.pack(**entry) for entry in fields), "<u8").reshape(-1, 2)
    valid = [(entry["asid"], entry["gfn"]) for entry in fields if entry["validated"]]
    assert double_mappings(words) == sorted({pair for pair in valid if valid.count(pair) > 1})
