"""The chapter on the inside of a guest: its boot, the GHCB theatre, two eyes on one page, acceptance over time."""

from __future__ import annotations

from functools import cached_property

from snpbook.exercises.accepted_once import REPLAY, played
from snpbook.exercises.boot_requests import acceptance_costs, attested, attested_boots, boot_requests
from snpbook.exercises.replay import replayed
from snpbook.guest.boot import Acceptance
from snpbook.regimes.attested_boot import AttestedBoot
from snpbook.system import Guest, System
from snpbook.views.host_state import dmesg
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.widgets.acceptance_race import AcceptanceRace
from snpbook.widgets.ghcb_theatre import GhcbTheatre
from snpbook.widgets.page_eyes import PageEyes

INSTALLED = 256 << 20


class Lab:
    """`system` runs the guests of the chapter; `theatre`, `eyes` and `race` have guests of their own."""

    def __init__(self, product: str = "milan", seed: str = "inside the guest") -> None:
        self.system = System(product, seed, installed=INSTALLED, cores=2)
        self.system.host.boot("mainline")

    def __repr__(self) -> str:
        return f"Lab({self.system!r})"

    def launch(self, kind: str = "snp", memory: str = "12 MiB") -> Guest:
        """A guest that has been launched, the last one gone."""
        for guest in self.system.guests:
            guest.vmm.close()
        self.system.guests.clear()
        guest = self.system.create_vm(kind=kind, memory=memory)
        guest.launch()
        return guest

    def boot(self, guest: Guest, acceptance: str = Acceptance.EAGER) -> Static:
        """Boot it: what it asks its host for."""
        return boot_requests(guest, acceptance)

    def dmesg(self, guest: Guest) -> Static:
        """The messages of the guest's kernel, as its user reads them."""
        return dmesg("\n".join(guest.dmesg))

    def acceptance_costs(self, memory: str = "64 MiB", whole: str = "64 GiB") -> Static:
        """What it takes to accept `memory`, counted on guests, and what it would take for `whole`, by arithmetic."""
        return acceptance_costs(memory, whole)

    def game(self) -> Static:
        """The moves of the game in which a page is validated twice, on paper."""
        who = {"map": "host", "validate": "guest", "write": "guest", "read": "guest"}
        rows = [(str(n), who[what], " ".join([what, *rest]), "?" * (what == "read"))
                for n, (what, *rest) in enumerate(REPLAY, 1)]  # fmt: skip
        return table("The game", ["move", "by", "what", "what comes of it"], rows)

    def run_game(self) -> list[str]:
        """What came of the accesses, on a machine."""
        return played(REPLAY)

    def replay(self, *, validates_at_faults: bool) -> str:
        """The same game played against a guest that runs, and what its program reads at the end."""
        return replayed(validates_at_faults=validates_at_faults)

    def above_svsm(self) -> AttestedBoot:
        """A guest with an SVSM, from its launch to an attested workload."""
        return attested(Acceptance.LAZY, svsm=True)

    def attested(self) -> Static:
        """Three guests from launch to an attested workload, and what it cost each."""
        return attested_boots()

    @cached_property
    def theatre(self) -> GhcbTheatre:
        return GhcbTheatre()

    @cached_property
    def eyes(self) -> PageEyes:
        return PageEyes()

    @cached_property
    def race(self) -> AcceptanceRace:
        return AcceptanceRace()
