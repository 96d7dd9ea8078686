"""The host's RMP #PF case by case: what the v7 series does for a user's address, and the kernel's own writes."""

from __future__ import annotations

import re

import pytest

from snpbook.hardware.host_instructions import NewState
from snpbook.host import page_fault
from snpbook.host.page_fault import Oops, Served, Sigbus, store_as_kernel
from snpbook.spec.process import Advice
from snpbook.system import System
from tests.host.regimes import MIB, PAGE

TEXT = b"what the guest wrote"


class User:
    """A process of the v7 series with 4 MiB of memory, the first half in small pages, the second in one huge page."""

    def __init__(self, era: str = "rfc-v7") -> None:
        self.system = System("milan", "faults", installed=64 * MIB)
        self.kernel = self.system.host
        self.kernel.boot(era)
        self.process = self.kernel.process()
        self.address = self.process.mmap(4 * MIB)
        self.process.store(self.address, bytes(2 * PAGE))
        self.process.madvise(self.address, 4 * MIB, Advice.HUGEPAGE)
        self.process.store(self.huge, bytes(PAGE))

    @property
    def huge(self) -> int:
        return self.address + 2 * MIB

    def frame(self, address: int) -> int:
        return int(self.process.space.frames(range(address // PAGE, address // PAGE + 1))[0])

    def assign(self, address: int) -> None:
        frame = self.frame(address)
        new = NewState(assigned=True, asid=3)
        assert not self.kernel.cpu.rmpupdate(range(frame, frame + 1), range(5, 6), new).any()

    def serve(self, address: int) -> Served:
        return page_fault.serve(self.process.space, address // PAGE)


def test_each_case_of_the_handler() -> None:
    user = User()
    assert user.serve(user.address + MIB) is Served.RETRY, "no page table entry"
    assert user.serve(user.address) is Served.RETRY, "a small page of the host's own"
    user.assign(user.address)
    assert user.serve(user.address) is Served.SIGBUS
    assert user.serve(user.huge) is Served.SPLIT_AND_RETRY
    assert user.serve(user.huge) is Served.RETRY, "split already"
    user.assign(user.huge)
    assert user.serve(user.huge) is Served.SIGBUS
    assert user.serve(0x1000) is Served.RETRY, "not mapped at all: the next try is a SIGSEGV"


def test_a_neighbour_in_a_large_mapping_splits_it_and_the_write_succeeds() -> None:
    user = User()
    pages = range(user.huge // PAGE, user.huge // PAGE + 512)
    user.assign(user.huge + 7 * PAGE)
    assert user.process.space.is_large(pages).all()
    user.process.store(user.huge + 100 * PAGE, TEXT)
    assert not user.process.space.is_large(pages).any()
    assert user.process.load(user.huge + 100 * PAGE, len(TEXT)) == TEXT
    with pytest.raises(Sigbus):
        user.process.store(user.huge + 7 * PAGE, TEXT)


@pytest.mark.parametrize(("era", "lines"), [
    ("rfc-v7", [r"BUG: unable to handle page fault", r"#PF: supervisor write", r"#PF: error_code\(0x0002\) - not"]),
    ("mainline", [
        r"BUG: unable to handle page fault", r"#PF: supervisor write", r"#PF: error_code\(0x80000003\) - RMP violation",
        r"SEV-SNP: PFN 0x[0-9a-f]+, RMP entry: \[0x[0-9a-f]{16} - 0x[0-9a-f]{16}\]",
    ]),
])  # fmt: skip
def test_the_kernels_own_write_is_an_oops(era: str, lines: list[str]) -> None:
    user = User(era)
    user.assign(user.address)
    spa = user.frame(user.address) * PAGE
    with pytest.raises(Oops):
        store_as_kernel(user.kernel, spa, TEXT)
    told = user.kernel.log.lines[-len(lines) :]
    assert all(re.match(pattern, line) for pattern, line in zip(lines, told, strict=True)), told
    store_as_kernel(user.kernel, spa + PAGE, TEXT)
    assert user.kernel.cpu.read(spa + PAGE, len(TEXT)) == TEXT
