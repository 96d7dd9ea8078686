"""From launch to an attested workload on machines of every shape, and what each boot costs in exits and validations.

A guest boots, accepts memory for what it runs, starts its further processors and has each leave a value in private
memory; a key holder makes a key whose digest an attestation report then carries. Nothing is computed from a rule: each
row is a guest that ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha512
from itertools import product as combinations

from snpbook.guest import processors
from snpbook.guest.boot import Acceptance, Kernel
from snpbook.guest.conversions import make_shared
from snpbook.guest.layout import Layout
from snpbook.guest.workloads import KeyHolder, MemoryToucher
from snpbook.hardware.guest_cpu import GuestCpu, Program
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.report import ATTESTATION_REPORT
from snpbook.system import Guest, System, Verdict
from snpbook.trace import Counts, Event, VmExit

PRODUCTS = ("milan", "genoa")
VCPUS = (1, 16)
MEMORY = "16 MiB"
_START = 0x400
"""The first guest page that the workload uses: free memory, 2 MB of it."""
_AREA = range(_START, _START + 0x100)
_SAVE_AREAS, _GHCBS, _VALUES, _KEY, _CALLS = (_START + offset for offset in (0x01, 0x20, 0x40, 0x60, 0x80))
_VECTOR = 16
"""Further processors start at 64 KiB, where nothing is: their programs stand for the code there."""
_IDS = ("report_id", "report_id_ma", "signature_r", "signature_s")


@dataclass(frozen=True, slots=True)
class Cost:
    """What happened in a part of a guest's life, in pages of 4 KB where pages are counted.

    `requests` are VMGEXITs, `faults` pages that had to be mapped, `other` exits of any other kind; `instructions` are
    PVALIDATEs, and `validated` the pages that they made valid.
    """

    requests: int
    faults: int
    other: int
    instructions: int
    validated: int
    rmpupdates: int

    @property
    def exits(self) -> int:
        return self.requests + self.faults + self.other


@dataclass(frozen=True, slots=True)
class AttestedBoot:
    """One row: the shape, the cost of the boot and that of the workload, what the owner concludes, the report.

    `dmesg` are the messages of the guest's kernel; `values` has what each vCPU left in its page: the round of a
    `MemoryToucher`, its number + 1.
    """

    product: str
    vcpus: int
    acceptance: Acceptance
    svsm: bool
    dmesg: tuple[str, ...]
    boot: Cost
    work: Cost
    values: tuple[int, ...]
    verdict: Verdict
    report: bytes

    @property
    def report_body(self) -> bytes:
        """The report without what no two guests share: its ids and its signature."""
        blank = {name: bytes(ATTESTATION_REPORT.fields[name].size) for name in _IDS}
        return bytes(ATTESTATION_REPORT.unpack(self.report).replace(**blank))


def attested_boot(
    product: str = "milan",
    vcpus: int = 1,
    acceptance: str = Acceptance.EAGER,
    *,
    svsm: bool = False,
    memory: str = MEMORY,
) -> AttestedBoot:
    """Launch, boot and attest one guest on a machine of its own. With `svsm` its host is of the era svsm-host."""
    system = System(product, "attested boot")
    system.host.boot("svsm-host" if svsm else "mainline")
    guest = system.create_vm(memory=memory, vcpus=vcpus, svsm=svsm)
    guest.launch()
    meter = _Meter()
    system.trace.subscribe(meter)
    guest.boot(acceptance)
    boot = meter.read()
    public, report = attest(guest)
    values = tuple(_value(guest, number) for number in range(vcpus))
    verdict = system.owner(guest).verify(report, sha512(public).digest())
    shape = (product, vcpus, Acceptance(acceptance), svsm)
    return AttestedBoot(*shape, tuple(guest.dmesg), boot, meter.read(), values, verdict, report)


def table(
    products: Sequence[str] = PRODUCTS,
    vcpus: Sequence[int] = VCPUS,
    acceptances: Sequence[str] = tuple(Acceptance),
    svsm: Sequence[bool] = (False, True),
    *,
    memory: str = MEMORY,
) -> Iterator[AttestedBoot]:
    """A row for each combination, in the order of the arguments, as soon as it has run."""
    for shape in combinations(products, vcpus, acceptances, svsm):
        yield attested_boot(*shape[:3], svsm=shape[3], memory=memory)


class _Meter:
    """A listener that counts since it was last read."""

    def __init__(self) -> None:
        self._exits, self._counts = Counter[str](), Counts()

    def __call__(self, event: Event) -> None:
        self._counts(event)
        if isinstance(event, VmExit):
            self._exits[event.reason] += event.pages

    def read(self) -> Cost:
        exits, counts = self._exits, self._counts
        self._exits, self._counts = Counter(), Counts()
        requests, faults = exits.pop("VMGEXIT", 0), exits.pop("NPF", 0)
        rest = exits.total()
        return Cost(requests, faults, rest, counts.pvalidates, counts.pages_validated, counts.rmpupdates)


def attest(guest: Guest) -> tuple[bytes, bytes]:
    """Run everything on a guest that has booted: its key holder's public key, and the report with that one's digest."""
    place, others = Layout.of(guest.vmm.image), range(1, len(guest.vmm.vcpus))

    async def boss(cpu: GuestCpu) -> bytes:
        kernel = await Kernel.attach(cpu, place)
        await kernel.unaccepted.accept(_AREA)
        assert kernel.protections.c_bit is not None
        shared = range(_GHCBS, _GHCBS + len(others))
        await make_shared(kernel.channel, place, kernel.protections.c_bit, shared)
        for number in others:
            save_area = _SAVE_AREAS + number - 1 << PAGE_SHIFT
            features = int(kernel.protections.features)
            calls = _CALLS + number << PAGE_SHIFT
            await processors.start(
                kernel.channel, number, save_area, vector=_VECTOR, features=features, calling_area=calls
            )
        await _pattern(cpu, 0).fill(1)
        return await KeyHolder(cpu, _KEY << PAGE_SHIFT).create()

    public: bytes = guest.run(boss)
    for number in others:
        guest.run(_worker(place, number), number)
    return public, guest.request_report(sha512(public).digest())


def _worker(place: Layout, number: int) -> Program:
    """What a further processor runs: its kernel's part, then it leaves its value."""

    async def work(cpu: GuestCpu) -> None:
        await processors.online(cpu, place, _GHCBS + number - 1 << PAGE_SHIFT, _CALLS + number << PAGE_SHIFT)
        await _pattern(cpu, number).fill(number + 1)

    return work


def _pattern(cpu: GuestCpu, number: int) -> MemoryToucher:
    """The page of a processor."""
    first = _VALUES + number << PAGE_SHIFT
    return MemoryToucher(cpu, range(first, first + PAGE_SIZE))


def _value(guest: Guest, number: int) -> int:
    """What a processor left, as the first one finds it in private memory; `Corrupted` for anything else."""

    async def look(cpu: GuestCpu) -> int:
        await _pattern(cpu, number).check(number + 1)
        return number + 1

    value: int = guest.run(look)
    return value
