"""What cannot be done with private memory: each refusal with its errno and its reason, and a world that stays whole."""

from __future__ import annotations

import errno
import struct
from typing import Any

import numpy as np
import pytest

from snpbook.host.memory import runs
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.exits import convert
from snpbook.host.vmm.launch import set_attributes
from snpbook.host.vmm.memory import RamBlock
from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_sev import CMD, SevOp
from tests.host.regimes import CELLS, FIRST, MIB, PAGE, PRIVATE_FILES, Regime, Watch
from tests.host.sev_hosts import Host
from tests.sampling import sampled

REGISTER, SET_REGION, SEV, ATTRIBUTES_V10, ATTRIBUTES = 0x8010AEBB, 0x4020AE46, 0xC008AEBA, 0xC020AED3, 0x4020AED2
PRIVATE = 8
POISONED = 133
SERIES = [("snp", "restricted"), ("snp", "guest_memfd")]


def fails(number: int, match: str = "") -> Any:
    name = "EHWPOISON" if number == POISONED else errno.errorcode[number]
    return pytest.raises(KernelError, match=f"^{name}.*{match}")


# Registration.


def test_registration_beyond_the_limit() -> None:
    regime = Regime("sev", "registered", memory=12 * MIB)
    process, fd = regime.vmm.process, regime.vmm.vm_fd
    process.capabilities = frozenset()
    address = process.mmap(2 * PAGE)
    process.memlock = process.locked + PAGE
    pinned = regime.host.memory.pinned
    with fails(errno.ENOMEM, "RLIMIT_MEMLOCK, or CAP_IPC_LOCK"):
        process.ioctl(fd, REGISTER, struct.pack("<QQ", address, 2 * PAGE))
    assert regime.host.memory.pinned == pinned
    process.ioctl(fd, REGISTER, struct.pack("<QQ", address, PAGE))
    assert regime.host.memory.pinned == pinned + 1


@pytest.mark.parametrize(("backend", "pages"), [("registered", 1), ("restricted", 0), ("guest_memfd", 0)])
def test_only_registration_counts_against_the_limit(backend: str, pages: int) -> None:
    regime = Regime("snp", backend, memory=12 * MIB)
    assert regime.vmm.process.locked == (12 * MIB + 16 * PAGE) * pages


# Faults.


@pytest.mark.parametrize(("kind", "backend"), SERIES)
def test_a_private_fault_on_a_slot_without_backing(kind: str, backend: str) -> None:
    """KVM tells the VMM, which has nothing to convert there either."""
    regime = Regime(kind, backend)
    regime.guest.launch()
    vmm, gpa = regime.vmm, 64 * MIB
    address = vmm.process.mmap(MIB)
    vmm.process.ioctl(vmm.vm_fd, SET_REGION, struct.pack("<IIQQQ", 9, 0, gpa, MIB, address))
    vmm.blocks.append(RamBlock(9, gpa, MIB, address))
    with fails(errno.EINVAL, "memory that can be private"):
        regime.read(gpa // PAGE)
    set_attributes(vmm, gpa, PAGE, private=True)
    with fails(errno.EINVAL, "memory that can be private"):
        vmm.run()
    assert regime.sample("afterwards").pages.private == 47


def test_a_memory_error() -> None:
    """The guest cannot have the page, nor can anybody else; its neighbours are well, and a punch makes room."""
    regime = Regime("snp", "guest_memfd")
    regime.guest.launch()
    pages = range(FIRST, FIRST + 4)
    regime.convert(pages, private=True)
    regime.touch(pages, b"well")
    lost, free = regime.frames(pages[1:2]), regime.host.memory.free
    regime.memory_error(pages[1:2])
    assert [regime.read(gfn, 4) for gfn in (FIRST, FIRST + 2)] == [b"well"] * 2
    with fails(POISONED, "the page is healthy"):
        regime.pvalidate(FIRST + 1)
    regime.sample("poisoned")
    regime.punch(pages[1:2])
    assert regime.vmm.run() is Exit.HLT, "the guest validates another page"
    assert regime.frames(pages[1:2]) != lost
    assert regime.host.memory.free == free - 1, "one frame less in the world"
    regime.sample("another page")


def test_a_memory_error_that_is_not_modelled() -> None:
    regime = Regime("sev", "lazy")
    with pytest.raises(ValueError, match="lazy memory: what becomes of a page with a memory error"):
        regime.memory_error(range(FIRST, FIRST + 1))


# Attributes and holes.


@pytest.mark.parametrize(("kind", "backend"), SERIES)
@pytest.mark.parametrize(("address", "size"), [
    (FIRST * PAGE + 1, PAGE), (FIRST * PAGE, PAGE + 1), (FIRST * PAGE, 0), (FIRST * PAGE + 512, 3584),
    ((1 << 64) - PAGE, 2 * PAGE),
])  # fmt: skip
def test_attributes_of_an_unaligned_range(kind: str, backend: str, address: int, size: int) -> None:
    regime = Regime(kind, backend, memory=12 * MIB)
    vmm, number = regime.vmm, ATTRIBUTES_V10 if backend == "restricted" else ATTRIBUTES
    before = regime.sample("before").pages
    with fails(errno.EINVAL, "address and size are whole pages"):
        vmm.process.ioctl(vmm.vm_fd, number, bytearray(struct.pack("<QQQQ", address, size, PRIVATE, 0)))
    assert not regime.vm.is_private(range(FIRST, FIRST + 2)).any()
    assert regime.sample("after").pages == before


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, PAGE - 1), (0, 0)])
def test_the_vmm_converts_whole_pages(offset: int, size: int) -> None:
    regime = Regime("snp", "guest_memfd", memory=12 * MIB)
    with fails(errno.EINVAL, "a conversion of whole pages"):
        convert(regime.vmm, FIRST * PAGE + offset, size, private=True)


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_a_launched_page_that_is_punched_is_gone(kind: str, backend: str) -> None:
    """It was measured, and the guest does not get it: what comes in its place is not validated, or noise.

    The series assigns pages with the attribute alone, so that the guest faults for ever.
    """
    regime = Regime(kind, backend)
    regime.guest.launch()
    first = regime.vmm.image.gpa // PAGE
    before, original = regime.sample("launched").pages, regime.read(first, 64)
    assert original == regime.vmm.image.data[:64]
    (frame,) = regime.frames(range(first, first + 1)).tolist()
    regime.punch(range(first, first + 1))
    regime.host.memory.claim(range(frame, frame + 1))
    after = regime.sample("punched").pages
    assert after.private == before.private - 1
    assert after.assigned == before.assigned - (kind == "snp")
    if kind == "snp":
        with pytest.raises((RuntimeError, KernelError), match="ELOOP" if backend == "restricted" else "SHUTDOWN"):
            regime.read(first)
    else:
        assert regime.read(first, 64) != original


