"""The system: one machine, its firmware, its host, its guests, joined by a named seed.

Everything random below comes from the seed: chip secret, guest keys, report ids, tweak constants. Two
systems with the same arguments do the same, byte for byte. This file joins; it has no rules of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from snpbook.attest.appraise import Policy, appraise
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import Check, NotGenuine, Result
from snpbook.attest.measure import snp_digest, svsm_runs, svsm_vmsa_pages, vmsa_pages
from snpbook.attest.measure_chain import launch_digest
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import verify
from snpbook.firmware.keys import Chip, kdf
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.table import power_on
from snpbook.guest.attestation import request_report
from snpbook.guest.boot import NO_FEATURES, Acceptance, boot
from snpbook.guest.layout import Layout
from snpbook.guest.svsm.program import program as svsm_program
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.guest_cpu import Program, ProgramFailure
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.snapshot import Snapshot
from snpbook.host.kernel import Kernel
from snpbook.host.vmm.command_line import create, read
from snpbook.host.vmm.configuration import DirectBoot, GuestKind, VmmError
from snpbook.host.vmm.exits import exit_record
from snpbook.host.vmm.guest import Vmm
from snpbook.host.vmm.properties import default_object
from snpbook.spec.image import Image
from snpbook.spec.launch import kernel_hash_table
from snpbook.spec.private_memory import cell
from snpbook.spec.products import product as find_product
from snpbook.spec.resources import resource
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.sizes import parse_size
from snpbook.spec.termination import ended
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_kvm_structs import EXIT_SYSTEM_EVENT
from snpbook.spec.vmsa import VCPU_TYPES
from snpbook.trace import Counts, Recorder, Trace
from snpbook.vendor.ca import ISSUED, AmdCa

GIB = 1 << 30
NOW = ISSUED + timedelta(days=30)
"""The time of verification unless the caller gives one."""
SAMPLE_IMAGE = ("data", "firmware", "sample.fd")
SAMPLE_SVSM = ("data", "firmware", "svsm.bin")
SAMPLE_NAME = SAMPLE_IMAGE[-1]


class _Rng:
    """Random bytes from a seed: a counter through the firmware's own key derivation."""

    def __init__(self, seed: bytes) -> None:
        self._seed, self._count = seed, 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return kdf(self._seed, "snpbook-random", self._count.to_bytes(8, "little"), size)


