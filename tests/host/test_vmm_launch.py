"""What a launch measures, for whom; what befalls it, and that nothing is lost then."""

from __future__ import annotations

import errno
import re
from base64 import b64encode
from contextlib import nullcontext
from functools import cache
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.attest.checks import NotGenuine
from snpbook.attest.id_block import create
from snpbook.attest.launch_secret import LaunchOwner
from snpbook.attest.measure import vmsa_pages
from snpbook.host.refusal import KernelError
from snpbook.host.vmm import launch
from snpbook.host.vmm.configuration import VmmError
from snpbook.host.vmm.guest import DirectBoot, GuestKind, Vmm
from snpbook.host.vmm.properties import default_object
from snpbook.spec.commands import Command
from snpbook.spec.launch import CPUID_PAGE, kernel_hash_table
from snpbook.spec.report import ATTESTATION_REPORT
from snpbook.spec.resources import resource
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.spec.vmsa import VMSA
from snpbook.system import Outcome, System, sample_image
from snpbook.trace import Message
from tests.host.test_vmm_order import host
from tests.machines import MIB, PAGE, counting_rng
from tests.sampling import sampled
from tests.test_system import launched_digest as digest_of

ERAS = pytest.mark.parametrize("era", ["mainline", "rfc-v7"])
SAMPLE = resource("data", "firmware", "sample.fd")
BOOT = DirectBoot(b"kernel", b"initrd", "console=ttyS0")


def spoil(patch: pytest.MonkeyPatch, system: System, command: Command, status: Status) -> None:
    """Let the firmware refuse a command from now on."""
    layout, _, run = system.processor._commands[command]

    def refuse(*_: Any) -> Any:
        raise FirmwareRefusal(status, "spoilt")

    def refuse_run(*_: Any) -> Any:
        return 0, FirmwareRefusal(status, "spoilt")

    patch.setitem(system.processor._commands, command, (layout, refuse, run and refuse_run))


def holdings(system: System) -> dict[str, Any]:
    """What a guest could leave behind."""
    kernel, psp = system.host, system.processor
    return {
        "free": kernel.memory.free,
        "pinned": kernel.memory.pinned,
        "leaked": kernel.ccp.leaks.count,
        "guests": psp.guest_count + len(psp.legacy.guests),
        "vms": len(kernel.kvm.vms),
    }


launched_digest = cache(digest_of)

# Measured.


MEASURED = [(era, vcpus, measured) for era in ("mainline", "rfc-v7") for vcpus in (1, 3) for measured in (True, False)]


@pytest.mark.parametrize(("era", "vcpus", "measured"), sampled(MEASURED, 3))
def test_an_snp_guest_measures_what_its_owner_expects(era: str, vcpus: int, measured: bool) -> None:
    system = host(era)
    guest = system.create_vm(memory="12 MiB", vcpus=vcpus, boot=BOOT, kernel_hashes=measured)
    guest.launch()
    report = guest.request_report(b"n")
    owner = system.owner(guest)
    assert owner.verify(report, b"n".ljust(64, b"\0")).outcome is Outcome.ACCEPTED
    plain = launched_digest(SAMPLE, "milan", vcpus)
    assert (owner.expected_measurement == plain) is not measured


@ERAS
def test_identity_and_host_data_reach_the_report(era: str) -> None:
    expected = launched_digest(SAMPLE, "milan", 1)
    keys = [ec.derive_private_key(n, ec.SECP384R1()) for n in (5, 7)]
    identity = create(expected, keys[0], keys[1], family_id=b"f" * 16, guest_svn=9)
    given: dict[str, Any] = {"id_block": identity.block, "id_auth": identity.auth, "author_key_enabled": True}
    data = bytes(range(32))
    if era == "mainline":
        given["guest_visible_workarounds"] = b"\1\2"
    guest = host(era).create_vm(memory="12 MiB", host_data=data, **given)
    guest.launch()
    report = ATTESTATION_REPORT.unpack(guest.request_report(b""))
    assert (report.family_id, report.guest_svn) == (b"f" * 16, 9)
    assert report.id_key_digest == identity.id_key_digest
    assert report.author_key_digest == identity.author_key_digest
    assert report.host_data == (data if era == "mainline" else bytes(32)), "KVM of series v7 forgets it"


