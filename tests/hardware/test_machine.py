"""The board: where memory and the table lie, for machines of every size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.machine import MemoryMap
from tests.hardware.guests import Bench

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
HOLE = (0xFD_0000_0000, 0xFE_0000_0000)
TSEG = 16 * MIB

near = [64 * MIB, 2 * GIB, 0xFD_0000_0000 - 2 * GIB, TIB]
sizes = st.one_of(
    st.builds(lambda base, step: base + step * 2 * MIB, st.sampled_from(near), st.integers(0, 40)),
    st.integers(32, 4 * TIB // (2 * MIB)).map(lambda count: count * 2 * MIB),
)


@given(installed=sizes)
def test_every_byte_is_somewhere_and_the_table_covers_it(installed: int) -> None:
    memory = MemoryMap.of(installed)
    assert sum(end - start for start, end in memory.dram) == installed
    starts = [0, 4 * GIB, HOLE[1]][: len(memory.dram)]
    assert [start for start, _ in memory.dram] == starts
    for start, end in memory.dram:
        assert end <= 2 * GIB or start >= 4 * GIB
        assert end <= HOLE[0] or start >= HOLE[1]
    rmp, low = memory.rmp, memory.dram[0][1]
    assert memory.tseg == (low - TSEG, low)
    assert rmp.base % MIB == (rmp.end + 1) % MIB == 0
    assert rmp.entries * 4096 >= memory.top
    assert any(start <= rmp.base and rmp.end < end for start, end in memory.dram)
    assert rmp.end < memory.tseg[0] or rmp.base >= memory.tseg[1]


@pytest.mark.parametrize("installed", [0, 62 * MIB, 64 * MIB + 4096, -64 * MIB])
def test_sizes_that_no_machine_has(installed: int) -> None:
    with pytest.raises(ValueError, match="a machine has a multiple of 2 MB, at least 64 MB"):
        MemoryMap.of(installed)


def test_a_size_that_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"installed = 67108864\.0: an integer"):
        MemoryMap.of(64.0 * MIB)  # type: ignore[arg-type]


def test_a_terabyte_reaches_the_hole() -> None:
    memory = MemoryMap.of(TIB)
    assert memory.dram == ((0, 2 * GIB), (4 * GIB, HOLE[0]), (HOLE[1], TIB + 2 * GIB + HOLE[1] - HOLE[0]))


def test_what_is_dram() -> None:
    machine = Bench().machine
    pages = {0: True, 64 * MIB // 4096 - 1: True, 64 * MIB // 4096: False, 3 * GIB // 4096: False}
    assert {page: machine.is_dram(page) for page in pages} == pages
    assert repr(machine) == "Machine(milan, 0 GiB of addresses, SNP on)"