class System:
    """An EPYC server. `installed` is its memory in bytes, of which nothing is used until it is touched.

    `release` chooses the document revision of its SNP firmware, such as "1.58"; without it the product's own runs.
    `board` are further options of `Machine`, such as `sockets`, `cache` or `tsme`.
    """

    def __init__(
        self,
        product: str = "milan",
        seed: str = "snpbook",
        *,
        installed: int = 4 * GIB,
        cores: int = 8,
        release: str | None = None,
        **board: Any,
    ) -> None:
        self.product, self.seed = find_product(product), seed
        if release is not None:
            self.product = self.product.running(release)
        self.trace, self.counts = Trace(), Counts()
        self.trace.subscribe(self.counts)
        root = seed.encode()
        self.machine = Machine(
            self.product, installed, boot_entropy=kdf(root, "boot", b"", 32), trace=self.trace, cores=cores, **board
        )
        self.chip = Chip.from_seed(seed, product)
        self.processor: SecureProcessor = power_on(self.machine, self.chip, _Rng(kdf(root, "firmware", b"", 32)))
        self.host = Kernel(HostCpu(self.machine))
        self.guests: list[Guest] = []

    def __repr__(self) -> str:
        return f"System({self.product.name}, seed {self.seed!r}, {self.host!r})"

    def record(self) -> Recorder:
        """Keep every event from now on, for a log."""
        recorder = Recorder()
        self.trace.subscribe(recorder)
        return recorder

    def create_vm(
        self,
        *,
        memory: int | str = "64 MiB",
        vcpus: int = 1,
        image: Image | None = None,
        boot: DirectBoot | None = None,
        kind: str = "snp",
        vcpu_type: str = "",
        discard: bool = True,
        backend: str = "",
        svsm: bool = False,
        **properties: Any,
    ) -> Guest:
        """A guest with a firmware image (default: the sample image), not yet launched.

        `memory` is in bytes, or a text such as "64 MiB"; `vcpu_type` is QEMU's name of a model, by default the
        product's. `kind` is plain, sev, sev-es or snp, `properties` are those of QEMU's object for it, such as `policy`
        or `host_data`. `discard`: conversions free the side that is left. `backend` says where private pages are, by
        default where the host's era has them; `NoSuchCell` where no kernel ever had the kind's there.
        With `svsm` the sample SVSM runs at VMPL0 and the guest at VMPL2, which takes a host of the era svsm-host.
        """
        image, which = image or sample_image(), GuestKind(_one_of("kind", kind, (each.value for each in GuestKind)))
        model = _one_of("vcpu_type", vcpu_type or self.product.vcpu_type, VCPU_TYPES)
        size, signature = parse_size(memory), int(VCPU_TYPES[model])
        hashes = {"kernel_hashes": True} if boot and which is not GuestKind.PLAIN else {}
        sev = default_object(which, **{**hashes, **properties})
        vmm = Vmm(
            self.host, image, memory=size, vcpus=vcpus, vcpu_signature=signature, boot=boot, kind=which,
            discard=discard, sev=sev, backend=cell(kind, backend).backend if backend else None,
            svsm=sample_svsm() if svsm else None,
        )  # fmt: skip
        return self._own(vmm)

    def qemu(self, command_line: str, files: Mapping[str, bytes] | None = None) -> Guest:
        """A guest from a QEMU command line; `files` are those that it names, by name."""
        return self._own(create(self.host, read(command_line), files or {SAMPLE_NAME: sample_image().data}))

    def _own(self, vmm: Vmm) -> Guest:
        guest = Guest(self, vmm)
        self.guests.append(guest)
        return guest

    def snapshot(self) -> Snapshot:
        """All that machine, firmware, host and guests hold now, to be compared or restored; not what listeners hold."""
        return Snapshot(system=self)

    def owner(self, guest: Guest) -> Owner:
        """The relying party of a guest: knows its image and the toy roots, and sees nothing of the machine."""
        vmm = guest.vmm
        if vmm.svsm:
            pages = svsm_vmsa_pages(vmm.image, vmm.svsm, 0, len(vmm.vcpus), vmm.signature)
            return Owner(launch_digest(svsm_runs(vmm.image, vmm.svsm, 0, pages)), self.certificates())
        features = SevFeatures.SNP_ACTIVE | (vmm.object.vmsa_features if vmm.object else 0)
        pages, boot = vmsa_pages(vmm.image, len(vmm.vcpus), vmm.signature, features), vmm.measured_boot
        hashes = kernel_hash_table(boot.kernel, boot.initrd, boot.cmdline) if boot else None
        return Owner(snp_digest(vmm.image, pages, kernel_hashes=hashes), self.certificates())

    def certificates(self) -> list[bytes]:
        """VCEK, ASK, ARK of this chip at the reported TCB, DER: what AMD's key service would give. Toy keys."""
        ca = AmdCa(self.product.name)
        vcek = ca.provision(self.chip, self.processor.reported_tcb, ISSUED)
        return [vcek, ca.ask.der, ca.ark.der]