# Launches that somebody cuts into.


class HalfLaunched:
    """SNP_LAUNCH_UPDATE of the image's first eight pages, stopped between two of them."""

    def __init__(self, backend: str) -> None:
        self.regime = regime = Regime("snp", backend)
        regime.host.step_pages = 4
        vmm, era = regime.vmm, regime.host.era
        self.first, image = vmm.image.gpa // PAGE, vmm.image
        vmm.write(image.gpa, image.data[: 8 * PAGE])
        fields: dict[str, Any] = {"uaddr": vmm.user(image.gpa), "len": 8 * PAGE}
        if backend == "guest_memfd":
            convert(vmm, image.gpa, 8 * PAGE, private=True)
            fields |= {"gfn_start": self.first, "type": 1}
        else:
            fields |= {"page_type": 1}
        self.address = vmm.process.mmap(PAGE)
        vmm.process.store(self.address, era.payloads[SevOp.SNP_LAUNCH_UPDATE].pack(**fields))
        command = CMD.pack(id=era.op_id(SevOp.SNP_LAUNCH_UPDATE), data=self.address, sev_fd=vmm.sev_fd)
        self.launch = vmm.process.calling(vmm.vm_fd, SEV, bytearray(command))
        updates = 0
        while updates < 2:
            updates += next(self.launch).name == "launch update: pages"

    def finish(self) -> None:
        for _ in self.launch:
            assert True, "the launch goes on"

    def share(self, gfn: int) -> Any:
        """KVM_SET_MEMORY_ATTRIBUTES of one page, in steps."""
        number = ATTRIBUTES_V10 if self.regime.cell.backend == "restricted" else ATTRIBUTES
        request = bytearray(struct.pack("<QQQQ", gfn * PAGE, PAGE, 0, 0))
        return self.regime.vmm.process.calling(self.regime.vmm.vm_fd, number, request)


@pytest.mark.parametrize("backend", ["restricted", "guest_memfd"])
def test_a_conversion_during_a_launch_waits_for_it(backend: str) -> None:
    """Both hold the lock of the slots; then the conversion has the last word."""
    half = HalfLaunched(backend)
    conversion = half.share(half.first + 1)
    assert next(conversion).blocked
    assert next(conversion).blocked
    half.finish()
    pages = half.regime.sample("launched").pages
    assert (pages.private, pages.assigned) == (8, 8)
    for _ in conversion:
        assert True, "it goes on"
    assert not half.regime.vm.is_private(range(half.first + 1, half.first + 2)).any()
    after = half.regime.sample("converted").pages
    assert (after.private, after.assigned) == (8, 8 if backend == "guest_memfd" else 7)


