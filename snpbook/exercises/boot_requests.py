"""What a guest asks of its host on the way from the reset vector to its kernel, and what its memory costs in all.

The host hears each request in its order; the costs are those of guests that accepted much memory, or that went on to
an attested workload.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest.boot import Acceptance
from snpbook.hardware.exits import Npf, Vmgexit
from snpbook.regimes.acceptance import LENGTHS, accept, lists_of
from snpbook.regimes.attested_boot import AttestedBoot, attested_boot
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.private_memory import Backend
from snpbook.spec.sizes import parse_size
from snpbook.system import Guest
from snpbook.views.static import Static
from snpbook.views.tables import table


def boot_requests(guest: Guest, acceptance: str = Acceptance.EAGER) -> Static:
    """Boot a guest that has been launched: its exits, those of one kind in a row together."""
    heard: list[tuple[str, str]] = []

    def listen(moment: Moment) -> None:
        if moment.stage is not Stage.EXIT:
            return
        match moment.exit:
            case Vmgexit() if moment.event is not None:
                heard.append(("GHCB page", moment.event.name))
            case Vmgexit() if moment.code is not None:
                heard.append(("GHCB MSR", moment.code.name.removesuffix("_REQUEST")))
            case Npf():
                heard.append(("automatic", "nested page fault"))
            case other:
                heard.append(("automatic", other.code.name))

    cpu = guest.system.host.cpu
    tamper(guest, listen)
    try:
        guest.boot(acceptance)
    finally:
        guest.system.host.cpu = cpu
    rows = [(how, what, f"{len(list(run)):,}") for (how, what), run in groupby(heard)]
    note = "automatic: the processor leaves the guest by itself. Since SEV-ES the host sees no register in any exit."
    return table("What the guest asked while it booted", ["by", "what", "times in a row"], rows, note=note)


@cache
def attested(acceptance: str, *, svsm: bool = False) -> AttestedBoot:
    """A guest from its launch to an attested workload, run once."""
    return attested_boot(acceptance=acceptance, svsm=svsm)


def attested_boots() -> Static:
    """Guests from launch to an attested workload, eager and lazy, and one with an SVSM: exits and validations."""
    rows = []
    for svsm, when in ((False, Acceptance.EAGER), (False, Acceptance.LAZY), (True, Acceptance.LAZY)):
        made = attested(when, svsm=svsm)
        costs = [(part.requests, part.faults, part.validated) for part in (made.boot, made.work)]
        sums = [f"{boot + work:,}" for boot, work in zip(*costs, strict=True)]
        rows.append(("with an SVSM" if svsm else "at VMPL0", when.value, *sums, made.verdict.outcome.value))
    head = ["guest", "acceptance", "requests", "page faults", "pages validated", "verdict"]
    return table("From launch to an attested workload", head, rows, mono=head[2:5])


def acceptance_costs(memory: str, whole: str) -> Static:
    """Guests that accept `memory` by pages of 4 KB and of 2 MB; beside them, by arithmetic, the lists for `whole`."""
    hosts = ((Backend.GUEST_MEMFD, False, False), (Backend.GUEST_MEMFD, True, False), (Backend.RESTRICTED, True, True))
    rows = []
    for backend, large, huge in hosts:
        made = accept(backend, memory, large=large, huge=huge)
        counts = (made.lists, made.pvalidates, made.mismatches)
        sums = [lists_of(parse_size(whole) // PAGE_SIZE, entries, large=large) for entries in reversed(LENGTHS)]
        name = f"{backend.value}{', huge pages' * huge}"
        rows.append((name, "2 MB" if large else "4 KB", *(f"{number:,}" for number in (*counts, *sums))))
    head = ["private memory", "entries of", "lists", "PVALIDATEs", "answered 6",
            *(f"{whole}: lists of {entries}" for entries in reversed(LENGTHS))]  # fmt: skip
    note = f"Lists of up to {max(LENGTHS)} entries, but for the last column. Those of {whole} are reckoned, not run."
    return table(f"Acceptance of {memory}, counted", head, rows, mono=head[2:], note=note)
