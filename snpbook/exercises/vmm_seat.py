"""The seat of the VMM: a real KVM_RUN whose exits the reader's function serves, and what then became of the guest.

Each story is a guest program that converts a page, asked for or not. Nothing of it is judged by what the function
returns: what counts is what the guest reads, what the host's devices read, and how many pages both sides have.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from snpbook.guest import acceptance, msr_protocol, page_tables
from snpbook.guest.boot import Kernel, start
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.hardware.snapshot import Snapshot
from snpbook.host.memory_files import PUNCH
from snpbook.host.recount import recount
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.exits import exit_record, put_exit_record
from snpbook.host.vmm.guest import Vmm
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.ghcb import PSC_ENTRY, MsrCode, PageOperation
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import Advice
from snpbook.spec.uapi_kvm import Exit, Ioctl
from snpbook.system import Guest, System, sample_image

PAGE = 5 << 20 >> PAGE_SHIFT
"""A guest page that no launch measures."""
PLACE = PAGE << PAGE_SHIFT
SECRET, PUBLIC = b"a secret", b"for all!"
_BOUND = 8
"""How often the same exit may follow itself; a real guest would fault for ever."""
_INSTALLED = 64 << 20
_PAGES = 8


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """The part of `kvm_run` that goes with MEMORY_FAULT."""

    gpa: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class Hypercall:
    """The part that goes with HYPERCALL."""

    nr: int
    args: tuple[int, ...]


@dataclass(slots=True, repr=False)
class Run:
    """`kvm_run` after an exit, and the three system calls of a VMM on its guest's memory.

    The two parts share their bytes, as in the C union: only the one that the reason names means anything.

    A call that the kernel refuses raises `OSError`; let through, it ends the function, and a guest that has asked is
    told that its request failed.
    """

    exit_reason: str
    memory_fault: MemoryFault
    hypercall: Hypercall
    _seat: _Seat = field(compare=False)

    def __repr__(self) -> str:
        if self.exit_reason == Exit.HYPERCALL.name:
            return f"{self.exit_reason}: nr {self.hypercall.nr}, args {', '.join(map(hex, self.hypercall.args))}"
        fault = self.memory_fault
        return f"{self.exit_reason}: gpa {fault.gpa:#x}, size {fault.size}, flags {fault.flags}"

    def set_attributes(self, gpa: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        self._seat.calls.append("attributes")
        if 0 < self._seat.story.refused <= self._seat.calls.count("attributes"):
            raise KernelError(errno.ENOMEM, "memory for the table of attributes", "a page", 0)
        given = structs.MEMORY_ATTRIBUTES.pack(address=gpa, size=size, attributes=attributes)
        self._vmm.process.ioctl(self._vmm.vm_fd, self._vmm.kernel.era.set_attributes, given)

    def punch(self, gpa: int, size: int) -> None:
        """fallocate(PUNCH_HOLE) on the guest_memfd: private pages are freed."""
        self._seat.calls.append("punch")
        block = self._vmm.block_of(gpa)
        if block is None:
            raise KernelError(errno.EINVAL, "the address is guest memory", "a slot", hex(gpa))
        self._vmm.process.fallocate(block.private_fd, PUNCH, gpa - block.gpa, size)

    def discard(self, gpa: int, size: int) -> None:
        """madvise(MADV_DONTNEED) on the VMM's own memory: shared pages are freed."""
        self._seat.calls.append("discard")
        self._vmm.process.madvise(self._vmm.user(gpa), size, Advice.DONTNEED)

    @property
    def _vmm(self) -> Vmm:
        return self._seat.vmm


OnExit = Callable[[Run], object]
Program = Callable[[GuestCpu], Coroutine[Any, Any, str]]


@dataclass(frozen=True, slots=True)
class Story:
    """What a guest does, after the VMM has used the shared side of its page.

    `refused` counts the calls for attributes up to the first for which the kernel has no memory any more; 0 for none.
    """

    program: Program
    refused: int = 0


class _Seat:
    """One vCPU that runs one story."""

    def __init__(self, vmm: Vmm, story: Story) -> None:
        self.vmm, self.story = vmm, story
        self.calls: list[str] = []
        self._last: Run | None = None
        self._repeated = 0

    def serve(self, on_exit: OnExit) -> str:
        """Run the guest until it is done: empty, or why it got no further."""
        vmm, handle = self.vmm, self.vmm.handles[0]
        while True:
            reason = self._enter()
            if reason is Exit.HLT:
                return ""
            if reason not in (Exit.MEMORY_FAULT, Exit.HYPERCALL):
                return f"is ended: {reason.name}"
            run = self._run(reason)
            self._repeated = self._repeated + 1 if run == self._last else 1
            self._last = run
            if self._repeated > _BOUND:
                gpa = run.memory_fault.gpa if reason is Exit.MEMORY_FAULT else run.hypercall.args[0]
                return f"does not get on: {reason.name} for {gpa:#x} again and again"
            try:
                on_exit(run)
                failed = 0
            except KernelError as error:
                if reason is Exit.MEMORY_FAULT:
                    return f"is ended by the VMM: {error}"
                failed = error.errno or errno.EIO
            if reason is Exit.HYPERCALL:
                record = exit_record(vmm, handle, structs.EXIT_HYPERCALL)
                put_exit_record(vmm, handle, record.replace(ret=failed))

    def _enter(self) -> Exit:
        process, handle = self.vmm.process, self.vmm.handles[0]
        try:
            process.ioctl(handle.fd, Ioctl.RUN)
        except KernelError as error:
            if error.errno != errno.EFAULT:
                raise
        return Exit(structs.RUN.unpack(process.load(handle.run, structs.RUN.size)).exit_reason)

    def _run(self, reason: Exit) -> Run:
        handle = self.vmm.handles[0]
        fault = exit_record(self.vmm, handle, structs.EXIT_MEMORY_FAULT)
        call = exit_record(self.vmm, handle, structs.EXIT_HYPERCALL)
        arguments = tuple(getattr(call, f"arg{number}") for number in range(6))
        return Run(
            reason.name, MemoryFault(fault.gpa, fault.size, fault.flags), Hypercall(call.nr, arguments), self
        )  # fmt: skip


