"""Ciphertext hiding on a machine: the host reads a pattern instead of a hidden guest's pages; nothing else changes."""

import numpy as np
import pytest

from snpbook.hardware.ports import HostCpu
from tests.hardware.guests import ASID, PAGE, Bench


@pytest.fixture
def cpu() -> HostCpu:
    """Pages 0x400 (a 2 MB entry), 0x700 of guest 5, 0x701 of guest 6, 0x702 of nobody, each with a text in DRAM."""
    bench = Bench()
    bench.assign(0x400, 0x2000, large=True)
    bench.assign(0x700, 0x3000)
    bench.assign(0x701, 0x3001, asid=ASID + 1)
    for page in (0x400, 0x4FF, 0x700, 0x701, 0x702):
        bench.machine.dram.write(page * PAGE, b"ciphertext")
    bench.machine.hidden_asids = ASID
    return bench.cpu


@pytest.mark.parametrize("page", [0x400, 0x4FF, 0x5FF, 0x700])
def test_pages_of_a_hidden_guest_read_as_a_pattern(cpu: HostCpu, page: int) -> None:
    assert cpu.read(page * PAGE + 3, 7) == b"\xff" * 7
    assert (cpu.read_pages(range(page, page + 1)) == 0xFF).all()
    assert cpu.read(page * PAGE, 4, c_bit=True) == b"\xff" * 4


@pytest.mark.parametrize("page", [0x701, 0x702])
def test_other_pages_read_as_ever(cpu: HostCpu, page: int) -> None:
    assert cpu.read(page * PAGE, 10) == b"ciphertext"
    assert cpu.read_pages(np.array([page], np.uint64))[0, :10].tobytes() == b"ciphertext"


def test_a_read_across_the_border(cpu: HostCpu) -> None:
    assert cpu.read(0x701 * PAGE - 2, 4) == b"\xff\xffci"
    assert cpu.read(0x700 * PAGE, 0) == b""


def test_it_is_off_unless_asked_for() -> None:
    bench = Bench()
    bench.assign(0x700, 0x3000)
    bench.machine.dram.write(0x700 * PAGE, b"ciphertext")
    assert bench.cpu.read(0x700 * PAGE, 10) == b"ciphertext"
