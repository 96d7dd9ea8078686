"""Bytes changed in DRAM behind the RMP: the launch digest catches what the access check cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snpbook.attacks.dram import flip_before_measurement
from snpbook.spec.image import Image
from snpbook.system import Outcome, System
from tests.machines import booted

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "firmware" / "sample.fd"
NONCE = bytes(range(64))


def attested(system: System, image: Image | None = None) -> tuple[bytes, bytes]:
    """A report, and the measurement that the owner expects."""
    guest = system.create_vm(memory="16 MiB", image=image)
    guest.launch()
    return guest.request_report(NONCE), system.owner(guest).expected_measurement


@pytest.mark.parametrize("offset", [0, 17, 4095])
@pytest.mark.parametrize("product", ["milan", "genoa"])
def test_the_bit_is_in_the_report_and_not_in_the_expectation(product: str, offset: int) -> None:
    system = booted(product)
    flip_before_measurement(system, offset)
    guest = system.create_vm(memory="16 MiB")
    guest.launch()
    report, owner = guest.request_report(NONCE), system.owner(guest)
    verdict = owner.verify(report, NONCE)
    assert verdict.outcome is Outcome.REFUSED
    assert "measurement" in str(verdict)
    genuine = replace(owner, expected_measurement=report[0x90:0xC0])
    assert genuine.verify(report, NONCE).outcome is Outcome.ACCEPTED, "the report itself is genuine"

    _, honest = attested(booted(product))
    assert owner.expected_measurement == honest
    changed = bytearray(SAMPLE.read_bytes())
    changed[offset] ^= 1
    _, of_changed = attested(booted(product), Image.parse(bytes(changed)))
    assert report[0x90:0xC0] == of_changed, "exactly that bit was measured"


def test_it_strikes_once() -> None:
    system = booted()
    flip_before_measurement(system)
    attested(system)
    report, expected = attested(system)
    assert report[0x90:0xC0] == expected


def test_called_off_it_changes_nothing() -> None:
    system = booted()
    flip_before_measurement(system)()
    assert attested(system) == attested(booted())
