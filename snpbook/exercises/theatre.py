"""The GHCB theatre: one thing that a guest asks of its host, the answer changed by the reader, and what the guest does.

Everything that is shown has happened: the guest runs on a host of its own, and the change is written into the shared
page as a host could write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snpbook.attest.checks import Result
from snpbook.exercises.tried_guest import Act, Run, Withheld, honest, tried_guest
from snpbook.guest.acceptance import give_up
from snpbook.guest.attestation import request_report
from snpbook.guest.boot import Kernel
from snpbook.guest.messages import RequestFailed
from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import GuestException
from snpbook.spec.cpuid import EXTENDED_TOPOLOGY_LEAF, INITIAL_APIC_ID, SIGNATURE_LEAF
from snpbook.spec.ghcb import GHCB, PSC_HEADER, Nae
from snpbook.spec.kvm import Cmos
from snpbook.spec.layout import Record
from snpbook.spec.rmp import RmpCode
from snpbook.spec.status import Status
from snpbook.spec.termination import Reason
from snpbook.spec.vmcb import ExitCode, Vector
from snpbook.trace import Event, FirmwareCommand, Instruction, Ioctl, Message, SystemCall, VmExit
from snpbook.views.ghcb_page import Exchange, field_name, marked
from snpbook.views.sequence import Party, Step

PAGES = range(0x300, 0x305)
"""The pages of the scene in which pages become shared."""
_MARK, _LIST = "mark of ", ("cur_entry", "end_entry", "reserved")
_RESERVED = slice(PSC_HEADER.offset("end_entry") + 2, PSC_HEADER.size)


@dataclass(frozen=True, slots=True)
class Scene:
    """Something that a guest asks: `act` does it, by the event `event`.

    `opening` are the words with which it begins, `checks` what the guest looks at in the answer, `told` puts a result
    into words. `uses` are the fields of the answer that it needs. SEV-ES guests have the scene where `es` says so.
    """

    name: str
    event: Nae
    act: Act
    opening: str
    uses: tuple[str, ...]
    checks: str
    told: Callable[[Any], str]
    vc: bool = True
    es: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """What the reader's hand may change in the answer."""
        results = ("sw_exit_info_1", "sw_exit_info_2")
        lists = _LIST if self.event is Nae.PAGE_STATE_CHANGE else ()
        return (*self.uses, *results, *lists, *(_MARK + name for name in (*self.uses, *results)))


async def _topology(kernel: Kernel) -> Any:
    return await kernel.cpu.cpuid(EXTENDED_TOPOLOGY_LEAF)


async def _signature(kernel: Kernel) -> Any:
    return await kernel.cpu.cpuid(SIGNATURE_LEAF)


async def _port(kernel: Kernel) -> Any:
    return await kernel.cpu.port_in(Cmos.DATA_PORT)


async def _write_back(kernel: Kernel) -> Any:
    await kernel.cpu.wbinvd()


async def _share(kernel: Kernel) -> Any:
    await give_up(kernel.channel, PAGES)
    return len(PAGES)


async def _report(kernel: Kernel) -> Any:
    return await request_report(kernel.cpu, kernel.place, bytes(64))