@cache
def _launched() -> tuple[Guest, Snapshot]:
    system = System("milan", "the seat of the VMM", installed=_INSTALLED)
    system.host.boot("mainline")
    guest = system.create_vm(memory="10 MiB")
    guest.launch()
    return guest, system.snapshot()


def told(on_exit: OnExit, story: Story) -> dict[str, object] | None:
    """How a story ends with `on_exit` in the VMM's place; None where that makes no call at all."""
    guest, snapshot = _launched()
    snapshot.restore()
    vmm, before = guest.vmm, recount(guest.vmm.vm)
    vmm.write(PLACE, PUBLIC)
    executor, seat = vmm.vcpus[0].executor, _Seat(vmm, story)
    executor.start(story.program)
    fault = seat.serve(on_exit)
    if not seat.calls:
        return None
    outcome, after = executor.outcome, recount(vmm.vm)
    return {
        "the guest": fault or (f"gave up: {outcome}" if isinstance(outcome, ProgramFailure) else str(outcome)),
        "private pages": after.private - before.private,
        "pages with both sides": after.doubled - before.doubled,
    }


# What guests do.


async def by_use(cpu: GuestCpu) -> str:
    """A page becomes private by use, without a word."""
    return await _accept(cpu, PAGE)


async def on_request(cpu: GuestCpu) -> str:
    """A page becomes private on request, and is used."""
    await msr_protocol.change_page(cpu, PAGE, PageOperation.PRIVATE)
    return await _accept(cpu, PAGE)


async def there_and_back(cpu: GuestCpu) -> str:
    """A page with a secret becomes shared, and private again."""
    await on_request(cpu)
    await msr_protocol.change_page(cpu, PAGE, PageOperation.SHARED)
    await msr_protocol.change_page(cpu, PAGE, PageOperation.PRIVATE)
    _, unchanged = await cpu.pvalidate(PLACE, 1)
    if unchanged[0]:
        return f"finds its old page again: PVALIDATE changes nothing, and it reads {await _read(cpu)}"
    return "finds a new page, and accepts it"


async def shared_by_use(cpu: GuestCpu) -> str:
    """Of eight private pages one is used as shared, without a word; what the others hold must not suffer."""
    kernel = await _eight(cpu)
    c_bit = kernel.protections.c_bit
    assert c_bit is not None
    await page_tables.mark(cpu, kernel.place, c_bit, range(PAGE + 1, PAGE + 2), private=False)
    await cpu.write(PLACE + PAGE_SIZE, PUBLIC)
    others = {await _read(cpu, number) for number in range(_PAGES) if number != 1}
    return f"reads {await _read(cpu, 1)}, and in its other pages {', '.join(sorted(others))}"


async def eight_shared(cpu: GuestCpu) -> str:
    """Eight private pages become shared on one request, and are not used any more."""
    kernel = await _eight(cpu)
    await acceptance.give_up(kernel.channel, range(PAGE, PAGE + _PAGES))
    return "has given its pages up"


async def refused(cpu: GuestCpu) -> str:
    """A page with a secret is to become shared, but the guest is told that this failed: so it goes on with its page."""
    await on_request(cpu)
    entry = PSC_ENTRY.pack(gfn=PAGE, operation=PageOperation.SHARED)
    answer = await msr_protocol.request(cpu, int.from_bytes(entry, "little") | MsrCode.PAGE_STATE_REQUEST)
    if answer == MsrCode.PAGE_STATE:
        return "was told that its page is shared, which it is not"
    _, unchanged = await cpu.pvalidate(PLACE, 1)
    return f"still reads {await _read(cpu)}" if unchanged[0] else "has lost what was in its page"


async def _accept(cpu: GuestCpu, page: int) -> str:
    """Validate a page and write a secret; what is read there."""
    codes, _ = await cpu.pvalidate(PLACE, 1)
    if codes[0]:
        return f"cannot accept page {page:#x}"
    await cpu.write(PLACE, SECRET)
    return f"reads {await _read(cpu)}"


async def _eight(cpu: GuestCpu) -> Kernel:
    """Eight pages become private on one request, each with a secret."""
    kernel = await start(cpu, Layout.of(sample_image()))
    await acceptance.accept(kernel.channel, range(PAGE, PAGE + _PAGES))
    await cpu.write(PLACE, SECRET.ljust(PAGE_SIZE, b"\0") * _PAGES)
    return kernel


async def _read(cpu: GuestCpu, number: int = 0) -> str:
    found: bytes = await cpu.read(PLACE + (number << PAGE_SHIFT), len(SECRET))
    return repr(found.decode("latin-1"))
