"""One guest that has booted and one that has not, given back after each attempt, and what came of an attempt."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.attacks.tampering import TAMPERINGS, attacker
from snpbook.guest.layout import Layout
from snpbook.guest.messages import RequestFailed
from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import Shutdown
from snpbook.hardware.guest_cpu import ProgramFailure
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.ghcb import INSTRUCTION_EVENTS, MsrCode, Nae
from snpbook.system import Guest
from tests.guest.hostile.scenes import LEFT, POOL, PRIVATE, SAVE_AREA, SCENES, SECRET, Notes, Part
from tests.machines import PAGE, booted, launched

LIMIT = 600
"""Moments after which an attempt counts as one that never ends."""


class Withheld(Exception):
    """The host does nothing but go round."""


@dataclass(frozen=True)
class Outcome:
    """`kind`: correct, stop (a termination), errno (of the driver), fault (an exception), hung, or what must not be."""

    kind: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("correct", "stop", "errno", "fault", "hung")


@cache
def _guest(early: bool, era: str) -> tuple[Guest, Snapshot]:
    """With memory that stays where it was as pages change sides: the worst for the guest."""
    guest = launched(booted(era=era), memory="12 MiB", vcpus=2, discard=False)
    if not early:
        guest.boot()
    for vcpu in guest.vmm.vcpus:
        intercepts = bytearray(vcpu.control().intercepts)
        for code in (0x77, 0x27, 0x37):  # PAUSE, of which a host hears without a word of the guest's, and DR7
            intercepts[code // 8] |= 1 << code % 8
        guest.system.host.cpu.write(vcpu.vmcb, bytes(intercepts))
    return guest, guest.system.snapshot()


def pristine() -> Guest:
    """A guest that has been launched, and not booted."""
    guest, snapshot = _guest(True, "mainline")
    snapshot.restore()
    return guest


def targets(guest: Guest, scene: str) -> tuple[list[int], list[int]]:
    """Addresses that are worth an attack: private and shared."""
    place = Layout.of(guest.vmm.image)
    shared = [page * PAGE for page in POOL] if scene == "devices" else [place.ghcb, place.request, place.response]
    private = [SAVE_AREA, LEFT, *PRIVATE] if scene == "processors" else [place.tables, *PRIVATE]
    return private, shared


def attempt(scene: str, era: str, action: Callable[[Moment], None]) -> tuple[Outcome, list[tuple[str, Any]], Watch]:
    """Let a scene run on a host that does `action`: what came of it, what the guest noted, and what was seen of it."""
    guest, snapshot = _guest(scene == "early", era)
    snapshot.restore()
    notes, watch = Notes(Layout.of(guest.vmm.image)), Watch()

    def act(moment: Moment) -> None:
        watch(moment)
        action(moment)
        if watch.moments > LIMIT:
            raise Withheld

    tamper(guest, act)
    found = Outcome("correct")
    for vcpu, part in SCENES[scene]:
        end = ended(partial(_play, guest, vcpu, part, notes), watch)
        if vcpu and end.kind == "hung":  # a further processor that does not run is no harm to the first
            continue
        found = end
        if found.kind != "correct":
            break
    return (Outcome(*watch.wrong) if watch.wrong else found), notes.values, watch


def _play(guest: Guest, vcpu: int, part: Part, notes: Notes) -> None:
    """A part of a scene, or what was left of the one before."""
    if guest.vmm.vcpus[vcpu].executor.busy:
        guest.go_on(vcpu)
    else:
        guest.run(lambda cpu: part(cpu, notes), vcpu)


def ended(run: Callable[[], object], watch: Watch) -> Outcome:
    """Let a guest run: how it ended."""
    try:
        run()
    except Withheld:
        return Outcome("hung", "for ever")
    except RequestFailed as failed:
        return Outcome("errno", errno.errorcode[failed.errno or 0])
    except Terminated as ended:
        return Outcome("stop", watch.ended or ended.reason.name)
    except ProgramFailure as failed:
        return Outcome("stop", type(failed).__name__)
    except OSError as failed:
        return Outcome("hung", errno.errorcode.get(failed.errno or 0, "?"))
    except (AssertionError, LookupError, TypeError, ValueError) as failed:
        return Outcome("crash", f"{failed!r:.80}")
    except RuntimeError as stopped:
        if watch.ended:
            return Outcome("stop", watch.ended)
        if "SHUTDOWN" in str(stopped):
            return Outcome("fault", watch.shutdown.split(", address")[0])
        return Outcome("hung", str(stopped))
    return Outcome("correct")


class Watch:
    """What an onlooker knows of an attempt: how it ended, secrets that came out, numbers that were used twice."""

    def __init__(self) -> None:
        self.last: Nae | None = None
        self.moments, self.ended, self.shutdown = 0, "", ""
        self.wrong: tuple[str, str] | None = None
        self.sent: dict[tuple[bytes, int], bytes] = {}

    def __call__(self, moment: Moment) -> None:
        self.moments += 1
        if moment.stage is not Stage.EXIT:
            return
        if isinstance(moment.exit, Shutdown):
            self.shutdown = moment.exit.reason
        if moment.event is Nae.MMIO_READ or moment.event is Nae.MMIO_WRITE:  # the device: this VMM has none
            moment.keep()
            moment.put(sw_exit_info_1=0, sw_exit_info_2=0)
            moment.mark("sw_exit_info_1", "sw_exit_info_2")
        if moment.code is MsrCode.TERMINATE:
            self.ended = f"{moment.value >> 12 & 0xF}:{moment.value >> 16 & 0xFF}"
        if moment.page is None:
            return
        page, self.last = moment.page, moment.event
        if page.sw_exit_code == Nae.TERMINATE:
            self.ended = f"{page.sw_exit_info_1 & 0xF}:{page.sw_exit_info_1 >> 4 & 0xFF}"
        if SECRET.to_bytes(8, "little") in bytes(page) or b"a secret" in bytes(page):
            self.wrong = "leak", f"event {page.sw_exit_code:#x}"
        if page.sw_exit_code in (Nae.GUEST_REQUEST, Nae.EXTENDED_GUEST_REQUEST):
            request = moment.read(page.sw_exit_info_1, PAGE)
            number = int.from_bytes(request[0x20:0x28], "little")
            key = request[0x3C:0x3D], number
            if self.sent.setdefault(key, request) != request and self.sent[key][:32] != request[:32]:
                self.wrong = "nonce", f"number {number} used for two messages"


@cache
def truth(scene: str, era: str) -> dict[str, Any]:
    """What the guest notes where nobody attacks it."""
    outcome, values, _ = attempt(scene, era, lambda moment: None)
    assert outcome.kind == "correct", outcome
    assert len(dict(values)) == len(values), "two notes of one name"
    return dict(values)


FAULTS = ("unhandled exception: vector 6,", "unhandled exception: vector 13,", "double fault: vector 29,")
"""Exceptions that end a program: the two that an answer may raise, and a #VC in the handler of #VC."""
INJECTED = ("exceptions injected", "interrupts injected")
"""Classes that raise others, with which a kernel does as it likes."""


