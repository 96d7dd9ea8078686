"""The chapter on private memory: the VMM's seat, guests side by side, what hosts and VMMs do to them, the hooks."""

from __future__ import annotations

from snpbook.exercises import vmm_seat
from snpbook.exercises.private_memory import OMISSIONS, STORIES, meant
from snpbook.exercises.vmm_seat import OnExit
from snpbook.regimes.content import flip
from snpbook.regimes.host_actions import Action, act
from snpbook.regimes.host_writes import by_kernel, by_vmm
from snpbook.regimes.regime import Regime
from snpbook.regimes.shattering import shattering
from snpbook.regimes.workload import workload
from snpbook.spec.private_memory import HOOKS, cell
from snpbook.views import memory_ledger, private_memory
from snpbook.views.static import Static
from snpbook.widgets.fit_desk import FitDesk
from snpbook.widgets.regime_desk import RegimeDesk

FIRST_STORY = next(iter(STORIES))


class Lab:
    """`fit` counts guests on a host, `regimes` runs one workload on every back end; the rest are single experiments."""

    def __init__(self) -> None:
        self.fit = FitDesk()
        self.regimes = RegimeDesk()

    def __repr__(self) -> str:
        return "Lab(private memory)"

    def serve(self, on_exit: OnExit, story: str = FIRST_STORY) -> Static:
        """One of the guest's stories, with `on_exit` in the VMM's place. `ValueError` for no such story."""
        if story not in STORIES:
            raise ValueError(f"no story {story!r}: one of {', '.join(map(repr, STORIES))}")
        return private_memory.endings("The guest", {story: vmm_seat.told(on_exit, STORIES[story][0])})

    def forgets(self, what: str) -> Static:
        """The stories that end otherwise with a VMM that forgets something. `ValueError` for what none forgets."""
        if what not in OMISSIONS:
            raise ValueError(f"no VMM forgets {what!r}: one of {', '.join(map(repr, OMISSIONS))}")
        told = {name: vmm_seat.told(OMISSIONS[what], story) for name, (story, _) in STORIES.items()}
        wrong = {name: outcome for name, outcome in told.items() if outcome != meant(name)}
        return private_memory.endings(f"A VMM that forgets {what}", wrong)

    def cells(self) -> Static:
        """Kind of guest by back end."""
        return private_memory.cells()

    def refused(self, kind: str, backend: str) -> None:
        """`NoSuchCell` for a kind of guest that never had its private pages there."""
        cell(kind, backend)

    def flips(self, *regimes: tuple[str, str, bool]) -> Static:
        """A page private, shared and private again: kind, back end, and whether the VMM frees what is left."""
        names = {
            f"{kind}, {backend}, {'punched' if punched else 'kept'}": (kind, backend, punched)
            for kind, backend, punched in regimes
        }
        return private_memory.flips(
            {name: flip(kind, backend, discard=punched) for name, (kind, backend, punched) in names.items()}
        )

    def shatter(self, *, fragmented: bool = False) -> Static:
        """Large pages and what takes them apart."""
        name = "a host whose memory is in pieces" if fragmented else "a host with 2 MB pages"
        return memory_ledger.steps(name, list(shattering(fragmented=fragmented)))

    def host_does(self, kind: str, backend: str, *actions: str, pinned: bool = True) -> Static:
        """What Linux does to the pages of a guest, and what that guest then reads."""
        name = f"{kind}, {backend}{'' if pinned else ', not pinned'}"
        return private_memory.host_actions(
            [(name, act(Action(each), kind, backend, pinned=pinned)) for each in actions]
        )

    def vmm_writes(self, *regimes: tuple[str, str]) -> Static:
        """A VMM writes where the guest has a private page."""
        return private_memory.stray_writes(
            {f"VMM, {kind}, {backend}": by_vmm(kind, backend) for kind, backend in regimes}
        )

    def kernel_writes(self, kind: str, backend: str) -> tuple[str, ...]:
        """The kernel clears the frame of a private page: what it logs."""
        return by_kernel(kind, backend)[1]

    def hooks(self) -> Static:
        """Where KVM asks the architecture."""
        return private_memory.hooks(HOOKS)

    def null(self) -> Static:
        """The workload on the back end that does nothing."""
        regime = Regime("plain", "null")
        return memory_ledger.over_time({"plain, null": list(workload(regime))})