def owned(system: System, kind: GuestKind, boot: DirectBoot | None = None) -> tuple[Vmm, LaunchOwner]:
    """A guest of an owner who has made his session for this platform; its launch waits for a secret."""
    pdh = exported_pdh(system)
    policy = 5 if kind is GuestKind.SEV_ES else 1
    owner = LaunchOwner.draw(policy, counting_rng(b"owner"))
    session = owner.session(pdh, counting_rng(b"session"))
    files = {"dh.b64": b64encode(owner.certificate), "session.b64": b64encode(session)[:40] + b"\n" +
             b64encode(session)[40:]}  # fmt: skip
    vmm = Vmm(
        system.host, sample_image(), memory=12 * MIB, vcpus=2, vcpu_signature=system.product.vcpu_signature, kind=kind,
        boot=boot, files=files, sev=default_object(
            kind, dh_cert_file="dh.b64", session_file="session.b64", kernel_hashes=boot is not None),
    )  # fmt: skip
    vmm.machine_done()
    return vmm, owner


def exported_pdh(system: System) -> bytes:
    """PDH as a tool asks /dev/sev for it."""
    process = system.host.process()
    fd, at = process.open("/dev/sev"), process.mmap(4 * 4096)
    asked = at.to_bytes(8, "little") + (2084).to_bytes(4, "little") + (at + 4096).to_bytes(8, "little")
    process.store(at + 3 * 4096, asked + (3 * 2084).to_bytes(4, "little"))
    command = (5).to_bytes(4, "little") + (at + 3 * 4096).to_bytes(8, "little") + bytes(4)
    process.ioctl(fd, 0xC0105300, bytearray(command))
    pdh = process.load(at, 2084)
    process.exit()
    return pdh


@ERAS
@pytest.mark.parametrize("kind", [GuestKind.SEV, GuestKind.SEV_ES])
@pytest.mark.parametrize("boot", [None, BOOT])
def test_the_hmac_of_a_legacy_launch(era: str, kind: GuestKind, boot: DirectBoot | None) -> None:
    """SHA-256 over all that was loaded, under the owner's key: private memory in whole pages, FPU state after INIT2."""
    system = host(era)
    vmm, owner = owned(system, kind, boot)
    loaded = vmm.image.data
    if boot:
        table = kernel_hash_table(boot.kernel, boot.initrd, boot.cmdline)
        loaded += table if era == "mainline" else (bytes(0xC00) + table).ljust(PAGE, b"\0")
    if kind is GuestKind.SEV_ES:
        for page in vmsa_pages(vmm.image, 2, system.product.vcpu_signature, 0):
            fpu = {} if era == "mainline" else {"mxcsr": 0, "x87_fcw": 0}
            loaded += bytes(VMSA.unpack(page).replace(**fpu))
    status = platform_version(system)
    owner.check_measurement(vmm.measurement, sha256(loaded).digest(), status[:2], status[2])
    with pytest.raises(NotGenuine):
        owner.check_measurement(vmm.measurement, sha256(loaded + b"\0").digest(), status[:2], status[2])


def platform_version(system: System) -> tuple[int, int, int]:
    process = system.host.process()
    fd, at = process.open("/dev/sev"), process.mmap(4096)
    command = (1).to_bytes(4, "little") + at.to_bytes(8, "little") + bytes(4)
    process.store(at, bytes(16))
    process.ioctl(fd, 0xC0105300, bytearray(command))
    status = process.load(at, 16)
    process.exit()
    return status[0], status[1], status[7]


# A secret, a reset.


def test_a_secret_comes_between_measurement_and_start() -> None:
    system = host()
    vmm, owner = owned(system, GuestKind.SEV)
    header, body = owner.secret_packet(b"open sesame", vmm.measurement, counting_rng(b"packet"))
    with pytest.raises(KernelError) as caught:
        vmm.inject_secret(header, bytes([body[0] ^ 1]) + body[1:])
    assert caught.value.firmware is Status.BAD_MEASUREMENT
    vmm.inject_secret(header, body)
    frame = vmm.process.space.frames(range(vmm.user(0x810000) >> 12, (vmm.user(0x810000) >> 12) + 1))[0]
    plain = system.machine.encryption.read(vmm.vm.asid, int(frame) << 12, 16)
    assert plain == b"open sesame".ljust(16, b"\0")
    vmm.launch()
    with pytest.raises(VmmError, match="Not in correct state"):
        vmm.inject_secret(header, body)