class Guest:
    """A guest from its owner's side: launch it, let it boot, ask it for a report."""

    def __init__(self, system: System, vmm: Vmm) -> None:
        self.system, self.vmm = system, vmm
        self.booted = False
        self.accepted = 0
        self.dmesg: tuple[str, ...] = ()

    def __repr__(self) -> str:
        state = "running" if self.booted else "launched" if self.vmm.launched else "created"
        return f"Guest({state}, {self.vmm!r})"

    def launch(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Launch through KVM and the firmware."""
        self.vmm.launch(progress)
        if self.vmm.svsm:
            program = svsm_program(self.vmm.svsm, self.vmm.image.gpa, self.vmm.svsm_gpa)
            for vcpu in self.vmm.vcpus:
                vcpu.executor.levels[0] = level = CoroutineExecutor()
                level.start(program)

    def boot(self, acceptance: str = Acceptance.EAGER, *, knows: SevFeatures = NO_FEATURES) -> int:
        """Run the guest's boot program: the bytes of memory that it accepted. `dmesg` is what it says.

        `knows` are features that its kernel lives with beyond those of Linux 6.12, such as restricted injection.
        `VmmError` for a guest that has booted: its memory is accepted once.
        """
        if self.booted:
            raise VmmError("the guest has booted: create another one, or run a program on this one")
        image, when = self.vmm.image, Acceptance(_one_of("acceptance", acceptance, Acceptance))
        found = self.run(lambda cpu: boot(cpu, image, when, knows=knows))
        self.accepted, self.dmesg, self.booted = found.accepted, found.messages, True
        return self.accepted

    def request_report(self, report_data: bytes) -> bytes:
        """A report over `report_data` (padded with zeros to 64 bytes), through the encrypted channel."""
        if len(report_data) > 64:
            raise ValueError(f"report_data has {len(report_data)} bytes: a report carries 64")
        if self.vmm.kind is not GuestKind.SNP:
            raise VmmError(f"a {self.vmm.kind.value} guest has no way to the firmware: only SNP guests get reports")
        if not self.booted:
            self.boot()
        place, data = Layout.of(self.vmm.image), report_data.ljust(64, b"\0")
        report: bytes = self.run(lambda cpu: request_report(cpu, place, data))
        return report

    def run(self, program: Program, vcpu: int = 0) -> Any:
        """Run a guest program on a vCPU to its end: its return value. Raises the `ProgramFailure` it ended with.

        `VmmError` before the launch, which an encrypted guest needs, and while the vCPU is in the middle of another
        program; `GuestStopped` where it does not come to the end of this one.
        """
        if not self.vmm.launched and self.vmm.kind is not GuestKind.PLAIN:
            raise VmmError("the guest has not been launched: launch it first")
        executor = self.vmm.vcpus[vcpu].executor
        if executor.busy:
            raise VmmError(f"vCPU {vcpu} stopped in the middle of a program: let it go on first, or make another guest")
        executor.start(program)
        return self.go_on(vcpu)

    def go_on(self, vcpu: int = 0) -> Any:
        """Let a vCPU that stopped in the middle of a program run on, as `run` does; it has halted where there is none.

        A guest that asked to be ended halts, and raises what it ended with.
        """
        executor = self.vmm.vcpus[vcpu].executor
        stopped = self.vmm.run(vcpu)
        if stopped is not Exit.HLT or executor.busy:
            event = exit_record(self.vmm, self.vmm.handles[vcpu], EXIT_SYSTEM_EVENT)
            raise GuestStopped(stopped, ended(event.data0) if stopped is Exit.SYSTEM_EVENT else "")
        if isinstance(executor.outcome, ProgramFailure):
            raise executor.outcome
        return executor.outcome


class GuestStopped(RuntimeError):
    """A guest that left before its program was at an end: the `exit` that its VMM got, and for what it asked."""

    def __init__(self, exit_: Exit, why: str = "") -> None:
        super().__init__(f"the guest stopped: {exit_.name}" + f", {why}" * bool(why))
        self.exit, self.why = exit_, why


class Outcome(StrEnum):
    """The three ends of a verification."""

    ACCEPTED = "accepted"
    REFUSED = "refused by policy"
    NOT_GENUINE = "not genuine"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an owner concludes from a report: `outcome`, and every check that was made."""

    outcome: Outcome
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        failed = [check.name for check in self.checks if check.result is Result.FAILED]
        return f"{self.outcome}: {', '.join(failed)}" if failed else self.outcome

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Owner:
    """The guest's owner, far away: the expected measurement, computed from the image alone, and certificates."""

    expected_measurement: bytes
    certificates: Sequence[bytes] = field(repr=False)

    def verify(self, report: bytes, nonce: bytes | None = None, now: datetime = NOW) -> Verdict:
        """Is the report genuine, does it measure what it should, and does it carry the nonce?"""
        certificates = [Certificate.read(der) for der in self.certificates]
        policy = Policy("owner", measurement=self.expected_measurement, report_data=nonce)
        try:
            verified = verify(report, certificates, named_roots("toy"), now)
        except NotGenuine as refusal:
            return Verdict(Outcome.NOT_GENUINE, refusal.checks)
        appraisal = appraise(verified, policy)
        outcome = Outcome.ACCEPTED if appraisal.accepted else Outcome.REFUSED
        asked = (check for check in appraisal.checks if check.result is not Result.SKIPPED)
        return Verdict(outcome, (*verified.checks, *asked))


def sample_svsm() -> Image:
    """The small image of an SVSM that snpbook ships."""
    return Image.parse(resource(*SAMPLE_SVSM).read_bytes())


def _one_of(what: str, name: str, known: Iterable[str]) -> str:
    """The name, if it is known; `ValueError` with those that are."""
    names = list(known)
    if name not in names:
        raise ValueError(f"{what} = {name!r}: one of {', '.join(names)}")
    return name


def sample_image() -> Image:
    """The small OVMF-shaped image that snpbook ships."""
    return Image.parse(resource(*SAMPLE_IMAGE).read_bytes())
