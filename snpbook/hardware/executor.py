"""The executor of guest programs written as coroutines: where an `await` may lose the processor.

A program sees a `GuestCpu` only. It must depend on what its awaits returned and on nothing else:
then the list of those results is its whole place, which RIP counts, and a fresh coroutine fed with
the list stands where the old one stood.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snpbook.hardware.core import Fault, GuestCore
from snpbook.hardware.exits import Exit, GuestException, Hlt, Shutdown, Vmgexit
from snpbook.hardware.instructions import Codes
from snpbook.hardware.paging import Flags
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE


@dataclass(slots=True)
class Operation:
    """One await: `step` does as much as it can on a core; a fault leaves the rest for the next entry."""

    def __await__(self) -> Generator[Operation, Any, Any]:
        return (yield self)

    def step(self, core: GuestCore) -> Fault | Exit | None:
        """None when done (the result is in `value`), else the fault or exit that came first."""
        raise TypeError(f"{type(self).__name__} has no step")

    @property
    def value(self) -> Any:
        return None


@dataclass(slots=True)
class _Read(Operation):
    address: int
    size: int
    data: bytes = b""

    def step(self, core: GuestCore) -> Fault | None:
        result = core.read(self.address, self.size)
        if not isinstance(result, bytes):
            return result
        self.data = result
        return None

    @property
    def value(self) -> bytes:
        return self.data


@dataclass(slots=True)
class _Write(Operation):
    address: int
    data: bytes

    def step(self, core: GuestCore) -> Fault | None:
        return core.write(self.address, self.data)


@dataclass(slots=True)
class _Pvalidate(Operation):
    """Pages already done stay done: after a fault the run goes on behind them."""

    address: int
    count: int
    validate: bool
    large: bool
    codes: list[Codes] = field(default_factory=list)
    unchanged: list[Flags] = field(default_factory=list)

    def step(self, core: GuestCore) -> Fault | None:
        done = sum(map(len, self.codes))
        address = self.address + done * (LARGE_PAGE_SIZE if self.large else PAGE_SIZE)
        codes, unchanged, fault = core.pvalidate(address, self.count - done, self.validate, self.large)
        self.codes.append(codes)
        self.unchanged.append(unchanged)
        return fault

    @property
    def value(self) -> tuple[Codes, Flags]:
        return np.concatenate(self.codes), np.concatenate(self.unchanged)


@dataclass(slots=True)
class _Msr(Operation):
    """The GHCB MSR, the only one that a guest reaches without an exit here."""

    msr: Msr
    write: int | None = None
    result: int = 0

    def step(self, core: GuestCore) -> None:
        if self.msr is not Msr.GHCB:
            raise GuestException(29, int(self.msr), 0)
        if self.write is None:
            self.result = core.ghcb_msr
        else:
            core.ghcb_msr = self.write

    @property
    def value(self) -> int:
        return self.result


@dataclass(slots=True)
class _Load(Operation):
    registers: dict[str, int]

    def step(self, core: GuestCore) -> None:
        core.registers.update(self.registers)


@dataclass(slots=True)
class _Leave(Operation):
    exit: Exit
    left: bool = False

    def step(self, core: GuestCore) -> Exit | None:
        if self.left:
            return None
        self.left = True
        return self.exit


class GuestCpu:
    """What a guest program can do. Addresses are guest virtual, which are physical before paging."""

    def read(self, address: int, size: int) -> Operation:
        """Bytes at a virtual address."""
        return _Read(address, size)

    def write(self, address: int, data: bytes) -> Operation:
        """Store bytes at a virtual address."""
        return _Write(address, data)

    def pvalidate(self, address: int, count: int, *, validate: bool = True, large: bool = False) -> Operation:
        """PVALIDATE `count` pages: (return codes, carry flags), one per page."""
        return _Pvalidate(address, count, validate, large)

    def rdmsr(self, msr: Msr) -> Operation:
        return _Msr(msr)

    def wrmsr(self, msr: Msr, value: int) -> Operation:
        return _Msr(msr, value)

    def load(self, **registers: int) -> Operation:
        """Set registers by their VMSA names, such as cr3 or efer."""
        return _Load(registers)

    def vmgexit(self) -> Operation:
        """Leave to the hypervisor with a request in the GHCB or in its MSR."""
        return _Leave(Vmgexit())

    def hlt(self) -> Operation:
        return _Leave(Hlt())


Program = Callable[[GuestCpu], Coroutine[Operation, Any, Any]]


class CoroutineExecutor:
    """Runs one program after the other on one vCPU; `outcome` is the last program's return value."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.outcome: Any = None
        self._coroutine: Coroutine[Operation, Any, Any] | None = None
        self._pending: Operation | None = None

    def __repr__(self) -> str:
        return f"CoroutineExecutor({'running' if self.busy else 'halted'}, {len(self.results)} results)"

    @property
    def busy(self) -> bool:
        return self._coroutine is not None

    def start(self, program: Program) -> None:
        """Load a program; `RuntimeError` while another one runs."""
        if self._coroutine is not None:
            raise RuntimeError("the vCPU still runs a program: run it to its end first")
        self._coroutine, self.results, self.outcome = program(GuestCpu()), [], None
        self._pending = None

    def run(self, core: GuestCore) -> Exit:
        """Run to the next exit. A finished program leaves the vCPU halted."""
        while self._coroutine is not None:
            if self._pending is None and not self._advance(None, None):
                break
            assert self._pending is not None
            try:
                stopped = self._pending.step(core)
            except GuestException as exception:
                stopped = exception
            if isinstance(stopped, GuestException):
                self.results.append(stopped)
                try:
                    if not self._advance(None, stopped):
                        break
                except GuestException as unhandled:
                    self._coroutine = self._pending = None
                    return Shutdown(f"unhandled exception: {unhandled}")
            elif stopped is not None:
                return stopped
            else:
                self.results.append(self._pending.value)
                core.registers["rip"] = len(self.results)
                if not self._advance(self._pending.value, None):
                    break
        return Hlt()

    def _advance(self, value: Any, exception: GuestException | None) -> bool:
        """Give the program a result or an exception; False when it has ended."""
        assert self._coroutine is not None
        try:
            self._pending = self._coroutine.send(value) if exception is None else self._coroutine.throw(exception)
        except StopIteration as end:
            self.outcome, self._coroutine, self._pending = end.value, None, None
            return False
        return True
