"""Many guests on one large host: nothing is lost, and the process stays small."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from snpbook.tools.bench.digest import OVMF
from snpbook.tools.bench.guests import TOUCHED, Fleet
from snpbook.tools.bench.measure import resident
from tests.host import invariants
from tests.sampling import ALL

GUESTS, ROUNDS = (64, 10) if ALL else (8, 2)
MEGABYTES, GROWTH = 400, 1.05


def rounds() -> list[float]:
    """Rounds of guests from start to stop: what the process holds at the height of each."""
    fleet, heights = Fleet(), []
    kernel = fleet.system.host
    held, free = invariants.held(kernel), kernel.memory.free
    for _ in range(ROUNDS):
        with fleet.guests(GUESTS) as running:
            assert len({vmm.vm.asid for vmm in running}) == GUESTS
            accepted = fleet.system.machine.rmp
            for vmm in running:
                slot = vmm.vm.slots.of(0x2000)
                frames = slot.private.pages.peek(range(0x2000, 0x2000 + TOUCHED))
                assert (accepted.peek(frames)[:, 0] >> 62 & 1).all(), "every page is validated"
            gc.collect()
            heights.append(resident())
        invariants.check_asids(kernel)
        assert (invariants.held(kernel), kernel.memory.free) == (held, free)
        assert not kernel.kvm.vms
        assert kernel.ccp.leaks.count == 0
        assert fleet.system.processor.guest_count == 0
    return heights


@pytest.mark.skipif(not Path(OVMF).is_file(), reason="Debian's package ovmf is not installed")
def test_guests_come_and_go() -> None:
    """64 guests of 256 MiB on 1 TiB, ten rounds; the sample has two rounds of eight."""
    code = f"import json; from {__name__} import rounds; print(json.dumps(rounds()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heights = json.loads(done.stdout)
    assert len(heights) == ROUNDS
    assert max(heights) <= MEGABYTES
    assert heights[-1] <= heights[1] * GROWTH
