"""Boots to an attested workload: what each shape costs, and that lazy acceptance validates less for the same report."""

from __future__ import annotations

from functools import cache
from hashlib import sha512
from itertools import product

import pytest

from snpbook.regimes.attested_boot import AttestedBoot, attest, attested_boot, table
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import Outcome
from tests.guest.booted import fresh
from tests.machines import private_bytes
from tests.sampling import ALL

SHAPES = list(product(["milan", "genoa"], [1, 16], [False, True]))
PAGES = 16 * 256
"""Of 16 MiB."""
EAGER = PAGES - 31 - 3
"""The launch validates 31 pages of RAM, three are shared. With an SVSM it is that who validates the 31."""
LAZY = EAGER - 6 * 512
"""Whole units without either: 2 to 8 and 10 to 16 MiB."""
REQUESTS = 24
"""VMGEXITs of a boot without SVSM: MSR protocol, ports of the clock, lists, whatever the way of acceptance."""


@cache
def boot(name: str, vcpus: int, acceptance: str, svsm: bool) -> AttestedBoot:
    return attested_boot(name, vcpus, acceptance, svsm=svsm)


@pytest.mark.parametrize(("name", "vcpus", "svsm"), SHAPES if ALL else [SHAPES[2], SHAPES[5]])
def test_both_ways_to_accept(name: str, vcpus: int, svsm: bool) -> None:
    eager, lazy = (boot(name, vcpus, how, svsm) for how in ("eager", "lazy"))
    for row in (eager, lazy):
        assert row.verdict.outcome is Outcome.ACCEPTED
        assert row.values == tuple(range(1, vcpus + 1)), "each vCPU ran, and left its value"
        assert row.boot.other == 1, "HLT at the end"
        assert (row.boot.requests == REQUESTS) != svsm
        assert row.boot.rmpupdates == row.boot.validated
    assert (eager.boot.validated, lazy.boot.validated) == (EAGER + 31 * svsm, LAZY + 31 * svsm)
    assert lazy.boot.exits < eager.boot.exits
    assert eager.work.validated == 0, "all of it was accepted before"
    assert lazy.work.validated == 512, "the unit in which the workload lies"
    assert lazy.work.requests > eager.work.requests
    assert eager.report_body == lazy.report_body
    assert eager.report_body[0x30] == 2 * svsm, "the VMPL"
    assert eager.report_body[0x140:0x180] == bytes(64)
    assert eager.report_body[0x2A0:] == bytes(0x200)


def test_what_the_vcpus_leave_is_in_private_memory_and_the_key_in_the_report() -> None:
    guest = fresh(memory="16 MiB", vcpus=3)
    public, report = attest(guest)
    for number in range(3):
        word = int.from_bytes(private_bytes(guest, 0x440000 + 0x1000 * number, 8), "little")
        assert word == (number + 1) << 48 | 0x440000 + 0x1000 * number
    assert report[0x50:0x90] == sha512(public).digest()
    assert len({vcpu.ghcb_registered for vcpu in guest.vmm.vcpus}) == 3, "each its own GHCB"
    assert guest.vmm.run(2) is Exit.HLT


def test_the_table_has_a_row_for_each_combination() -> None:
    rows = table(["genoa"], [1], ["lazy"], [False], memory="12 MiB")
    assert [(row.product, row.vcpus, row.acceptance, row.svsm) for row in rows] == [("genoa", 1, "lazy", False)]
