"""What the host of an SVSM adds to mainline, row by row: one look from outside on each of the two."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.era_differences import DIFFERENCES
from tests.host.askers import CODE, INFO1, INFO2, RAX, Asker, ghcb, infos, snp
from tests.host.era_probes import OK, tried
from tests.host.race_world import host_of
from tests.host.sev_hosts import SNP
from tests.host.test_ap_creation import VMSA_GPA, save_area

Look = Callable[[str], Any]
CREATION, DOORBELL, RUN_VMPL = 0x80000013, 0x80000014, 0x80000018
RESTRICTED, ALTERNATE = 1 << 3, 1 << 4


@cache
def _two(era: str) -> Asker:
    return Asker(era, vcpus=2)


def _features(era: str) -> int:
    return snp(era).msr(0x080) >> 12


def _vmsa_features(era: str) -> list[int]:
    host, _ = host_of(era)
    return [tried(lambda f=f: host.vm(SNP).init2(features=f)) for f in (RESTRICTED, ALTERNATE)]  # type: ignore[misc]


def _run_vmpl(era: str) -> tuple[int, tuple[int, int]]:
    asker = snp(era)
    return asker.msr(0x016), infos(asker.event(RUN_VMPL, 0))


def _create(asker: Asker, vmpl: int) -> tuple[int, int]:
    fields = {CODE: CREATION, INFO1: 1 << 32 | vmpl << 16, INFO2: VMSA_GPA, RAX: 1}
    return infos(asker.page(ghcb(fields)))


def _ap_creation(era: str) -> tuple[int, int]:
    return _create(_two(era), 2)


def _save_areas(era: str) -> dict[int, bool]:
    """Which VMPLs wait for a save area once each has been asked for, at INIT."""
    asker = _two(era)
    asker.vmm.vcpus[1].queued.clear()

    async def program(cpu: GuestCpu) -> None:
        await save_area(cpu, vmpl=2)

    asker.drive(program)
    for vmpl in (2, 3):
        _create(asker, vmpl)
    return {vmpl: wanted.on_init for vmpl, wanted in asker.vmm.vcpus[1].queued.items()}


def _doorbell(era: str) -> tuple[int, int]:
    return infos(snp(era).event(DOORBELL, 1, 0x9000))


PROBES: dict[str, tuple[Look, Any, Any]] = {
    "hypervisor_features": (_features, 0x3, 0x27),
    "vmsa_features": (_vmsa_features, [errno.EINVAL] * 2, [OK] * 2),
    "run_vmpl": (_run_vmpl, (0x016, (2, 6)), (0x017, (0, 0))),
    "ap_creation_vmpl": (_ap_creation, (2, 5), (0, 0)),
    "vmsa_per_vmpl": (_save_areas, {}, {2: True, 3: True}),
    "hv_doorbell": (_doorbell, (2, 6), (0, 0x9000)),
}
"""The look, and what mainline and svsm-host show."""


@pytest.mark.parametrize("name", list(PROBES))
def test_probe(name: str) -> None:
    look, mainline, svsm = PROBES[name]
    assert look("mainline") == mainline
    assert look("svsm-host") == svsm


def test_every_row_has_one() -> None:
    assert sorted(PROBES) == sorted(
        row.name for row in DIFFERENCES if row.values["svsm-host"] != row.values["mainline"]
    )
