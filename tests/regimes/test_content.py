"""What a guest reads after private, shared, private: with and without a punch, on each back end."""

from __future__ import annotations

import pytest

from snpbook.regimes.content import Found, flip
from tests.host.regimes import CELLS, ENCRYPTED, FIRST, PAGE, PRIVATE_FILES, Regime

NEW, SAME = (0, False), (0, True)
"""PVALIDATE: the page was not validated; nothing changed."""
KEPT = {
    ("sev", "registered"): (Found.NOISE, None),
    ("sev-es", "registered"): (Found.NOISE, None),
    ("snp", "registered"): (Found.NOISE, NEW),
    ("sev", "lazy"): (Found.SECRET, None),
    ("sev-es", "lazy"): (Found.SECRET, None),
    ("snp", "restricted"): (Found.SECRET, NEW),  # the entry is made anew, the ciphertext is not
    ("snp", "guest_memfd"): (Found.SECRET, SAME),
    ("plain", "guest_memfd"): (Found.SECRET, None),
    ("plain", "null"): (Found.SECRET, None),
}
PUNCHED: dict[tuple[str, str], tuple[Found, tuple[int, bool] | None]] = {
    **{(kind, backend): (Found.NOISE, NEW if kind == "snp" else None) for kind, backend in ENCRYPTED},
    ("plain", "guest_memfd"): (Found.ZEROS, None),
    ("plain", "null"): (Found.ZEROS, None),
}
ZEROED = [("snp", "guest_memfd"), ("plain", "guest_memfd"), ("plain", "null")]


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_without_a_punch(kind: str, backend: str) -> None:
    found = flip(kind, backend, discard=False)
    assert (found.found, found.pvalidate) == KEPT[kind, backend]
    assert found.kept, "one frame all along"


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_with_a_punch(kind: str, backend: str) -> None:
    found = flip(kind, backend, discard=True)
    assert (found.found, found.pvalidate) == PUNCHED[kind, backend]


@pytest.mark.parametrize("backend", ["registered", "restricted", "guest_memfd"])
def test_a_guest_that_rescinds_first_accepts_the_old_page(backend: str) -> None:
    """As Linux does: PVALIDATE changes something then, so that only the contents tell that the page is the old one."""
    found = flip("snp", backend, discard=False, rescind=True)
    assert found.pvalidate == NEW
    assert found.found is (Found.NOISE if backend == "registered" else Found.SECRET)


@pytest.mark.parametrize(("kind", "backend"), ZEROED)
def test_new_pages_of_these_are_the_hosts_zeros(kind: str, backend: str) -> None:
    assert flip(kind, backend, discard=True).raw_zeros


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_what_somebody_left_in_the_frame(kind: str, backend: str) -> None:
    """The series gives pages out as they are, and the guest reads that, decrypted; Linux zeroes them."""
    regime, page = Regime(kind, backend), range(FIRST, FIRST + 1)
    regime.guest.launch()
    memory, dram = regime.host.memory, regime.system.machine.dram
    for pages in memory.holes(range(memory.end))[:20]:
        for frame in pages[:4]:
            dram.write(frame * PAGE, b"left over")
    regime.convert(page, private=True)
    regime.use(page)
    (frame,) = regime.frames(page).tolist()
    assert dram.read(frame * PAGE, 9) == (bytes(9) if backend == "guest_memfd" else b"left over")


def test_a_page_in_place_is_whole_where_the_vmm_keeps_off() -> None:
    """The C-bit flips to and fro, and the ciphertext stays."""
    assert flip("sev", "registered", discard=True, vmm_writes=False).found is Found.SECRET


@pytest.mark.parametrize(("backend", "found"), [
    ("registered", Found.NOTHING), ("restricted", Found.NOTHING), ("guest_memfd", Found.SECRET),
])  # fmt: skip
def test_what_happens_to_a_guest_that_does_not_validate_again(backend: str, found: Found) -> None:
    """Only guest_memfd leaves the page as it was, validated bit and all."""
    assert flip("snp", backend, discard=False, accept=False).found is found
    assert flip("snp", backend, discard=True, accept=False).found is Found.NOTHING
