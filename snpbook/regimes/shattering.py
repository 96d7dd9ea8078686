"""2 MB pages under an SNP guest of the v7 series: how they come about, and what takes them apart.

Sources: RFC v7 patches 41, 51, 55; UPM v10 (pages of the order of the file's huge pages).
"""

from __future__ import annotations

from collections.abc import Iterator

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.ledger import Sample
from snpbook.host.page_moves import fragment
from snpbook.regimes.regime import FIRST, Regime
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.private_memory import Backend


def shattering(*, fragmented: bool = False) -> Iterator[Sample]:
    """A sample after each step: 4 MB converted, validated in small and in large pages, one page of it made shared.

    On a host whose memory is `fragmented` no 2 MB are free in a row, and all pages are small from the begin.
    """
    regime = Regime("snp", Backend.RESTRICTED, huge=True, discard=False)
    if fragmented:
        fragment(regime.host.memory)
    small, large = (range(start, start + PAGES_PER_LARGE) for start in (FIRST, FIRST + PAGES_PER_LARGE))
    regime.guest.launch()
    yield regime.sample("launched")
    regime.convert(range(small.start, large.stop), private=True)
    yield regime.sample("4 MB converted")

    async def validate(cpu: GuestCpu) -> None:
        await cpu.pvalidate(large.start << PAGE_SHIFT, 1, large=True)

    regime.guest.run(validate)
    yield regime.sample("2 MB validated at once")
    regime.pvalidate(small.start)
    yield regime.sample("4 KB of the other 2 MB validated")
    regime.convert(large[7:8], private=False)
    yield regime.sample("4 KB made shared")
