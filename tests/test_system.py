"""The whole machine: the same seed gives the same bytes, counts equal a hand count, measurements another tool's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.dram import Dram
from snpbook.host.vmm.configuration import DirectBoot, VmmError
from snpbook.spec.image import Image, ImageError
from snpbook.spec.resources import resource
from snpbook.system import Outcome, System
from snpbook.trace import Counts, FirmwareCommand, Instruction, Ioctl, Recorder, VmExit
from tests.attest.oracle import measure
from tests.attest.vectors import VECTORS
from tests.machines import MIB, PAGE, booted, launched
from tests.sampling import sampled

SMALL = "12 MiB"


def walk(name: str = "milan", seed: str = "one", data: bytes = b"nonce", **options: Any) -> tuple[System, bytes]:
    system = booted(name, seed)
    guest = launched(system, memory=SMALL, **options)
    return system, guest.request_report(data)


@pytest.mark.parametrize(("release", "version"), [(None, 3), ("1.51", 2), ("1.55", 2), ("1.58", 5)])
def test_a_release_of_the_firmware_is_chosen(release: str | None, version: int) -> None:
    system = System("genoa", "one", installed=1 << 30, release=release)
    system.host.boot()
    assert str(system.processor.release.abi) == (release or "1.55")
    report = launched(system, memory=SMALL).request_report(b"nonce")
    assert report[0] == version
    with pytest.raises(ValueError, match=r"1\.99"):
        System("genoa", release="1.99")
    with pytest.raises(ValueError, match="must have SNP commands"):
        System("rome", release="1.55")


# The same again.


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    first, second = walk(name), walk(name)
    assert first[1] == second[1]
    assert first[0].certificates() == second[0].certificates()
    assert first[0].counts == second[0].counts
    table = first[0].machine.map.rmp
    assert first[0].machine.dram.read(0, 64 * MIB) == second[0].machine.dram.read(0, 64 * MIB)
    assert first[0].machine.dram.read(table.base, MIB) == second[0].machine.dram.read(table.base, MIB)


def test_another_seed_is_another_chip_and_other_keys() -> None:
    (one, first), (two, second) = walk(seed="one"), walk(seed="two")
    assert first[0x90:0xC0] == second[0x90:0xC0], "the measurement is the image's"
    for start, end in ((0x140, 0x160), (0x1A0, 0x1E0), (0x2A0, 0x330)):
        assert first[start:end] != second[start:end]
    assert one.certificates()[0] != two.certificates()[0]
    assert one.certificates()[1:] == two.certificates()[1:], "the toy CA is fixed"


def test_products_differ() -> None:
    reports = {name: walk(name)[1] for name in ("milan", "genoa")}
    assert reports["milan"][0x188:0x18A] == bytes([0x19, 0x01])
    assert reports["genoa"][0x188:0x18A] == bytes([0x19, 0x11])
    assert reports["milan"][0x90:0xC0] != reports["genoa"][0x90:0xC0], "the vCPU's signature is measured"


def test_two_guests_of_one_machine_differ_in_what_is_theirs() -> None:
    system = booted()
    reports = [launched(system, memory=SMALL).request_report(b"") for _ in range(2)]
    assert reports[0][0x90:0xC0] == reports[1][0x90:0xC0]
    assert reports[0][0x140:0x160] != reports[1][0x140:0x160], "REPORT_ID"


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_the_dictionary_gives_the_same_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses the mapping, nobody can tell."""
    mapped, expected = walk(name)
    assert mapped.machine.dram.mapped
    honest: Callable[..., None] = Dram.__init__
    monkeypatch.setattr(Dram, "__init__", lambda dram, size, **_: honest(dram, size, mapping=False))
    system, report = walk(name)
    assert not system.machine.dram.mapped
    assert report == expected
    assert system.counts == mapped.counts


# The owner.


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_the_owner_accepts_and_a_changed_byte_is_refused(name: str) -> None:
    system = booted(name)
    guest = launched(system, memory=SMALL)
    owner, report = system.owner(guest), guest.request_report(b"nonce")
    assert owner.verify(report, b"nonce").outcome is Outcome.ACCEPTED
    assert owner.verify(report, b"other").outcome is Outcome.REFUSED
    for position in sampled(range(0x2A0), 12):
        changed = report[:position] + bytes([report[position] ^ 1]) + report[position + 1 :]
        assert owner.verify(changed, b"nonce").outcome is Outcome.NOT_GENUINE, hex(position)