_FOUR = ("rax", "rbx", "rcx", "rdx")
SCENES: Mapping[str, Scene] = {
    scene.name: scene
    for scene in (
        Scene(
            "CPUID 1: what am I?", Nae.CPUID, _signature, "CPUID with EAX = 1", _FOUR,
            "marks, no error; SNP: only APIC id and APIC bit count",
            lambda r: f"CPUID says {r}; APIC id {r.ebx >> INITIAL_APIC_ID}",
        ),
        Scene(
            "CPUID 0xB: which processor?", Nae.CPUID, _topology, "CPUID with EAX = 0xB", _FOUR,
            "marks, no error; SNP: only EDX counts",
            lambda r: f"CPUID says {r}; x2APIC id {r.edx}",
        ),
        Scene(
            "IN: a byte of the clock", Nae.IOIO, _port, f"IN AL, {Cmos.DATA_PORT:#x}", ("rax",),
            "marks, no error; any byte may be",
            lambda value: f"the program reads {value:#x}",
        ),
        Scene(
            "WBINVD: write back the caches", Nae.WBINVD, _write_back, "WBINVD", (), "marks, no error",
            lambda _: "the instruction is done",
        ),
        Scene(
            "features of the hypervisor", Nae.FEATURES, lambda kernel: kernel.channel.features(), "what can you do?",
            (), "marks, no error; any bitmap may be", lambda found: f"the hypervisor's features are {found:#x}",
            vc=False,
        ),
        Scene(
            "five pages become shared", Nae.PAGE_STATE_CHANGE, _share, "share five pages", (),
            "marks, no error; the list went on, and is the same", lambda count: f"{count} pages are shared", vc=False,
            es=False,
        ),
        Scene(
            "an attestation report", Nae.GUEST_REQUEST, _report, "a report, please", (),
            "marks, no error; then number, type and tag of the message",
            lambda report: f"a report of {len(report)} bytes", vc=False, es=False,
        ),
    )
}  # fmt: skip


def label(field: str) -> str:
    """How a field that the hand may change is written."""
    if field in _LIST:
        return field
    return _MARK + field_name(field.removeprefix(_MARK)) if field.startswith(_MARK) else field_name(field)


@dataclass(frozen=True, slots=True)
class Tampering:
    """The hand writes `value` into `field` of the first answer, or of `every` one."""

    field: str
    value: int
    every: bool = False

    def __call__(self, number: int, answer: Record) -> Record:
        """The page as the guest finds it; `ValueError` for a value that the field cannot hold."""
        if number and not self.every:
            return answer
        if self.field.startswith(_MARK):
            return self._marked(answer, self.field.removeprefix(_MARK))
        if self.field not in _LIST:
            return answer.replace(**{self.field: self.value})
        buffer, header = bytearray(answer.shared_buffer), PSC_HEADER.unpack(answer.shared_buffer)
        if self.field == "reserved":
            buffer[_RESERVED] = self.value.to_bytes(_RESERVED.stop - _RESERVED.start, "little")
        else:
            rest = bytes(buffer[_RESERVED])
            buffer[: PSC_HEADER.size] = bytes(header.replace(**{self.field: self.value}))
            buffer[_RESERVED] = rest
        return answer.replace(shared_buffer=bytes(buffer))

    def _marked(self, answer: Record, name: str) -> Record:
        if self.value not in (0, 1):
            raise ValueError(f"a mark is 0 or 1, not {self.value:#x}")
        bit = 1 << GHCB.offset(name) // 8
        bitmap = int.from_bytes(answer.valid_bitmap, "little") & ~bit | bit * self.value
        return answer.replace(valid_bitmap=bitmap.to_bytes(len(answer.valid_bitmap), "little"))

    def __str__(self) -> str:
        return f"writes {label(self.field)} = {self.value:#x}"


@dataclass(frozen=True, slots=True)
class Play:
    """A scene that was played: its steps, the exchange of its event, and what became of the guest."""

    scene: Scene
    steps: tuple[Step, ...]
    exchange: Exchange
    result: Result
    told: str

    def __repr__(self) -> str:
        return f"Play({self.scene.name!r}, {self.result.value}: {self.told})"


def play(name: str, tampering: Tampering | None = None, kind: str = "snp", era: str = "mainline") -> Play:
    """Play a scene. `ValueError` for one that such a guest does not have, and for a value that fits no field."""
    scene = SCENES[name]
    if kind != "snp" and not scene.es:
        raise ValueError(f"a {kind} guest does not ask for that: {name}")
    run = tried_guest(kind, era).run(lambda kernel: _caught(scene, kernel), tampering or honest)
    result, told = _end(scene, run)
    exchange = next(one for one in run.exchanges if one.asked.sw_exit_code == scene.event)
    return Play(scene, tuple(_steps(scene, run, tampering, told)), exchange, result, told)


async def _caught(scene: Scene, kernel: Kernel) -> Any:
    """What the program comes to, or the exception that its instruction raises."""
    try:
        return await scene.act(kernel)
    except GuestException as taken:
        return taken


