"""One workload on each cell: what every back end allocates, pins, converts, doubles and gives back, and the ledger."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from snpbook.host.recount import Pages
from snpbook.regimes.workload import Plan, workload
from snpbook.spec.uapi_kvm_structs import ENC_REGION
from snpbook.trace import Event, FirmwareCommand, Ioctl, VmExit
from tests.host.regimes import CELLS, ENCRYPTED, FIRST, PAGE, PRIVATE_FILES, Regime, Watch

TOTAL = 4096 + 16
"""Pages of a guest of 16 MiB with an image of 64 KiB."""
LAUNCHED = {"plain": 0, "sev": 16, "sev-es": 16, "snp": 47}
"""Private pages of the sample image: the firmware, and for SNP the sections of its metadata."""
BOOTED = {"plain": 0, "sev": 4, "sev-es": 4, "snp": 990}
"""Private pages that a boot needs besides: page tables, or all that is no whole 2 MB."""
REGISTER, UNREGISTER = 0x8010AEBB, 0x8010AEBC
USED = {1: 15, 10: 153, 100: 1536}
"""Pages by per cent of 6 MiB."""
CONVERTED, BALLOONED = 76, 153


def steps(at: dict[str, Pages], what: str) -> list[Pages]:
    return [at[f"{what} {percent} %"] for percent in USED]


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_what_follows_what(kind: str, backend: str) -> None:
    """At every sample, and after every system call between them, the ledger is what memory holds."""
    regime = Regime(kind, backend)
    watch = Watch(regime)
    at = {sample.label: sample.pages for sample in workload(regime)}
    assert watch.calls > 20
    if backend == "registered":
        assert {pages.pinned for pages in at.values()} == {TOTAL}, "everything, from before the launch to the end"
        assert {pages.private for pages in at.values()} == {0}, "private pages are the VMM's"
        assert at["ballooned"].shared == TOTAL - BALLOONED, "what the VMM gives back stays pinned all the same"
        return
    base = LAUNCHED[kind] + BOOTED[kind]
    assert at["created"].private == (LAUNCHED[kind] if kind != "snp" else 0)
    assert at["launched"].private == LAUNCHED[kind]
    assert at["booted"].private == base
    converted, touched = ([p.private - base for p in steps(at, what)] for what in ("converted", "touched"))
    used = list(USED.values())
    assert touched == used
    assert converted == (used if backend == "restricted" else [0, *used[:-1]])
    assert at["to shared, 1"].private == base + used[-1] - CONVERTED, "what punching gives back"
    assert at["to private, 1"].private == base + used[-1] - CONVERTED * (backend != "restricted")
    assert at["touched again, 1"] == at["idle"] == at["touched 100 %"]
    assert at["ballooned"].private == base + used[-1] - BALLOONED
    held = {pages.pinned == (pages.private if backend != "null" else 0) for pages in at.values()}
    assert held == {True}, "pinned by being there"
    vmsa = [pages.assigned - pages.private for pages in at.values()]
    assert vmsa == ([0] + [1] * (len(at) - 1) if kind == "snp" else [-pages.private for pages in at.values()])


@pytest.mark.parametrize(("kind", "backend"), ENCRYPTED)
def test_what_is_pinned_before_anything_is_launched_and_after_it(kind: str, backend: str) -> None:
    regime = Regime(kind, backend)
    seen: list[int] = []
    updates: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, FirmwareCommand) and "LAUNCH_UPDATE" in event.name:
            updates.append(event.name)
        elif isinstance(event, Ioctl) and not updates:
            seen.append(regime.ledger.pages(regime.host.kvm.vms[-1]).pinned)

    regime.system.trace.subscribe(look)
    regime.guest = regime.start()
    regime.guest.launch()
    whole = backend == "registered"
    assert updates
    assert seen[-1] == (TOTAL if whole else 0)
    assert regime.sample("launched").pages.pinned == (TOTAL if whole else LAUNCHED[kind])


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_conversions_without_discard_keep_both_sides(kind: str, backend: str) -> None:
    """What `discard=none` costs: as many pages as were ever on both sides."""
    regime = Regime(kind, backend, discard=False)
    samples = list(workload(regime, Plan(touched=(50,), converted=20, rounds=3, ballooned=1)))
    at = {sample.label: sample.pages for sample in samples}
    more = {label: pages.doubled - at["touched 50 %"].doubled for label, pages in at.items()}
    both = 1536 * 20 // 100 if regime.cell.upm else 0
    assert [more[f"{what}, {turn}"] for turn in (1, 2, 3) for what in ("to shared", "to private")] == [both] * 6
    assert at["idle"].private == at["touched 50 %"].private, "no side gives anything back"


ASKED = {"plain": (1, 1, 1), "sev": (1, 1, 1), "sev-es": (3, 3, 3), "snp": (1, 1, 6)}
"""Exits with a request by the three conversions: a hypercall, with CPUID asked for twice where that is intercepted, or
lists of 253 pages."""


@pytest.mark.parametrize(("kind", "backend"), CELLS)
def test_the_guest_asks_for_its_conversions(kind: str, backend: str) -> None:
    """But a SEV guest on registered memory, which has nobody to ask; KVM or the VMM then does what it wants."""
    regime, seen = Regime(kind, backend), Counter[str]()

    def look(event: Event) -> None:
        if isinstance(event, Ioctl):
            seen[event.name] += 1
        elif isinstance(event, VmExit):
            seen[event.reason] += event.count

    regime.system.trace.subscribe(look)
    found: dict[str, tuple[int, int]] = {}
    for sample in workload(regime):
        found[sample.label] = seen["VMGEXIT"] + seen["VMMCALL"], seen["KVM_SET_MEMORY_ATTRIBUTES"]
        seen.clear()
    asks = regime.cell.upm or kind == "snp"
    conversions = [found[f"converted {percent} %"] for percent in USED]
    assert [exits for exits, _ in conversions] == [number * asks for number in ASKED[kind]]
    assert [calls for _, calls in conversions] == [regime.cell.upm] * 3
    assert found["to shared, 1"] == found["to private, 1"] == (ASKED[kind][0] * asks, regime.cell.upm)
    assert found["touched 1 %"] == found["idle"] == found["ballooned"] == (0, 0)


def test_a_guest_that_is_told_that_a_conversion_failed() -> None:
    """The hypercall answers with what the VMM says: there is no memory that could be private behind the end."""
    regime = Regime("plain", "guest_memfd")
    regime.guest.launch()
    regime.boot()
    with pytest.raises(RuntimeError, match="KVM_HC_MAP_GPA_RANGE for range"):
        regime.ask(range(1 << 20, (1 << 20) + 1), private=True)


def test_work_counts_what_was_done() -> None:
    """RMPUPDATEs of the series come with conversions, those of Linux with the first use, none in idleness."""
    done = {}
    for backend in ("restricted", "guest_memfd"):
        regime = Regime("snp", backend)
        samples = {sample.label: sample.work for sample in workload(regime)}
        names = list(samples)
        done[backend] = {
            label: samples[label].rmpupdates - samples[before].rmpupdates for before, label in pairwise(names)
        }
    assert [done["restricted"][f"{what} 1 %"] for what in ("converted", "touched")] == [15, 0]
    assert [done["guest_memfd"][f"{what} 1 %"] for what in ("converted", "touched")] == [0, 15]
    assert [found["to shared, 1"] for found in done.values()] == [CONVERTED] * 2
    assert [found["idle"] for found in done.values()] == [0] * 2


def test_bytes_of_a_launch() -> None:
    """16 pages of the image, 29 of zeros, secrets, CPUID, a VMSA; the content of the first and the last is hashed."""
    regime = Regime("snp", "guest_memfd")
    before = regime.ledger.work
    regime.guest.launch()
    after = regime.ledger.work
    assert after.encrypted - before.encrypted == 48 * PAGE
    assert after.hashed - before.hashed == 48 * 0x70 + 17 * PAGE
    assert after.copied - before.copied == 18 * PAGE, "pages of zeros have no source, the VMSA is KVM's own"


def test_caches_are_written_back_once_as_a_region_goes() -> None:
    regime = Regime("sev", "registered")
    vmm, before = regime.vmm, regime.ledger.work
    block = vmm.blocks[0]
    vmm.process.ioctl(vmm.vm_fd, UNREGISTER, ENC_REGION.pack(addr=block.address, size=block.size))
    after = regime.ledger.work
    assert (after.wbinvds - before.wbinvds, after.ioctls - before.ioctls) == (1, 1)


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_a_punched_hole_gives_its_pages_back(kind: str, backend: str) -> None:
    """Their RMP entries as well, and to everybody: frames can be claimed that were the guest's before."""
    regime = Regime(kind, backend)
    regime.guest.launch()
    page = range(FIRST, FIRST + 40)
    regime.convert(page, private=True)
    regime.touch(page)
    before, free, frames = regime.sample("touched").pages, regime.host.memory.free, regime.frames(page)
    regime.punch(page[10:30])
    after = regime.sample("punched").pages
    assert regime.host.memory.free == free + 20
    assert (before.private - after.private, before.pinned - after.pinned) == (20, 20)
    assert before.mapped - after.mapped == 20, "no way of the guest's leads to a frame that is free"
    assert before.assigned - after.assigned == (20 if kind == "snp" else 0)
    assert (regime.frames(page) == 0).tolist() == [10 <= number < 30 for number in range(40)]
    for frame in frames[10:30].tolist():
        regime.host.memory.claim(range(frame, frame + 1))
        regime.host.cpu.write(frame * PAGE, b"the host's")


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
def test_the_ledger_follows_registrations(kind: str) -> None:
    """A page that is registered twice is pinned once, until both are gone."""
    regime = Regime(kind, "registered")
    vmm = regime.vmm
    block = vmm.blocks[0]
    part, whole = (ENC_REGION.pack(addr=block.address, size=size) for size in (64 * PAGE, block.size))
    pinned = []
    for call, region in ((REGISTER, part), (UNREGISTER, whole), (UNREGISTER, part)):
        vmm.process.ioctl(vmm.vm_fd, call, region)
        pinned.append(regime.sample("registrations").pages.pinned)
    assert pinned == [TOTAL, 64 + 16, 16]


def test_registered_memory_has_no_hole_to_punch() -> None:
    with pytest.raises(ValueError, match="no private file is behind it"):
        Regime("sev", "registered").punch(range(FIRST, FIRST + 1))


@pytest.mark.parametrize(("given", "message"), [
    ({"touched": (10, 10)}, "shares that grow"),
    ({"touched": (0,)}, "shares that grow"),
    ({"touched": (1, 101)}, "shares that grow"),
    ({"touched": (5,), "converted": 6}, "1 to 5 per cent"),
    ({"converted": 0}, "1 to 100 per cent"),
    ({"touched": (5,), "ballooned": 6}, "1 to 5 per cent"),
    ({"rounds": -1}, "0 or more"),
])  # fmt: skip
def test_plans_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**given)