def test_a_page_that_is_shared_by_then_ends_the_call_there() -> None:
    """Without the lock: EINVAL for that page, those before it stay, and it keeps its memory."""
    half = HalfLaunched("guest_memfd")
    half.regime.vm.private.mark(range(half.first + 6, half.first + 7), False)
    half.finish()
    layout = half.regime.host.era.payloads[SevOp.SNP_LAUNCH_UPDATE]
    answer = layout.unpack(half.regime.vmm.process.load(half.address, layout.size))
    assert (answer.gfn_start, answer.len) == (half.first + 6, 2 * PAGE)
    pages = half.regime.sample("half").pages
    assert (pages.assigned, pages.private) == (6, 7), "the page that failed keeps its memory"


# Launches that the firmware refuses.


@pytest.mark.parametrize(("kind", "backend"), [each for each in PRIVATE_FILES if each[0] == "snp"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("after", [0, 17])
def test_the_ledger_of_a_launch_that_fails(
    kind: str, backend: str, kept: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that the firmware was given are reclaimed, or leak where it keeps them: SNP_PAGE_RECLAIM tells the ledger.

    The next guest has the same ASID, or another one where pages still carry that.
    """
    regime = Regime(kind, backend)
    regime.vmm.close()
    watch = Watch(regime)
    regime.guest = regime.start()
    with monkeypatch.context() as patch:
        Host.spoil(regime, patch, Command.SNP_LAUNCH_UPDATE, Status.INVALID_PAGE_STATE, after=after)
        if kept:
            Host.spoil(regime, patch, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE)
        with fails(errno.EIO, "VM is alive|INVALID_PAGE_STATE"):
            regime.guest.launch()
    assert watch.calls > 10
    assert not regime.host.kvm.vms
    assert bool(regime.host.ccp.leaks.count) == kept
    regime.guest = regime.start()
    assert regime.sample("next").pages.assigned == 0
    regime.guest.launch()
    assert regime.sample("launched").pages.assigned == 48


# Out of memory.

BUDGETS = [*range(60), *range(60, 1400, 61)]
"""Pages that are free as a guest begins."""


CASES = [(*each, free) for each in CELLS for free in BUDGETS]


@pytest.mark.parametrize(("kind", "backend", "free"), sampled(CASES, 24))
def test_out_of_memory_at_any_step(kind: str, backend: str, free: int) -> None:
    """Whatever comes to an end: it says so, ledger and recount agree, and all that was taken is free afterwards."""
    regime = starved(kind, backend)
    memory, gfns = regime.host.memory, range(FIRST, FIRST + 200)
    before = memory.allocated
    held = memory.take(memory.free - free)
    process, reason = None, "free host memory"
    try:
        regime.guest = regime.start()
        process = regime.vmm.process
        regime.guest.launch()
        regime.boot()
        regime.convert(gfns, private=True)
        regime.touch(gfns)
        regime.convert(gfns[:50], private=False)
        regime.vmm.write(FIRST * PAGE, bytes(50 * PAGE))
        regime.convert(gfns[:50], private=True)
        regime.touch(gfns[:50])
    except KernelError as error:
        reason = str(error)
    assert "free host memory" in reason or "every page can be pinned" in reason
    if process is not None:
        if regime.host.kvm.vms:  # what fails in a launch ends the process
            regime.sample("out of memory")
        process.exit()
    for _, pages in runs(np.sort(held)):
        memory.release(pages)
    assert memory.allocated == before
    states = regime.system.machine.rmp.states
    assert all(states(pages).max() <= 2 for pages in memory.holes(range(memory.end))), "the hypervisor's"


_STARVED: dict[tuple[str, str], Regime] = {}


def starved(kind: str, backend: str) -> Regime:
    """A host of a cell on which no guest runs, one for all amounts of memory."""
    if (kind, backend) not in _STARVED:
        regime = _STARVED[kind, backend] = Regime(kind, backend, installed=64 * MIB)
        regime.vmm.close()
    return _STARVED[kind, backend]


def test_the_series_says_why_a_fault_is_never_served() -> None:
    """It does not tell the VMM, so that the guest would fault for ever."""
    regime = Regime("snp", "restricted")
    regime.guest.launch()
    regime.convert(range(FIRST, FIRST + 1), private=True)
    regime.host.memory.take(regime.host.memory.free)
    regime.convert(range(FIRST + 1, FIRST + 2), private=True)
    assert "kvm: no memory for private pages" in regime.host.log.lines[-1]
    with fails(errno.ELOOP, "ENOMEM: free host memory"):
        regime.touch(range(FIRST + 1, FIRST + 2))