def _end(scene: Scene, run: Run) -> tuple[Result, str]:
    match run.outcome:
        case Withheld():
            return Result.SKIPPED, str(run.outcome)
        case Terminated(reason=reason):
            which = "set 1" if isinstance(reason, Reason) else "set 0"
            return Result.FAILED, f"it terminates with reason {which}, {int(reason)}: {run.outcome}"
        case RequestFailed():
            return Result.FAILED, f"the driver answers {run.outcome}"
        case GuestException(vector=vector):
            return Result.PASSED, f"its program takes #{Vector(vector).name}, as the host wants"
    return Result.PASSED, scene.told(run.outcome)


# What happened, as steps.


def _steps(scene: Scene, run: Run, tampering: Tampering | None, told: str) -> Iterator[Step]:
    yield Step(Party.PROGRAM, Party.KERNEL, f"{scene.opening}{': #VC' * scene.vc}")
    outside, asked = False, False
    for happening in run.happened:
        if outside and isinstance(happening, Exchange | VmExit):
            yield Step(Party.VMM, Party.KVM, "KVM_RUN")
            outside = False
        match happening:
            case Record():
                asked = True
                yield from _request(happening)
            case Exchange():
                yield from _answer(scene, happening, tampering)
            case VmExit(reason=ExitCode.VMGEXIT.name) if not asked:
                yield Step(Party.KERNEL, Party.KVM, "VMGEXIT, by MSR: terminate")
            case VmExit(reason=ExitCode.VMGEXIT.name):
                asked = False
            case Ioctl(name="KVM_RUN"):
                outside = True
                yield Step(Party.KVM, Party.VMM, "KVM_RUN returns")
            case Event():
                yield from _other(happening)
    yield Step(Party.KERNEL, Party.PROGRAM, "ends here" if run.failed else told)


def _request(page: Record) -> Iterator[Step]:
    names = ", ".join(field_name(name) for name in marked(page) if not name.startswith("sw_exit"))
    more = f"; {names}" if names else ""
    event = Nae(page.sw_exit_code)
    yield Step(Party.KERNEL, Party.GHCB, f"{event.name} {int(event):#x}{more}")
    yield Step(Party.KERNEL, Party.KVM, "VMGEXIT")
    yield Step(Party.GHCB, Party.KVM, "reads what is marked")


def _answer(scene: Scene, made: Exchange, tampering: Tampering | None) -> Iterator[Step]:
    page = made.answered
    values = ", ".join(f"{field_name(name)} {getattr(page, name):#x}" for name in scene.uses if name in marked(page))
    results = f"EXITINFO1 {page.sw_exit_info_1:#x}, EXITINFO2 {page.sw_exit_info_2:#x}"
    yield Step(Party.KVM, Party.GHCB, "; ".join(filter(None, [results, values])))
    if made.found != made.answered:
        yield Step(Party.KVM, Party.GHCB, str(tampering), tampered=True)
    yield Step(Party.GHCB, Party.KERNEL, "reads it once, checks")
    yield Step(Party.KERNEL, Party.KERNEL, f"checks: {scene.checks}")


def _other(event: Event) -> Iterator[Step]:
    match event:
        case VmExit(reason=ExitCode.NPF.name, pages=pages):
            yield Step(Party.KERNEL, Party.KVM, f"nested page fault{_times(pages)}")
        case Instruction(name=name, actor="host", count=count):
            yield Step(Party.KVM, Party.KVM, f"{name}{_times(count)}")
        case Instruction(name=name, count=count, status=status):
            answer = RmpCode(int(status[0])).name
            yield Step(Party.KERNEL, Party.KERNEL, f"{name}{_times(count)}: {answer}")
        case FirmwareCommand(name=name, status=status):
            yield Step(Party.KVM, Party.KVM, f"{name} to the AMD-SP: {Status(status).name}")
        case Message(text=text):
            yield Step(Party.KVM, Party.KVM, f"log: {text}")
        case Ioctl(name=name) | SystemCall(name=name):
            yield Step(Party.VMM, Party.KVM, name)


def _times(count: int) -> str:
    return f" \u00d7 {count}" if count > 1 else ""
