"""The executor of guest programs written as coroutines: where an `await` may lose the processor.

A program sees a `GuestCpu` only. It must depend on what its awaits returned or raised and on nothing
else: then the list of those results is its whole place, which RIP counts, and a fresh coroutine fed
with the list stands where the old one stood.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snpbook.hardware.core import VECTOR_GP, VECTOR_VC, Fault, GuestCore
from snpbook.hardware.dram import whole
from snpbook.hardware.exits import Exit, GeneralProtection, GuestException, Hlt, Npf, Shutdown, Vmgexit
from snpbook.hardware.instructions import Codes
from snpbook.hardware.paging import Flags
from snpbook.spec.msr import MSR_FACTS, Msr
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE
from snpbook.spec.vmcb import ExitCode
from snpbook.spec.vmsa import LOADABLE_REGISTERS


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
    """The GHCB MSR, the only one that a guest reaches without an exit here; others are #VC."""

    msr: Msr
    write: int | None = None
    result: int = 0

    def step(self, core: GuestCore) -> Fault | None:
        if not MSR_FACTS[self.msr].guest:
            return GuestException(VECTOR_VC, ExitCode.MSR, 0)
        try:
            if self.write is None:
                self.result = core.msrs.rdmsr(self.msr)
            else:
                core.msrs.wrmsr(self.msr, self.write)
        except GeneralProtection:
            return GuestException(VECTOR_GP, 0, 0)
        return None

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
    """An exit after which RIP stands behind the instruction: done as soon as the guest has left."""

    exit: Exit

    def step(self, core: GuestCore) -> Exit:
        return self.exit


class GuestCpu:
    """What a guest program can do. Addresses are guest virtual, which are physical before paging.

    Operands that no instruction could have are refused with `ValueError` or `TypeError` where they are given; what
    the machine refuses comes as a `GuestException` out of the `await`.
    """

    def read(self, address: int, size: int) -> Operation:
        """Bytes at a virtual address."""
        return _Read(*_range(address, size))

    def write(self, address: int, data: bytes) -> Operation:
        """Store bytes at a virtual address."""
        return _Write(_range(address, len(data))[0], data)

    def pvalidate(self, address: int, count: int, *, validate: bool = True, large: bool = False) -> Operation:
        """PVALIDATE `count` pages: (return codes, carry flags), one per page. Before an exception some may be done."""
        address, _ = _range(address, whole("count", count) * (LARGE_PAGE_SIZE if large else PAGE_SIZE))
        if address % PAGE_SIZE:
            raise ValueError(f"address = {address:#x}: PVALIDATE takes a page, a multiple of {PAGE_SIZE:#x}")
        return _Pvalidate(address, count, validate, large)

    def rdmsr(self, msr: Msr) -> Operation:
        return _Msr(msr)

    def wrmsr(self, msr: Msr, value: int) -> Operation:
        return _Msr(msr, _word("value", value))

    def load(self, **registers: int) -> Operation:
        """Set registers by their VMSA names, such as cr3 or efer: those of `LOADABLE_REGISTERS`."""
        for name, value in registers.items():
            if name not in LOADABLE_REGISTERS:
                raise ValueError(f"{name}: not a register that software loads by its own instructions")
            _word(name, value)
        return _Load(registers)

    def vmgexit(self) -> Operation:
        """Leave to the hypervisor with a request in the GHCB or in its MSR."""
        return _Leave(Vmgexit())

    def hlt(self) -> Operation:
        return _Leave(Hlt())


def _word(name: str, value: int) -> int:
    if not 0 <= whole(name, value) < 2**64:
        raise ValueError(f"{name} = {value:#x}: a register holds 64 bits")
    return value


def _range(address: int, size: int) -> tuple[int, int]:
    address, size = whole("address", address), whole("size", size)
    if address < 0 or size < 0 or address + size > 2**64:
        raise ValueError(f"address = {address:#x}, size = {size:#x}: outside the 64-bit address space")
    return address, size


class ProgramFailure(Exception):
    """A guest program that gave up: the program has ended, the vCPU is halted, and this is its outcome."""


Program = Callable[[GuestCpu], Coroutine[Operation, Any, Any]]


def _begin(program: Program) -> Generator[Operation, Any, Any]:
    """The program's coroutine, made when it is first run: one that never runs is none that was never awaited."""
    return (yield from program(GuestCpu()).__await__())


class CoroutineExecutor:
    """Runs one program after the other on one vCPU; `outcome` is the last one's return value or `ProgramFailure`."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.outcome: Any = None
        self._coroutine: Generator[Operation, Any, Any] | None = None
        self._pending: Operation | None = None

    def __repr__(self) -> str:
        return f"CoroutineExecutor({'running' if self.busy else 'halted'}, {len(self.results)} results)"

    @property
    def busy(self) -> bool:
        return self._coroutine is not None

    def start(self, program: Program, results: Sequence[Any] = ()) -> None:
        """Load a program, at the place to which `results` of an earlier run lead: the machine is not touched.

        `RuntimeError` while another one runs.
        """
        if self._coroutine is not None:
            raise RuntimeError("the vCPU still runs a program: run it to its end first")
        self._coroutine, self._pending, self.results, self.outcome = _begin(program), None, [], None
        for result in results:
            self._advance()
            self._pending = None
            self.results.append(result)

    def run(self, core: GuestCore) -> Exit:
        """Run to the next exit. A finished program leaves the vCPU halted.

        After a nested page fault the same operation goes on; an exception is raised out of it, and ends the vCPU
        where the program does not handle it.
        """
        while self._coroutine is not None:
            if self._pending is None:
                unhandled = self._advance()
                if unhandled is not None:
                    return unhandled
                continue
            stopped = self._pending.step(core)
            if isinstance(stopped, Npf):
                return stopped
            if isinstance(stopped, GuestException):
                core.deliver(stopped)
            self.results.append(stopped if isinstance(stopped, GuestException) else self._pending.value)
            self._pending = None
            core.registers["rip"] = len(self.results)
            if stopped is not None and not isinstance(stopped, GuestException):
                return stopped
        return Hlt()

    def _advance(self) -> Shutdown | None:
        """Hand the program the last result; it ends, or `_pending` is what it awaits next."""
        coroutine, self._coroutine, self._pending = self._coroutine, None, None
        assert coroutine is not None
        last = self.results[-1] if self.results else None
        try:
            pending = coroutine.throw(last) if isinstance(last, GuestException) else coroutine.send(last)
        except StopIteration as end:
            self.outcome = end.value
        except ProgramFailure as failure:
            self.outcome = failure
        except GuestException as unhandled:
            return Shutdown(f"unhandled exception: {unhandled}")
        else:
            self._coroutine, self._pending = coroutine, pending
        return None