def test_a_byte_changed_in_dram_changes_the_report_and_not_the_expectation() -> None:
    """Between RMPUPDATE and SNP_LAUNCH_UPDATE the host cannot write the page; whoever reaches the DIMM can."""
    system = booted()
    guest = system.create_vm(memory=SMALL)
    ccp, honest = system.host.ccp, system.host.ccp.launch_update
    changed = []

    def tampered(gctx: int, pages: range, kind: Any) -> None:
        if not changed:
            with pytest.raises(Exception, match="PRE_GUEST"):
                system.host.cpu.write((pages[0] << 12) + 5, b"x")
            dram = system.machine.dram
            dram.write((pages[0] << 12) + 5, bytes([dram.read((pages[0] << 12) + 5, 1)[0] ^ 1]))
            changed.append(pages[0])
        honest(gctx, pages, kind)

    ccp.launch_update = tampered  # type: ignore[method-assign]
    guest.launch()
    owner, report = system.owner(guest), guest.request_report(b"")
    verdict = owner.verify(report)
    assert verdict.outcome is Outcome.REFUSED
    assert "policy.measurement" in str(verdict)
    assert owner.expected_measurement == launched_digest(resource("data", "firmware", "sample.fd"), "milan", 1)


# Counts.


def test_counts_by_hand() -> None:
    """A guest of 12 MiB with one vCPU, from power-on to its report."""
    system, _ = walk()
    ram = 12 * MIB // PAGE
    accepted = ram - 31 - 3  # sections, shared pages
    launch_pages = 16 + 31 + 1  # image, sections, VMSA
    assert system.counts.pages_validated == accepted
    # The whole 2 MB pages between the ranges' ends are tried as such first: 1 to 3 and 5 (4 holds the sections).
    assert system.counts.pvalidates == accepted + 4
    donated = 1 + 1 + 1  # status buffer, context and response page: given and taken, the context only given
    tmr = 512  # 2 MB for SEV-ES at boot
    assert system.counts.rmpupdates == tmr + accepted + launch_pages + 2 * donated - 1
    commands = (
        1 + 2 + 2 + 2 + 3 + launch_pages + 1 + 2
    )  # status, SNP and SEV with a flush each, QEMU's status, start, pages, finish, request; two with a reclaim
    assert system.counts.firmware_commands == commands


def test_counts_are_the_sum_of_the_events() -> None:
    system = System(installed=1 << 30)
    log = system.record()
    system.host.boot()
    launched(system, memory=SMALL, vcpus=3).request_report(b"")
    counts = Counts()
    for event in log.events:
        counts(event)
    assert counts == system.counts
    assert counts.ioctls == len(log.of(Ioctl))
    assert counts.exits == sum(event.pages for event in log.of(VmExit))
    assert counts.firmware_commands == sum(
        1 if event.pages is None else len(event.pages) for event in log.of(FirmwareCommand)
    )
    assert counts.rmpupdates == sum(len(event.status) for event in log.of(Instruction, "RMPUPDATE"))


def test_without_listeners_the_machine_does_the_same() -> None:
    loud, report = walk()
    system = System("milan", "one", installed=1 << 30)
    system.trace._listeners.clear()
    system.host.boot()
    assert launched(system, memory=SMALL).request_report(b"nonce") == report
    assert system.counts == Counts()
    assert loud.counts != Counts()


# Measurements, against an independent tool.

VCPU_TYPE = {"milan": "EPYC-Milan", "genoa": "EPYC-Genoa"}
IMAGES = {
    "sample": resource("data", "firmware", "sample.fd"),
    "OVMF.fd": Path("/usr/share/ovmf/OVMF.fd"),
    "OVMF_CODE_4M.fd": Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
    "AmdSev": VECTORS / "launch" / "ovmf_AmdSev_suffix.bin",
}
KERNEL, INITRD, CMDLINE = b"a kernel" * 1000, b"an initrd" * 77, "console=ttyS0 quiet"


def launched_digest(path: Path, name: str, vcpus: int, boot: DirectBoot | None = None) -> bytes:
    """The launch digest in the firmware's context."""
    system = booted(name)
    image = Image.parse(path.read_bytes())
    guest = launched(system, vcpus=vcpus, image=image, boot=boot)
    gctx = guest.vmm.vm.sev.gctx
    assert gctx is not None
    digest: bytes = system.processor.context(gctx).launch_digest
    return digest


def oracle(path: Path, name: str, vcpus: int, *more: str) -> str | None:
    arguments = ["--mode", "snp", "--vcpus", str(vcpus), "--vcpu-type", VCPU_TYPE[name], "--ovmf", str(path), *more]
    printed = measure(arguments)
    return None if printed is None else printed.strip()


CASES = [(image, name, vcpus) for image in IMAGES for name in VCPU_TYPE for vcpus in (1, 2, 7, 64)]


@pytest.mark.parametrize(("image", "name", "vcpus"), sampled(CASES, 12))
def test_the_firmware_measures_what_sev_snp_measure_does(image: str, name: str, vcpus: int) -> None:
    path = IMAGES[image]
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    assert launched_digest(path, name, vcpus).hex() == oracle(path, name, vcpus)


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("image", ["sample", "AmdSev"])
@pytest.mark.parametrize(("initrd", "cmdline"), [(INITRD, CMDLINE), (b"", "")])
def test_kernel_hashes(image: str, vcpus: int, initrd: bytes, cmdline: str, tmp_path: Path) -> None:
    path = IMAGES[image]
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    (tmp_path / "kernel").write_bytes(KERNEL)
    (tmp_path / "initrd").write_bytes(initrd)
    more = ["--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd"), "--append", cmdline]
    expected = oracle(path, "genoa", vcpus, *more)
    assert expected
    assert launched_digest(path, "genoa", vcpus, DirectBoot(KERNEL, initrd, cmdline)).hex() == expected


