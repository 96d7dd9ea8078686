"""Exercises at the mailbox: the commands of a launch in order, which check speaks first, and a dirty ASID.

Each answer drives or predicts a secure processor of its own; what counts is read off that machine.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.firmware.bench import CONTEXT, SPARE, Bench
from snpbook.firmware.growth import ASID, begin
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY

_TWO_COMPLEXES = 9
"""Cores of a machine with two core complexes."""


def bench(*, cores: int = 2) -> Bench:
    """A machine for one case."""
    return Bench(seed="exercise", rng=np.random.default_rng(3).bytes, cores=cores)


# 1: the order of a launch

OPERANDS: Mapping[str, Mapping[str, Any]] = {
    "SNP_INIT_EX": {"init_rmp": 1},
    "SNP_DF_FLUSH": {},
    "SNP_GCTX_CREATE": {"gctx_paddr": CONTEXT},
    "SNP_LAUNCH_START": {"gctx_paddr": CONTEXT, "policy": DEFAULT_POLICY},
    "SNP_ACTIVATE": {"gctx_paddr": CONTEXT, "asid": ASID},
    "SNP_LAUNCH_UPDATE": {"gctx_paddr": CONTEXT, "page_paddr": SPARE, "page_type": LaunchPage.NORMAL},
    "SNP_LAUNCH_FINISH": {"gctx_paddr": CONTEXT},
}
"""The commands of exercise 1 with what their buffers hold."""
_HOST: Mapping[str, Callable[[Bench], object]] = {
    "WBINVD": lambda here: here.host.wbinvd(),
    "RMPUPDATE context": lambda here: here.assign(CONTEXT, FIRMWARE),
    "RMPUPDATE page": lambda here: here.assign(SPARE, NewState(assigned=True, asid=ASID, immutable=True)),
}


def carry_out(here: Bench, steps: Sequence[str]) -> dict[str, object]:
    """What comes of steps named as in exercise 1: the first refusal, the guest's state and the page's."""
    refused = ""
    for step in steps:
        if step in _HOST:
            _HOST[step](here)
            continue
        if step not in OPERANDS:
            raise ValueError(f"{step!r} is no step; there are {', '.join([*OPERANDS, *_HOST])}")
        made = here.command(Command[step], **OPERANDS[step])
        refused = refused or ("" if made.ok else f"{step}: {made.status.name}")
    guest = here.standing().guest
    return {"refused": refused, "guest": guest.name if guest is not None else "", "page": here.state(SPARE).name}


def _order_cases() -> list[Case]:
    def case(name: str, *, initialised: bool, rule: str) -> Case:
        def run(answer: Answer) -> object:
            here = bench()
            if initialised:
                here.initialise()
            steps = answer(initialised)
            return None if steps is None else carry_out(here, steps)

        wanted = {"refused": "", "guest": "RUNNING", "page": "GUEST_VALID"}
        return Case(name, run, wanted, rule, "SNP, guest launch")

    return [
        case(
            "SNP is initialised, and no ASID is dirty", initialised=True,
            rule="a context needs a firmware page; pages are added to a guest in LAUNCH that has an ASID",
        ),
        case(
            "the machine was just switched on", initialised=False,
            rule="initialisation leaves every ASID dirty: WBINVD, then SNP_DF_FLUSH, before the first SNP_ACTIVATE",
        ),
    ]  # fmt: skip


ORDER_STUB = '''\
def launch(initialised):
    """The steps from here to a running guest with one page."""
    ...  # return ["SNP_INIT_EX", ...]
'''


def launch(initialised: bool) -> list[str]:
    """The steps from here to a running guest with one page."""
    bring_up = [] if initialised else ["SNP_INIT_EX", "WBINVD", "SNP_DF_FLUSH"]
    guest = ["RMPUPDATE context", "SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE"]
    return [*bring_up, *guest, "RMPUPDATE page", "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH"]


def _no_flush(initialised: bool) -> list[str]:
    return [step for step in launch(initialised) if step not in ("WBINVD", "SNP_DF_FLUSH")]


def _activated_last(initialised: bool) -> list[str]:
    return [*(step for step in launch(initialised) if step != "SNP_ACTIVATE"), "SNP_ACTIVATE"]


ORDER = register(
    Exercise(
        id="secure_processor.1",
        title="The order of a launch",
        minutes=10,
        difficulty=1,
        prerequisites=(),
        task=(
            "Return the list of steps after which a guest is RUNNING with one page of its own, none of them refused. "
            f"Commands: {', '.join(OPERANDS)}. The host's own steps: {', '.join(_HOST)}. `initialised` says whether "
            "SNP_INIT_EX and what belongs to it is already done."
        ),
        stub=ORDER_STUB,
        reference=launch,
        wrong=(
            Wrong(_no_flush, "SNP_ACTIVATE: DF_FLUSH_REQUIRED"),
            Wrong(_activated_last, "SNP_LAUNCH_UPDATE: INACTIVE"),
        ),
        hints=(
            "The picture of an SNP guest gives the order of three commands. Which two pages must change hands before?",
            "The firmware writes only pages that are its own, and encrypts only for a guest that has an ASID, whose "
            "slot is clean.",
            "[INIT_EX, WBINVD, DF_FLUSH,] RMPUPDATE context, GCTX_CREATE, LAUNCH_START, ACTIVATE, RMPUPDATE page, "
            "LAUNCH_UPDATE, LAUNCH_FINISH.",
        ),
        solution=(
            "The context page becomes the firmware's and then a context; LAUNCH_START draws the keys, ACTIVATE puts "
            "the memory key into a clean slot, LAUNCH_UPDATE encrypts with it, LAUNCH_FINISH lets the guest run. "
            "ACTIVATE comes before the first page: an ASID that a page carries already is refused, since that page "
            "might be an earlier guest's."
        ),
        cases=_order_cases,
    )
)

# 2: which check speaks first


def _first_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Bench], object], asid: int, rule: str) -> Case:
        here = bench()
        prepare(here)
        context = here.context()
        guest = "" if context is None else context.state.name
        own = 0 if context is None else context.asid
        known = 0 < asid <= here.psp.asids.limit
        state = here.asid(asid).name if known else ""
        numbers = (here.psp.min_sev_asid, here.psp.asids.limit)
        made = here.command(Command.SNP_ACTIVATE, gctx_paddr=CONTEXT, asid=asid)
        return Case(
            name, lambda answer: answer(guest, own, asid, state, *numbers), made.status.name, rule, "SNP SNP_ACTIVATE"
        )

    def created(here: Bench) -> None:
        here.initialise().assign(CONTEXT, FIRMWARE)
        here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)

    def started(here: Bench, *, flush: bool = True) -> None:
        if not flush:
            here.command(Command.SNP_INIT_EX, init_rmp=1)
            here.assign(CONTEXT, FIRMWARE)
            here.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)
        else:
            created(here)
        here.command(Command.SNP_LAUNCH_START, gctx_paddr=CONTEXT, policy=DEFAULT_POLICY)

    return [
        case("a guest in LAUNCH, and a clean ASID", started, 1, "nothing is wrong: SUCCESS"),
        case("no context", lambda here: here.initialise(), 0, "without a guest nothing else is looked at"),
        case("a guest in INIT, and ASID 0", created, 0, "the guest's state is looked at before the ASID"),
        case("a guest in LAUNCH, and ASID 0", started, 0, "ASID 0 is the host's: 1 is the first of a guest"),
        case(
            "a guest that has the ASID already", lambda here: begin(here.initialise()), ASID,
            "whether the ASID is owned is asked before whether the guest has one, also where it is the owner",
        ),
        case(
            "a guest that has another ASID", lambda here: begin(here.initialise()), ASID + 1,
            "a guest has one ASID: it is ACTIVE",
        ),
        case(
            "after SNP_INIT_EX, without a flush, an ASID of plain SEV guests",
            lambda here: started(here, flush=False), bench().psp.min_sev_asid,
            "that the ASID is dirty is found before whose it is",
        ),
        case(
            "an ASID of plain SEV guests", started, bench().psp.min_sev_asid,
            "SNP guests have the ASIDs below MinSevNoEsAsid",
        ),
    ]  # fmt: skip


FIRST_STUB = '''\
def answer(guest, own, asid, state, min_sev_asid, limit):
    """What does SNP_ACTIVATE answer?"""
    ...  # return "SUCCESS", "INVALID_GUEST", ...
'''


def answer(guest: str, own: int, asid: int, state: str, min_sev_asid: int, limit: int) -> str:
    """What does SNP_ACTIVATE answer?"""
    checks = [
        ("INVALID_GUEST", guest == ""),
        ("INVALID_GUEST_STATE", guest not in ("LAUNCH", "RUNNING")),
        ("INVALID_ASID", not 1 <= asid <= limit),
        ("ASID_OWNED", state in ("ALLOCATED", "IN_USE")),
        ("ACTIVE", own != 0),
        ("DF_FLUSH_REQUIRED", state == "DIRTY"),
        ("INVALID_ASID", asid >= min_sev_asid),
    ]
    return next((status for status, failed in checks if failed), "SUCCESS")


def _asid_first(guest: str, own: int, asid: int, state: str, min_sev_asid: int, limit: int) -> str:
    good = 1 <= asid <= limit
    return answer(guest, own, asid, state, min_sev_asid, limit) if good else "INVALID_ASID"


def _own_first(guest: str, own: int, asid: int, state: str, min_sev_asid: int, limit: int) -> str:
    return "ACTIVE" if own else answer(guest, own, asid, state, min_sev_asid, limit)


def _kind_first(guest: str, own: int, asid: int, state: str, min_sev_asid: int, limit: int) -> str:
    return "INVALID_ASID" if asid >= min_sev_asid else answer(guest, own, asid, state, min_sev_asid, limit)


FIRST = register(
    Exercise(
        id="secure_processor.2",
        title="Which check speaks first?",
        minutes=12,
        difficulty=2,
        prerequisites=(),
        task=(
            "Several things can be wrong with one SNP_ACTIVATE, and only the first check that fails answers. Return "
            "the name of the status. `guest` is the guest's state ('' without a context), `own` the ASID that it has "
            "(0: none), `asid` the one asked for, `state` that one's state ('' where there is no such ASID), "
            "`min_sev_asid` the first ASID of plain SEV guests, `limit` the last ASID. No page carries the ASID yet."
        ),
        stub=FIRST_STUB,
        reference=answer,
        wrong=(
            Wrong(_asid_first, "nothing else is looked at"),
            Wrong(_own_first, "also where it is the owner"),
            Wrong(_kind_first, "is found before whose it is"),
        ),
        hints=(
            "Try it: the console answers. Make two things wrong at once and see which one is named.",
            "First the guest and its state, then the ASID's range, then who has it, what the guest has, whether the "
            "ASID is clean, and at last whether its kind fits.",
            "INVALID_GUEST, INVALID_GUEST_STATE, INVALID_ASID, ASID_OWNED, ACTIVE, DF_FLUSH_REQUIRED, INVALID_ASID.",
        ),
        solution=(
            "The order is that of firmware 1.55.25. It matters to a driver: a status says that one thing is wrong and "
            "that everything checked before it is right, and nothing about what comes after."
        ),
        cases=_first_cases,
    )
)

# 3: a dirty ASID


def _clean_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Bench], object], commands: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            here = bench(cores=_TWO_COMPLEXES)
            begin(here.initialise())
            prepare(here)
            before = len(here.made)
            status = answer(here)
            if status is None:
                return None
            made = here.made[before:]
            refused = [str(one) for one in made if not one.ok]
            clean = bool((here.psp.asids.states[:, ASID] == AsidState.CLEAN).all())
            return {"clean": clean, "refused": refused, "commands": len(made)}

        return Case(name, run, {"clean": True, "refused": [], "commands": commands}, rule, "SNP SNP_DF_FLUSH")

    def finish(here: Bench) -> None:
        here.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=CONTEXT)

    def end(here: Bench) -> None:
        finish(here)
        here.command(Command.SNP_DECOMMISSION, gctx_paddr=CONTEXT)

    return [
        case("its guest is gone", end, 1, "cores must do WBINVD first: SNP_DF_FLUSH does not do it for them"),
        case("its guest is running", finish, 2, "a guest that lives keeps its ASID: SNP_DECOMMISSION comes first"),
        case(
            "its guest is still in LAUNCH", lambda here: None, 1,
            "an ASID that was only allocated never ran: it is clean once its guest is gone, without a flush",
        ),
    ]  # fmt: skip


CLEAN_STUB = '''\
def clean(bench):
    """Bring ASID 1 back to CLEAN with as few commands as its state asks for; return the last answer."""
    ...
'''


def clean(bench: Bench) -> object:
    """Bring ASID 1 back to CLEAN with as few commands as its state asks for; return the last answer."""
    last = None
    if bench.asid(1).name in ("ALLOCATED", "IN_USE"):
        last = bench.command(Command.SNP_DECOMMISSION, gctx_paddr=CONTEXT)
    if bench.asid(1).name == "DIRTY":
        bench.host.wbinvd()
        last = bench.command(Command.SNP_DF_FLUSH)
    return last


def _no_wbinvd(bench: Bench) -> object:
    if bench.context() is not None:
        bench.command(Command.SNP_DECOMMISSION, gctx_paddr=CONTEXT)
    return bench.command(Command.SNP_DF_FLUSH)


def _flush_alone(bench: Bench) -> object:
    bench.host.wbinvd()
    return bench.command(Command.SNP_DF_FLUSH)


def _always_flush(bench: Bench) -> object:
    if bench.context() is not None:
        bench.command(Command.SNP_DECOMMISSION, gctx_paddr=CONTEXT)
    bench.host.wbinvd()
    return bench.command(Command.SNP_DF_FLUSH)


CLEAN = register(
    Exercise(
        id="secure_processor.3",
        title="A clean ASID",
        minutes=10,
        difficulty=2,
        prerequisites=(),
        task=(
            "ASID 1 is not clean, so no guest can be activated on it. Bring it back to CLEAN, with no command that is "
            "refused and none that is not needed, and return the last answer. bench.asid(1) tells its state, "
            "bench.command(Command.SNP_DF_FLUSH) and the like send commands, bench.host.wbinvd() writes the caches of "
            "all cores back; a guest's context is at CONTEXT."
        ),
        stub=CLEAN_STUB,
        reference=clean,
        wrong=(
            Wrong(_no_wbinvd, "WBINVD_REQUIRED"),
            Wrong(_flush_alone, "SNP_DECOMMISSION comes first"),
            Wrong(_always_flush, "without a flush"),
        ),
        hints=(
            "Look at the state first: DIRTY, IN_USE and ALLOCATED need different things.",
            "SNP_DECOMMISSION ends a guest in any state. Which of the two states does its ASID have then?",
            "Decommission where the ASID is ALLOCATED or IN_USE; then, if it is DIRTY, WBINVD and SNP_DF_FLUSH.",
        ),
        solution=(
            "Lines of a dead guest may lie in the caches, tagged with its ASID. Only when all cores of a complex have "
            "written theirs back does SNP_DF_FLUSH declare the ASID clean there."
        ),
        cases=_clean_cases,
    )
)
