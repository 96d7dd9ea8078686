"""The owner accepts what sev-snp-measure computes and this chip signed, and nothing else: report by report."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from snpbook.host.vmm.configuration import DirectBoot
from snpbook.spec.image import Image, ImageError
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.report import ATTESTATION_REPORT
from snpbook.system import Guest, Outcome, Owner, System, sample_image
from tests.attest import oracle
from tests.attest.vectors import VECTORS
from tests.machines import booted
from tests.sampling import sampled

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "firmware" / "sample.fd"
OVMF = Path("/usr/share/ovmf/OVMF.fd")
CODE_4M = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
AMDSEV = VECTORS / "launch" / "ovmf_AmdSev_suffix.bin"
"""With kernel hashes, and its reset block and metadata only: one page."""
VCPU_TYPES = {"milan": "EPYC-Milan", "genoa": "EPYC-Genoa"}
NONCE = bytes(range(64))


def image_of(path: Path) -> Image:
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    return Image.parse(path.read_bytes())


def expected(path: Path, product: str, vcpus: int, *more: str) -> str | None:
    """What sev-snp-measure says."""
    arguments = ["--mode", "snp", "--ovmf", str(path), "--vcpus", str(vcpus), "--vcpu-type", VCPU_TYPES[product]]
    output = oracle.measure([*arguments, "--guest-features", "0x1", *more])
    return None if output is None else output.strip()


def attested(
    image: Image, product: str = "milan", vcpus: int = 1, boot: DirectBoot | None = None, seed: str = "tests"
) -> tuple[Guest, bytes]:
    guest = booted(product, seed).create_vm(image=image, vcpus=vcpus, boot=boot, memory="16 MiB")
    guest.launch()
    return guest, guest.request_report(NONCE)


@cache
def walked() -> tuple[Guest, bytes]:
    """One walk on the sample image, for tests that only look at it."""
    return attested(sample_image())


def measurement(report: bytes) -> str:
    return report[0x90:0xC0].hex()


VCPUS = [1, 2, 5, *sampled(range(6, 65), 2)]


@pytest.mark.parametrize("vcpus", VCPUS)
@pytest.mark.parametrize("product", VCPU_TYPES)
@pytest.mark.parametrize("path", [SAMPLE, OVMF, AMDSEV], ids=lambda path: path.name)
def test_the_report_measures_what_sev_snp_measure_says(path: Path, product: str, vcpus: int) -> None:
    guest, report = attested(image_of(path), product, vcpus)
    assert measurement(report) == expected(path, product, vcpus)
    owner = guest.system.owner(guest)
    assert owner.expected_measurement.hex() == measurement(report)
    assert owner.verify(report, NONCE).outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("product", VCPU_TYPES)
def test_an_image_without_snp_metadata_is_measured_and_cannot_boot(product: str) -> None:
    """QEMU would launch it as well; the guest then has no secrets page, so there is no report to ask for."""
    guest = booted(product).create_vm(image=image_of(CODE_4M), vcpus=2)
    guest.launch()
    gctx = guest.vmm.vm.sev.gctx
    assert gctx is not None
    assert guest.system.processor.context(gctx).launch_digest.hex() == expected(CODE_4M, product, 2)
    with pytest.raises(ImageError, match="no SEV metadata"):
        guest.request_report(NONCE)


# Verdicts.


def test_the_nonce_is_the_owners() -> None:
    guest, report = walked()
    owner = guest.system.owner(guest)
    assert owner.verify(report).outcome is Outcome.ACCEPTED
    verdict = owner.verify(report, NONCE[::-1])
    assert verdict.outcome is Outcome.REFUSED
    assert "report_data" in str(verdict) or "report data" in str(verdict)


@pytest.mark.parametrize("offset", sampled(range(0x2A0), 24) + sampled([*range(0x2A0, 0x2D0), *range(0x2E8, 0x318)], 8))
def test_a_flipped_byte_is_not_genuine(offset: int) -> None:
    guest, report = walked()
    bad = bytearray(report)
    bad[offset] ^= 0x40
    assert guest.system.owner(guest).verify(bytes(bad), NONCE).outcome is Outcome.NOT_GENUINE


def test_another_machines_certificates_do_not_vouch() -> None:
    guest, report = walked()
    owner = guest.system.owner(guest)
    for other in (System("milan", "another seed"), System("genoa", "tests")):
        foreign = Owner(owner.expected_measurement, other.certificates())
        assert foreign.verify(report, NONCE).outcome is Outcome.NOT_GENUINE
    vcek, ask, ark = owner.certificates
    genoa = System("genoa", "tests").certificates()
    for chain in ([vcek, *genoa[1:]], [vcek, ask, genoa[2]], [genoa[0], ask, ark]):
        assert Owner(owner.expected_measurement, chain).verify(report, NONCE).outcome is Outcome.NOT_GENUINE


def test_the_report_says_what_was_launched() -> None:
    guest, report = walked()
    known = ATTESTATION_REPORT.unpack(report)
    assert (known.version, known.vmpl, known.policy, known.guest_svn) == (3, 0, DEFAULT_POLICY, 0)
    assert (known.report_data, known.host_data, known.chip_id) == (NONCE, bytes(32), guest.system.chip.chip_id)
    assert known.current_tcb == known.reported_tcb == known.committed_tcb == known.launch_tcb


def test_policy_and_host_data_reach_the_report() -> None:
    guest = booted(era="mainline").create_vm(memory="16 MiB", policy=DEFAULT_POLICY | 1 << 19, host_data=NONCE[:32])
    guest.launch()
    report = ATTESTATION_REPORT.unpack(guest.request_report(b"short"))
    assert (report.policy, report.host_data) == (DEFAULT_POLICY | 1 << 19, NONCE[:32])
    assert report.report_data == b"short".ljust(64, b"\0")
    debug = guest.system.owner(guest).verify(guest.request_report(b""))
    assert debug.outcome is Outcome.REFUSED, "debugging is on"


# Machines and guests side by side.


def test_two_systems_side_by_side_do_not_touch() -> None:
    systems = [booted("milan"), booted("genoa")]
    guests = [system.create_vm(memory="16 MiB") for system in systems]
    for step in ("launch", "boot"):
        for guest in guests:
            getattr(guest, step)()
    assert guests[0].request_report(NONCE) == walked()[1]
    assert guests[1].request_report(NONCE) == attested(sample_image(), "genoa")[1]


def test_two_guests_on_one_machine() -> None:
    system = booted()
    guests = [system.create_vm(memory="16 MiB", vcpus=count) for count in (1, 2)]
    for guest in guests:
        guest.launch()
    reports = [guest.request_report(NONCE) for guest in guests]
    assert [system.owner(g).verify(r, NONCE).outcome for g, r in zip(guests, reports, strict=True)] == ["accepted"] * 2
    assert reports[0][0x140:0x160] != reports[1][0x140:0x160], "report ids"
    assert system.owner(guests[0]).verify(reports[1], NONCE).outcome is Outcome.REFUSED
    for guest in guests:
        assert guest.request_report(NONCE[::-1])[0x50:0x90] == NONCE[::-1]


def test_repr_tells_where_a_guest_is() -> None:
    guest = booted().create_vm(memory="16 MiB")
    assert repr(guest).startswith("Guest(created")
    guest.launch()
    assert repr(guest).startswith("Guest(launched")
    guest.boot()
    assert repr(guest).startswith("Guest(running")