def test_who_takes_no_secret() -> None:
    system = host()
    with pytest.raises(VmmError, match="Not in correct state"):
        system.create_vm(kind="sev", memory="12 MiB").vmm.inject_secret(b"h", b"s")
    snp = system.create_vm(memory="12 MiB").vmm
    snp.machine_done()
    with pytest.raises(VmmError, match="Not in correct state"):
        snp.inject_secret(b"h", b"s")


def test_reset() -> None:
    system = host()
    before = holdings(system)
    for kind in ("plain", "sev"):
        guest = system.create_vm(kind=kind, memory="12 MiB", vcpus=2)
        guest.launch()
        vcpu = guest.vmm.vcpus[1]
        first = vcpu.state
        vcpu.state = first.replace(rip=0x1234, rax=5)
        guest.vmm.reset()
        assert (vcpu.state.rip, vcpu.state.rax) == (first.rip, 0)
        guest.vmm.close()
    for kind in ("sev-es", "snp"):
        log = system.record()
        guest = system.create_vm(kind=kind, memory="12 MiB")
        guest.launch()
        with pytest.raises(VmmError, match="cpus are not resettable, terminating"):
            guest.vmm.reset()
        assert [event.text for event in log.of(Message) if event.source.startswith("qemu")] == [
            "cpus are not resettable, terminating"
        ]
        assert holdings(system) == before


# Several guests, and what goes wrong.


@pytest.mark.parametrize("kind", ["snp", "sev-es", "sev"])
def test_a_guest_that_was_asked_too_early_still_starts(kind: str) -> None:
    system = System()
    system.host.boot("mainline")
    guest = system.create_vm(kind=kind)
    with pytest.raises(VmmError, match="has not been launched"):
        guest.boot()
    guest.launch()
    assert guest.boot() > 0 or kind != "snp"


@ERAS
def test_guests_of_all_kinds_side_by_side(era: str) -> None:
    system = host(era, 256 * MIB)
    before = holdings(system)
    guests = [
        system.create_vm(kind=kind, memory="12 MiB", vcpus=2) for kind in ("snp", "sev", "sev-es", "plain", "snp")
    ]
    for guest in reversed(guests):
        guest.launch()
    asids = [guest.vmm.vm.asid for guest in guests if guest.vmm.object]
    assert len(set(asids)) == len(asids)
    contexts = [guests[n].vmm.vm.sev.gctx for n in (0, 4)]
    assert contexts[0] != contexts[1]
    assert len({system.processor.context(each).launch_digest for each in contexts}) == 1
    for guest in guests:
        guest.vmm.close()
    assert holdings(system) == before


