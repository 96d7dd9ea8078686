"""What a guest asks of its host on the way from the reset vector to its kernel, and what that way costs in all.

The host hears each request in its order; the costs are those of guests that went on to an attested workload.
"""

from __future__ import annotations

from itertools import groupby

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest.boot import Acceptance
from snpbook.hardware.exits import Npf, Vmgexit
from snpbook.regimes.attested_boot import attested_boot
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


def attested_boots() -> Static:
    """Guests from launch to an attested workload, eager and lazy, and one with an SVSM: exits and validations."""
    rows = []
    for svsm, when in ((False, Acceptance.EAGER), (False, Acceptance.LAZY), (True, Acceptance.LAZY)):
        made = attested_boot(acceptance=when, svsm=svsm)
        costs = [(part.requests, part.faults, part.validated) for part in (made.boot, made.work)]
        sums = [f"{boot + work:,}" for boot, work in zip(*costs, strict=True)]
        rows.append(("with an SVSM" if svsm else "at VMPL0", when.value, *sums, made.verdict.outcome.value))
    head = ["guest", "acceptance", "requests", "page faults", "pages validated", "verdict"]
    return table("From launch to an attested workload", head, rows, mono=head[2:5])