PAGES_LOST = ("pages aliased", "pages dropped", "pages dropped midway", "pages overwritten")
SCENES_OF = {
    "CPUID": ("instructions",), "list header": ("pages", "devices", "early"),
    "list entries": ("pages", "devices", "early"), "list result": ("pages", "devices", "early"),
    "list feigned": ("pages", "devices", "early"), "certificates": ("messages",), "MSR answers": ("early",),
    "validated twice": ("pages",), "shared memory": ("devices", "devices", "messages", "pages"),
    "between check and use": ("devices", "devices", "messages", "pages"), "#VC injected": ("instructions", "pages"),
    "processors": ("processors",), **dict.fromkeys(PAGES_LOST, tuple(SCENES)),
    **{name: ("messages",) for name in TAMPERINGS if name.startswith("message")},
}  # fmt: skip
"""Where a class has something to do; all others where there is one processor."""
ALONE = tuple(name for name in SCENES if name != "processors")
ERAS = ("mainline", "rfc-v7")
"""The v7 series ends a processor only for a guest that fills in RAX, which none does."""


def judged(name: str, seed: int) -> tuple[Outcome, bool]:
    """An attempt of a class, held against the truth; and whether the host struck at all."""
    scenes = SCENES_OF.get(name, ALONE)
    scene = scenes[seed % len(scenes)]
    era = "mainline" if scene == "processors" else ERAS[seed // len(scenes) % 2]
    expected = truth(scene, era)
    private, shared = targets(_guest(scene == "early", era)[0], scene)
    host = attacker(name, seed, private=private, shared=shared)
    outcome, values, watch = attempt(scene, era, host)
    wrong = [(what, value) for what, value in values if what not in expected or value != expected[what]]
    if outcome.good and wrong:
        what, value = wrong[0]
        outcome = Outcome("wrong", f"{what}: {value!r:.60}")
    elif outcome.kind == "fault" and name not in INJECTED:
        raised = outcome.detail.startswith("unhandled")
        if not outcome.detail.startswith(FAULTS) or (raised and watch.last not in INSTRUCTION_EVENTS):
            outcome = Outcome("undocumented", f"{outcome.detail} after {watch.last!r}")
    return outcome, bool(host.strikes)


def attempts(name: str) -> Iterator[Outcome]:
    """Attempts of a class without end, in the order of their seeds; those in which nothing happened are left out."""
    for seed in count():
        outcome, struck = judged(name, seed)
        if struck:
            yield outcome
