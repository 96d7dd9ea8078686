"""The chapter on the reverse map table: a desk to change entries, and pages in every state to access."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.explorer import Explanation, explain_guest, explain_host
from snpbook.hardware.workbench import SHARED_WINDOW, Workbench
from snpbook.labs.specimens import specimens
from snpbook.spec.pages import PAGE_SHIFT, PageState
from snpbook.views.entry import entry
from snpbook.views.explorer import survey
from snpbook.views.static import Static
from snpbook.widgets.access_explorer import AccessExplorer, Specimen
from snpbook.widgets.rmp_desk import RmpDesk

_ASID, _PLAIN = 1, 3


class Lab:
    """Two machines of a product: `desk` works on one, `explorer` looks at the other, where nothing changes."""

    def __init__(self, product: str = "milan") -> None:
        self.bench = Workbench(product)
        self.desk = RmpDesk(self.bench)
        other = Workbench(product)
        guest, plain = other.guest(_ASID), other.guest(_PLAIN, snp=False)
        self.explorer = AccessExplorer(other, guest, plain, specimens(other, guest, plain))

    def __repr__(self) -> str:
        return f"Lab({self.bench!r})"

    def state(self, page: int) -> PageState:
        """The state of a page of the desk's machine."""
        return self.bench.machine.rmp.state(page)

    @contextmanager
    def busy(self, page: int) -> Iterator[None]:
        """While this lasts, a vCPU of the desk's machine runs whose VMSA is that page."""
        self.bench.machine.in_use.add(page)
        try:
            yield
        finally:
            self.bench.machine.in_use.discard(page)

    def survey(self) -> Static:
        """Every page of the explorer, accessed in the ways that matter."""
        machine, guest = self.explorer.bench.machine, self.explorer.bench.guest(_ASID)
        read, write = AccessKind.READ, AccessKind.WRITE

        def accesses(one: Specimen) -> dict[str, Explanation]:
            gpa, spa = one.gfn << PAGE_SHIFT, one.page << PAGE_SHIFT
            return {
                "guest reads": explain_guest(guest.core(), gpa, read),
                "guest writes": explain_guest(guest.core(), gpa, write),
                "VMPL1 writes": explain_guest(guest.core(1), gpa, write),
                "guest writes, C-bit 0": explain_guest(guest.core(), SHARED_WINDOW + gpa, write),
                "host reads": explain_host(machine, spa, read),
                "host writes": explain_host(machine, spa, write),
            }

        return survey({one.name: accesses(one) for one in self.explorer.specimens})

    def entry(self, page: int) -> Static:
        """A raw entry of the desk's machine, bit by bit."""
        low, high = (int(word) for word in self.bench.host.rmp_words(range(page, page + 1))[0])
        return entry((low, high), f"RMP entry of page {page:#x}")
