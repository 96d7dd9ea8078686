"""The early kernel: what it asks in which order, and what it checks of itself before it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.guest.boot import Kernel, start
from snpbook.guest.termination import Terminated
from snpbook.hardware.guest_cpu import ProgramFailure
from tests.guest.bare import C_BIT, PLACE, PRIVATE, Answer, Bare

ANSWERS = {0x002: 2 << 48 | 1 << 32 | C_BIT << 24 | 1, 0x080: 3 << 12 | 0x081, 0x012: PLACE.ghcb | 0x013}


def honest(value: int) -> int:
    return ANSWERS.get(value & 0xFFF, 0)


def bare(c_bit: int = C_BIT, *, version: int = 3, features: int = 1, sev: int = 2) -> Bare:
    table = [(0x80000000, 0, 0, 0, 0x80000021, 0, 0, 0), (0x8000001F, 0, 0, 0, sev, c_bit, 0, 0)]
    guest = Bare(cpuid=table, features=features)
    guest.put(PLACE.secrets, version.to_bytes(4, "little"))
    guest.bench.start(lambda cpu: start(cpu, PLACE))
    return guest


def test_what_it_asks() -> None:
    guest = bare()
    kernel: Any = guest.go_on(msr=honest)
    assert isinstance(kernel, Kernel)
    assert (kernel.protections.c_bit, kernel.protections.snp) == (C_BIT, True)
    assert guest.values == [0x002, 0x080, PLACE.ghcb | 0x012]
    assert not guest.requests
    assert guest.get(PLACE.tables + 0xFF8, 8) == bytes(8), "the probe is gone"


def test_another_bit_does_not_encrypt() -> None:
    guest = bare(55)
    with pytest.raises(Terminated, match="not encrypted"):
        guest.go_on(msr=honest)
    assert guest.ended_with == (0, 0)


def test_a_bit_that_cannot_be() -> None:
    with pytest.raises(ProgramFailure, match="bit 31"):
        bare(31).go_on(msr=honest)


def test_a_secrets_page_that_nobody_wrote() -> None:
    guest = bare(version=0)
    with pytest.raises(Terminated):
        guest.go_on(msr=honest)
    assert guest.ended_with == (1, 6)


def test_a_feature_that_it_would_have_to_know() -> None:
    """VMPL_SSS, bit 10 of SEV_STATUS; the hypervisor is told by the event, with the bits."""
    guest = bare(features=1 | 1 << 8)
    with pytest.raises(Terminated, match="SNP_FEATURES"):
        guest.go_on(Answer(), msr=honest)
    (request,) = guest.requests
    assert request.fields == {"code": 0x8000FFFE, "info1": 2 << 4, "info2": 1 << 10}


def test_above_vmpl0_it_needs_an_svsm() -> None:
    guest = bare()
    guest.put(PLACE.secrets + 0x148, bytes(8))
    for gfn in PRIVATE:
        guest.bench.assign(0x900 + gfn, gfn, vmpl=0x0F0F)
    guest.bench.set_vmsa(vmpl=1)
    with pytest.raises(Terminated):
        guest.go_on(msr=honest)
    assert guest.ended_with == (1, 7)
