"""A VMM and a kernel that write where a guest's private page is."""

from __future__ import annotations

import pytest

from snpbook.regimes.host_writes import TEXT, Damage, by_kernel, by_vmm
from tests.host.regimes import CELLS


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_the_vmms_write(kind: str, backend: str) -> None:
    """Silent corruption of SEV, SIGBUS for series v6, a separate page with private files."""
    wanted = Damage.ELSEWHERE
    if backend == "registered":
        wanted = Damage.STOPPED if kind == "snp" else Damage.SILENT
    found = by_vmm(kind, backend)
    assert found.damage is wanted
    assert (found.read == TEXT) == (wanted is not Damage.SILENT)
    assert ("SIGBUS" in found.stopped) == (wanted is Damage.STOPPED)


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_the_kernels_write(kind: str, backend: str) -> None:
    """No back end takes pages out of the kernel's reach, only the RMP does."""
    found, log = by_kernel(kind, backend)
    assert found.damage is (Damage.STOPPED if kind == "snp" else Damage.SILENT)
    assert (found.read == TEXT) == (kind == "snp")
    assert any("unable to handle page fault" in line for line in log) == (kind == "snp")
    assert any("RMP entry" in line for line in log) == ((kind, backend) == ("snp", "guest_memfd")), "6.12 dumps it"
