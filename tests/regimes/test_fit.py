"""How many guests fit on a host: what runs, against arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest

from snpbook.regimes.fit import filling, guests_that_fit
from snpbook.regimes.regime import Regime
from snpbook.system import System
from tests.host.regimes import CELLS, ENCRYPTED

PAGES, IMAGE, USED = 4096, 16, 1536 * 55 // 100
"""Of a guest of 16 MiB that uses 55 per cent of its 6 MiB behind the firmware."""
METADATA = 31
"""Pages of the sections that an SNP launch adds."""
COST = {
    ("sev", "registered"): PAGES + IMAGE,
    ("sev-es", "registered"): PAGES + IMAGE,
    ("snp", "registered"): PAGES + IMAGE,
    ("sev", "lazy"): USED + 2 * IMAGE,  # the VMM loads the image, the launch copies it
    ("sev-es", "lazy"): USED + 2 * IMAGE,
    ("snp", "restricted"): USED + 2 * (IMAGE + METADATA),  # the series copies every page of the launch
    ("snp", "guest_memfd"): USED + 2 * IMAGE + METADATA + 2,  # Linux those with contents: secrets and CPUID besides
    ("plain", "guest_memfd"): USED + IMAGE,
    ("plain", "null"): USED + IMAGE,
}
KERNEL = 16
"""At most so many pages hold a guest's nested tables, VMCB, VMSA, context and `kvm_run`."""


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_the_number_is_the_hosts_memory_by_a_guests(kind: str, backend: str) -> None:
    system = System("milan", "regimes", installed=64 << 20)
    system.host.registered_snp = (kind, backend) == ("snp", "registered")
    system.host.boot("rfc-v7" if backend in ("lazy", "restricted", "null") else "mainline")
    free, cost = system.host.memory.free, COST[kind, backend]
    found = guests_that_fit(kind, backend, touched=55, installed="64 MiB")
    assert found == free // cost == free // (cost + KERNEL)
    overcommitted = found * PAGES > free
    assert overcommitted == (backend != "registered")


def test_registered_memory_counts_whole_whatever_is_used() -> None:
    assert {guests_that_fit("sev", "registered", touched=percent, installed="64 MiB") for percent in (0, 100)} == {1}
    assert guests_that_fit("sev", "lazy", touched=100, installed="64 MiB") == 4


def test_small_guests_run_out_of_asids_first() -> None:
    """Milan has 99 for SEV-ES and SNP."""
    *_, last = filling("sev-es", "lazy", touched=0, installed="64 MiB")
    assert (last.guests, "an ASID is free" in last.refused) == (99, True)


def test_how_it_fills() -> None:
    found = list(filling("snp", "guest_memfd", touched=55, installed="64 MiB"))
    assert [each.guests for each in found] == [*range(1, len(found)), len(found) - 1]
    spent = {before.free - after.free for before, after in pairwise(found[:-1])}
    assert len(spent) == 1, "each guest takes as much as the one before"
    assert [bool(each.refused) for each in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("touched", [-1, 101])
def test_shares_that_cannot_be(touched: int) -> None:
    with pytest.raises(ValueError, match="0 to 100 per cent"):
        next(filling("snp", "guest_memfd", touched=touched))


def test_all_cells_are_costed() -> None:
    assert set(COST) == set(CELLS) >= set(ENCRYPTED)
    assert len(Regime("sev", "lazy").pages) == 1536