FAILURES = [
    ("snp", Command.SNP_LAUNCH_START, Status.POLICY_FAILURE,
     "sev_snp_launch_start: SNP_LAUNCH_START ret=-5 fw_error=7 'Policy is not allowed'"),
    ("snp", Command.SNP_LAUNCH_UPDATE, Status.INVALID_ADDRESS,
     "sev_snp_launch_update: SNP_LAUNCH_UPDATE ret=-5 fw_error=9 'Invalid address'"),
    ("snp", Command.SNP_LAUNCH_FINISH, Status.BAD_SIGNATURE,
     "sev_snp_launch_finish: SNP_LAUNCH_FINISH ret=-5 fw_error=10 'Bad signature'"),
    ("sev", Command.LAUNCH_START, Status.UNSUPPORTED,
     "sev_launch_start: LAUNCH_START ret=-5 fw_error=21 'Feature not supported'"),
    ("sev", Command.LAUNCH_UPDATE_DATA, Status.RESOURCE_LIMIT,
     "sev_launch_update_data: LAUNCH_UPDATE ret=-5 fw_error=23 'Required firmware resource depleted'"),
    ("sev-es", Command.LAUNCH_UPDATE_VMSA, Status.INVALID_GUEST,
     "sev_launch_update_vmsa: LAUNCH_UPDATE_VMSA ret=-5 fw_error=16 'Guest handle is invalid'"),
    ("sev", Command.LAUNCH_MEASURE, Status.HWERROR_PLATFORM,
     "sev_launch_get_measure: LAUNCH_MEASURE ret=-5 fw_error=19 'Hardware error'"),
    ("sev", Command.LAUNCH_FINISH, Status.INVALID_GUEST_STATE,
     "sev_launch_finish: LAUNCH_FINISH ret=-5 fw_error=2 'Guest state is invalid'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "command", "status", "line"), FAILURES, ids=lambda one: getattr(one, "name", None))
def test_a_launch_that_fails_ends_the_process_and_loses_nothing(
    kind: str, command: Command, status: Status, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = host()
    before = holdings(system)
    spoil(monkeypatch, system, command, status)
    with pytest.raises(KernelError) as caught:
        system.create_vm(kind=kind, memory="12 MiB", vcpus=2).launch()
    assert caught.value.errno == errno.EIO
    assert caught.value.__notes__ == [f"qemu-system-x86_64: {line}"]
    assert holdings(system) == before
    monkeypatch.undo()
    system.create_vm(kind=kind, memory="12 MiB").launch()


SHORTAGES = [
    (era, kind, left) for era in ("mainline", "rfc-v7") for kind in ("snp", "sev", "sev-es")
    for left in (0, 3, 20, 40, 60, 80, 150, 1500)
]  # fmt: skip


ENOUGH = {("mainline", "snp"): 80, ("rfc-v7", "snp"): 150, ("rfc-v7", "sev"): 60, ("rfc-v7", "sev-es"): 60}
"""With so many pages a launch gets to its end; others need all 10 MiB."""


@pytest.mark.parametrize(("era", "kind", "left"), sampled(SHORTAGES, 10))
def test_out_of_memory_in_the_middle_of_a_launch(era: str, kind: str, left: int) -> None:
    """However many pages are left: what a launch took before it failed, or took at all, comes back with the process.

    A guest of the sample image needs few where it has a private side, in series v7 on both; what is pinned must all be.
    """
    system = host(era, 64 * MIB)
    memory = system.host.memory
    memory.take(memory.free - left)
    before = holdings(system)
    enough = left >= ENOUGH.get((era, kind), 10 * MIB // PAGE)
    with nullcontext() if enough else pytest.raises(KernelError) as caught:
        guest = system.create_vm(kind=kind, memory="10 MiB")
        guest.launch()
        guest.vmm.close()
    if caught:
        assert caught.value.errno in (errno.ENOMEM, errno.EIO, errno.EFAULT, errno.ENOTTY)
    assert holdings(system) == before


def test_the_firmware_rejects_the_cpuid_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users of `-cpu host` met it: a bit of leaf 0x80000021 that the firmware does not know."""
    system = host()
    before = holdings(system)
    honest = launch.cpuid_page

    def bad(vmm: Vmm) -> bytes:
        page = CPUID_PAGE.unpack(honest(vmm))
        at = next(i for i, entry in enumerate(page.entries) if entry.eax_in == 0x80000021)
        entries = list(page.entries)
        entries[at] = entries[at].replace(eax=entries[at].eax | 0x200)
        return bytes(page.replace(entries=tuple(entries)))

    monkeypatch.setattr(launch, "cpuid_page", bad)
    guest = system.create_vm(memory="12 MiB")
    with pytest.raises(KernelError) as caught:
        guest.launch()
    lines = [note.removeprefix("qemu-system-x86_64: ") for note in caught.value.__notes__]
    assert lines[0] == "sev_snp_launch_update: SNP_LAUNCH_UPDATE ret=-5 fw_error=22 'Invalid parameter'"
    failed, provided, expected = re.split(", (?=provided|expected)", lines[1])
    assert failed == "SEV-SNP: CPUID validation failed for function 0x80000021, index: 0x0"
    assert provided == "provided: eax:0x0000224d, ebx: 0x00000000, ecx: 0x00000000, edx: 0x00000000"
    assert expected == "expected: eax:0x0000204d, ebx: 0x00000000, ecx: 0x00000000, edx: 0x00000000"
    assert lines[2:] == ["SEV-SNP: failed update CPUID page"]
    assert holdings(system) == before
