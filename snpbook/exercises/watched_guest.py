"""A guest of the workbench whose instructions are counted, for exercises in which the machine is judged.

What counts is how the machine ends and how many instructions it took; what an answer returns does not matter.
"""

from collections.abc import Callable

from snpbook.hardware.exits import Npf
from snpbook.hardware.walker import Fault
from snpbook.hardware.workbench import BareGuest, Done, Workbench
from snpbook.spec.pages import VmplPermission
from snpbook.trace import Instruction, Recorder

NOTHING = "executes no instruction"
"""What is wrong with an answer that did not touch the machine."""


class WatchedGuest(BareGuest):
    """A guest that counts its instructions, one for each page, and keeps its faults: those were executed, too."""

    def __init__(self, bench: Workbench, asid: int) -> None:
        super().__init__(bench, asid, snp=True)
        self.instructions = 0
        self.faults: list[Fault] = []

    def pvalidate(self, gfn: int, count: int = 1, *, validate: bool = True, large: bool = False) -> Done:
        return self._kept(super().pvalidate(gfn, count, validate=validate, large=large))

    def rmpadjust(
        self, gfn: int, count: int = 1, *, target: int, rights: VmplPermission, large: bool = False, vmpl: int = 0
    ) -> Done:
        return self._kept(super().rmpadjust(gfn, count, target=target, rights=rights, large=large, vmpl=vmpl))

    def _kept(self, done: Done) -> Done:
        self.instructions += len(done.codes)
        if done.fault is not None:
            self.instructions += 1
            self.faults.append(done.fault)
        return done

    def executed(self, act: Callable[[], object]) -> dict[str, object] | None:
        """How many instructions host and guest executed in `act`, and the guest's faults; None if nothing at all."""
        self.instructions, self.faults, log = 0, [], Recorder()
        self.bench.trace.subscribe(log)
        act()
        count = self.instructions + sum(event.count for event in log.of(Instruction) if event.actor == "host")
        words = (f"#NPF, {fault.error.name}" if isinstance(fault, Npf) else str(fault) for fault in self.faults)
        return {"instructions": count, "faults": "; ".join(words) or "none"} if count else None