def test_the_report_carries_the_contexts_digest() -> None:
    system = booted()
    guest = launched(system, memory=SMALL)
    gctx = guest.vmm.vm.sev.gctx
    assert gctx is not None
    assert guest.request_report(b"")[0x90:0xC0] == system.processor.context(gctx).launch_digest


# Bad configurations, and what changes nothing.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory": "8 MiB"}, VmmError, "8,320 KiB"),
        ({"memory": "3K"}, ValueError, "4096-byte pages"),
        ({"vcpus": 0}, VmmError, "1 to 1024 vCPUs"),
        ({"kind": "tdx"}, ValueError, "kind = 'tdx': one of plain, sev"),
        ({"vcpu_type": "EPYC-v9"}, ValueError, "vcpu_type = 'EPYC-v9': one of EPYC, "),
        ({"boot": DirectBoot(b"k"), "image": "OVMF_CODE_4M.fd"}, ImageError, "kernel hashes"),
    ],
)
def test_bad_configurations_make_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    system = booted()
    allocated = system.host.memory.allocated
    if "image" in options:
        path = IMAGES[options["image"]]
        if not path.is_file():
            pytest.skip(f"{path.name} is not on this machine")
        options = {**options, "image": Image.parse(path.read_bytes())}
    with pytest.raises(error, match=message):
        system.create_vm(**options)
    assert system.host.memory.allocated == allocated
    assert system.create_vm().vmm.vm.asid == 1


def test_memory_and_boot_leave_the_measurement_alone() -> None:
    digests = set()
    for memory in (SMALL, "64 MiB", 10 * MIB + PAGE):
        system = booted()
        digests.add(launched(system, memory=memory).request_report(b"")[0x90:0xC0])
    assert len(digests) == 1


def test_a_report_takes_at_most_64_bytes() -> None:
    guest = launched(memory=SMALL)
    with pytest.raises(ValueError, match="65 bytes"):
        guest.request_report(bytes(65))
    assert guest.request_report(b"\xff" * 64)[0x50:0x90] == b"\xff" * 64


def test_what_the_guest_wrote_is_ciphertext_in_dram() -> None:
    system = booted()
    guest = launched(system, memory=SMALL)
    guest.boot()
    secret = hashlib.sha256(b"secret").digest()

    async def write(cpu: Any) -> bytes:
        await cpu.write(0x500000, secret)
        data: bytes = await cpu.read(0x500000, 32)
        return data

    assert guest.run(write) == secret
    used = system.host.memory.allocated * PAGE + 16 * MIB
    raw = np.frombuffer(system.machine.dram.read(0, used + MIB), np.uint8).tobytes()
    assert secret not in raw
    assert secret[:16] not in raw


def test_both_branches_of_a_snapshot_go_on_alike() -> None:
    """Restored, a system does again what it did, byte for byte."""
    system = System("genoa", "branches", installed=256 << 20)
    system.host.boot()
    guest = system.create_vm(memory="16 MiB", vcpus=2)
    guest.launch()
    launched = system.snapshot()
    branches = []
    for _ in range(2):
        recorder = Recorder()
        stop = system.trace.subscribe(recorder)
        report = guest.request_report(b"nonce")
        stop()
        branches.append((report, [repr(event) for event in recorder.events], system.snapshot()))
        launched.restore()
        assert system.snapshot() == launched
    (report, events, end), (again, events_again, end_again) = branches
    assert report == again
    assert events == events_again
    assert len(events) > 20
    assert end.differences(end_again) == []
    assert "system.machine.dram" in end.differences(launched)
    guest.launch_again = None  # type: ignore[attr-defined]
    launched.restore()
    assert not hasattr(guest, "launch_again")


def test_two_systems_of_one_seed_are_equal_and_of_two_are_not() -> None:
    one, two, other = (System("milan", seed, installed=256 << 20) for seed in ("a", "a", "b"))
    for system in (one, two, other):
        system.host.boot()
        system.create_vm(memory="16 MiB").launch()
    assert one.snapshot() == two.snapshot()
    assert one.snapshot() != other.snapshot()


def test_a_guest_boots_once_and_goes_on_after_the_refusal() -> None:
    guest = launched(memory="16 MiB")
    with pytest.raises(ValueError, match="acceptance = 'never': one of eager, lazy"):
        guest.boot("never")
    guest.boot()
    with pytest.raises(VmmError, match="the guest has booted"):
        guest.boot()
    assert len(guest.request_report(b"")) == 1184
