"""The regimes of private memory side by side: what each allocates, pins, converts and gives back, and the ledger."""

from __future__ import annotations

import errno
import re
from typing import Any

import pytest

from snpbook.hardware.guest_cpu import ProgramFailure
from snpbook.host.huge_pages import HugeAnonymousMemory
from snpbook.host.page_fault import Sigbus
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.exits import convert
from snpbook.spec.private_memory import CELLS, HOOKS, KINDS, Backend, NoSuchCell, cell
from snpbook.spec.uapi_sev import CMD, SevOp
from tests.host.regimes import ENCRYPTED, FIRST, MIB, PAGE, Regime, fit

LAUNCHED = {"sev": 16, "sev-es": 16, "snp": 47}
"""Private pages of the sample image: the firmware, and for SNP the sections of its metadata."""
FIT = {
    ("sev", "registered"): 2, ("snp", "registered"): 2, ("sev", "lazy"): 12, ("snp", "restricted"): 11,
    ("snp", "guest_memfd"): 12,
}  # fmt: skip
"""Guests of 12 MiB in the 30 MiB that a host of 64 MiB has free. The series copies more of the launched pages."""
PRIVATE_FILES = [each for each in ENCRYPTED if each[1] != "registered"]


@pytest.mark.parametrize(("kind", "backend"), ENCRYPTED)
def test_one_workload_on_each_cell(kind: str, backend: str) -> None:
    """At every sample the ledger is what memory holds (`Regime.sample` compares); the series' claims are asserted."""
    regime = Regime(kind, backend)
    at = {sample.label: sample.pages for sample in regime.run()}
    total = (regime.memory >> 12) + 16
    steps = [at[f"{what} {percent} %"] for percent in (1, 10, 100) for what in ("converted", "touched")]
    if backend == "registered":
        assert {pages.pinned for pages in at.values()} == {total}, "everything, from before the launch to the end"
        assert {pages.private for pages in at.values()} == {0}, "private pages are the VMM's"
        assert at["ballooned"].shared == total - 128, "what the VMM gives back stays pinned all the same"
        return
    assert at["created"].pinned == (LAUNCHED[kind] if kind != "snp" else 0)
    assert at["launched"].pinned == at["launched"].private == LAUNCHED[kind]
    grown = [pages.pinned - LAUNCHED[kind] for pages in steps]
    count = [12, 128, 1280]
    if backend == "restricted":
        assert grown == [n for n in count for _ in range(2)], "with the conversion"
    else:
        assert grown == [0, 12, 12, 128, 128, 1280], "with the first touch"
    assert at["converted to shared"].private == at["touched 100 %"].private - 64, "what punching gives back"
    back = 64 if backend == "restricted" else 0
    assert at["converted back"].private == at["converted to shared"].private + back
    assert at["converted back"] == at["idle"]
    assert at["ballooned"].private == at["idle"].private - 128
    if kind == "snp":
        assert all(pages.assigned == pages.private + (n > 0) for n, pages in enumerate(at.values())), "and the VMSA"


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_without_discard_memory_is_doubled(kind: str, backend: str) -> None:
    regime = Regime(kind, backend, discard=False)
    regime.guest.launch()
    gfns = range(FIRST, FIRST + 100)
    regime.convert(gfns, private=True)
    regime.touch(gfns)
    before = regime.sample("private").pages
    regime.convert(gfns, private=False)
    regime.guest.vmm.write(FIRST * PAGE, bytes(100 * PAGE))
    pages = regime.sample("both").pages
    assert (pages.private, pages.doubled) == (before.private, before.doubled + 100)


def test_how_many_guests_fit() -> None:
    """512 pages in use, of 12 MiB each: whoever pins all of it cannot overcommit, the others can."""
    found = {each: fit(*each, touched=512) for each in ENCRYPTED if each[0] != "sev-es"}
    assert found == FIT


# Large pages.


def test_large_entries_and_how_they_are_split() -> None:
    regime = Regime("snp", "restricted", huge=True)
    at = {sample.label: sample for sample in regime.run()}
    assert at["converted 100 %"].pages.large == 1, "0xc00 alone was converted as a whole"
    assert at["touched 100 %"].pages.large == 0, "a PVALIDATE of 4 KB splits them"
    assert at["idle"].work.psmashes >= 1


def test_a_part_of_a_large_page_made_shared_splits_it() -> None:
    regime = Regime("snp", "restricted", huge=True, discard=False)
    regime.guest.launch()
    regime.convert(range(0xA00, 0xC00), private=True)
    before = regime.sample("large")
    assert before.pages.large == 1
    regime.convert(range(0xA10, 0xA11), private=False)
    after = regime.sample("split")
    assert (after.pages.large, after.work.psmashes - before.work.psmashes) == (0, 1)
    assert after.pages.assigned == before.pages.assigned - 1
    regime.convert(range(0xA00, 0xC00), private=False)
    assert regime.sample("shared").pages.assigned == before.pages.assigned - 512


def test_without_free_runs_there_are_small_pages() -> None:
    regime = Regime("snp", "restricted", huge=True)
    regime.guest.launch()
    memory = regime.host.memory
    while memory.allocate_order9():
        pass
    regime.convert(range(0xA00, 0xA40), private=True)
    assert regime.sample("small").pages.large == 0


# Content.


def scenario(kind: str, backend: str, *, discard: bool) -> tuple[Regime, bytes]:
    """A secret in a private page that was shared in between, before the guest touches it again."""
    regime = Regime(kind, backend, discard=discard)
    regime.guest.launch()
    page = range(FIRST, FIRST + 1)
    regime.convert(page, private=True)
    regime.touch(page, b"a secret")
    regime.convert(page, private=False)
    if regime.cell.upm or kind == "snp":
        regime.guest.vmm.write(FIRST * PAGE, b"public!!")
    regime.convert(page, private=True)
    return regime, b"a secret"


def test_guest_memfd_kept_gives_the_old_page_back_and_pvalidate_no_change() -> None:
    regime, secret = scenario("snp", "guest_memfd", discard=False)
    assert regime.pvalidate(FIRST) == (0, True)
    assert regime.read(FIRST) == secret


def test_guest_memfd_punched_gives_a_zeroed_page_that_must_be_accepted() -> None:
    regime, secret = scenario("snp", "guest_memfd", discard=True)
    assert regime.pvalidate(FIRST) == (0, False)
    assert regime.read(FIRST) != secret
    slot = regime.vm.slots.of(FIRST)
    frame = int(slot.private.pages.peek(slot.offsets(range(FIRST, FIRST + 1)))[0])
    assert regime.system.machine.dram.read(frame << 12, PAGE) == bytes(PAGE), "the host's zeros: not the guest's"


def test_restricted_kept_loses_validation_and_no_content() -> None:
    """The RMP entry is made anew, the ciphertext is not."""
    regime, secret = scenario("snp", "restricted", discard=False)
    with pytest.raises(RuntimeError, match="SHUTDOWN"):
        regime.read(FIRST)
    regime, secret = scenario("snp", "restricted", discard=False)
    assert regime.pvalidate(FIRST) == (0, False)
    assert regime.read(FIRST) == secret


@pytest.mark.parametrize(("kind", "backend", "zeroed"), [
    ("sev", "lazy", False), ("snp", "restricted", False), ("snp", "guest_memfd", True),
])  # fmt: skip
def test_which_new_pages_are_zeroed(kind: str, backend: str, zeroed: bool) -> None:
    """What somebody left in the frame that is given out next is there for the guest, encrypted with no key."""
    regime = Regime(kind, backend)
    regime.guest.launch()
    memory, dram = regime.host.memory, regime.system.machine.dram
    for pages in memory.holes(range(memory.end))[:20]:
        for frame in pages[:4]:
            dram.write(frame << 12, b"left over")
    page = range(FIRST, FIRST + 1)
    regime.convert(page, private=True)
    if kind == "snp":
        assert regime.pvalidate(FIRST) == (0, False)
    regime.read(FIRST)
    slot = regime.vm.slots.of(FIRST)
    frame = int(slot.private.pages.peek(slot.offsets(page))[0])
    assert dram.read(frame << 12, 9) == (bytes(9) if zeroed else b"left over")


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_a_punched_page_is_not_the_guests_any_more(kind: str, backend: str) -> None:
    regime, secret = scenario(kind, backend, discard=True)
    if kind == "snp":
        assert regime.pvalidate(FIRST) == (0, False), "it must be accepted again"
    assert regime.read(FIRST) not in (secret, b"public!!")


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
def test_lazy_kept_has_the_old_page(kind: str) -> None:
    regime, secret = scenario(kind, "lazy", discard=False)
    assert regime.read(FIRST) == secret


def test_in_place_there_is_one_page_alone() -> None:
    regime, secret = scenario("snp", "registered", discard=False)
    assert regime.pvalidate(FIRST) == (0, False)
    assert regime.read(FIRST) not in (secret, b"public!!"), "the VMM's bytes, decrypted"


# What cannot be.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", list(Backend))
def test_a_cell_that_never_existed_is_refused_by_name(kind: str, backend: Backend) -> None:
    if (kind, backend) in CELLS:
        assert cell(kind, backend).backend is backend
    else:
        with pytest.raises(NoSuchCell, match=re.escape(f"a {kind} guest has no {backend} memory: ")):
            cell(kind, backend)


def test_unknown_names() -> None:
    with pytest.raises(NoSuchCell, match="no kind of guest 'tdx'"):
        cell("tdx", "lazy")
    with pytest.raises(NoSuchCell, match="no back end 'pinned'"):
        cell("snp", "pinned")


def test_every_hook_says_what_each_needs_and_what_became_of_it() -> None:
    assert [hook.name for hook in HOOKS] == [
        "private_mem_enabled", "fault_is_private", "update_mem_attr", "invalidate_restricted_mem",
        "rmp_page_level_adjust",
    ]  # fmt: skip
    assert all(getattr(hook, name) for hook in HOOKS for name in hook.__slots__)


def fails(number: int) -> Any:
    return pytest.raises(KernelError, match=f"^{errno.errorcode[number]}")


def test_registration_beyond_the_limit() -> None:
    regime = Regime("sev", "registered", memory=12 * MIB)
    vmm = regime.guest.vmm
    vmm.process.capabilities = frozenset()
    vmm.process.memlock = vmm.process.locked
    address = vmm.process.mmap(PAGE)
    with fails(errno.ENOMEM):
        vmm.process.ioctl(vmm.vm_fd, 0x8010AEBB, address.to_bytes(8, "little") + PAGE.to_bytes(8, "little"))


def test_a_launched_page_that_is_punched_is_gone() -> None:
    regime = Regime("snp", "guest_memfd")
    regime.guest.launch()
    section = next(s for s in regime.guest.vmm.image.sections if s.size >= PAGE)
    block = regime.guest.vmm.block_of(section.gpa)
    before = regime.sample("launched").pages
    regime.guest.vmm.process.fallocate(block.private_fd, 3, section.gpa - block.gpa, PAGE)
    after = regime.sample("punched").pages
    assert (after.private, after.assigned) == (before.private - 1, before.assigned - 1)


@pytest.mark.parametrize(("kind", "backend"), PRIVATE_FILES)
def test_out_of_memory_while_the_guest_runs(kind: str, backend: str) -> None:
    regime = Regime(kind, backend)
    regime.guest.launch()
    memory = regime.host.memory
    gfns = range(FIRST, FIRST + 100)
    regime.convert(gfns[:50], private=True)
    memory.take(memory.free)
    regime.convert(gfns[50:], private=True)
    with pytest.raises((KernelError, RuntimeError, ProgramFailure)) as caught:
        regime.touch(gfns)
    assert "ENOMEM" in str(caught.value) or "ELOOP" in str(caught.value)
    regime.sample("out of memory")


# A guest that boots by itself.


@pytest.mark.parametrize(("backend", "huge", "exits"), [
    ("registered", False, (4000, 4200)), ("restricted", False, (4000, 4200)), ("restricted", True, (900, 1100)),
    ("guest_memfd", False, (4000, 4200)),
])  # fmt: skip
def test_an_snp_guest_accepts_all_of_its_memory(backend: str, huge: bool, exits: tuple[int, int]) -> None:
    """Through its own page state changes; a 2 MB entry saves it 511 faults."""
    regime = Regime("snp", backend, huge=huge)
    regime.guest.launch()
    assert regime.guest.boot() > 15 * MIB
    sample = regime.sample("booted")
    assert sample.pages.assigned == (regime.memory >> 12) + 16 - 3 + 1, "all but the three shared pages, and the VMSA"
    assert sample.pages.large == 6 * huge
    assert exits[0] < sample.work.exits < exits[1]


def test_in_place_an_access_on_the_other_side_converts_the_page() -> None:
    """Series v6 took an RMP fault for an implicit conversion (unconfirmed)."""
    regime = Regime("snp", "registered")
    regime.guest.launch()
    before = regime.sample("launched").pages.assigned
    regime.touch(range(FIRST, FIRST + 1), b"private")
    assert regime.read(FIRST, 7) == b"private"
    assert regime.sample("touched").pages.assigned == before + 1


def test_in_place_with_huge_pages_of_the_vmm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a huge one made private: its neighbours are in the way of the VMM until the mapping is split."""
    monkeypatch.setattr(HugeAnonymousMemory, "huge", True)
    regime = Regime("snp", "registered")
    regime.guest.launch()
    vmm = regime.guest.vmm
    user = vmm.user(FIRST * PAGE) // PAGE
    regime.convert(range(FIRST, FIRST + 512), private=True)
    assert regime.sample("large").pages.large == 1
    regime.touch(range(FIRST, FIRST + 2), b"private")
    assert regime.sample("smashed").pages.large == 0
    regime.convert(range(FIRST + 8, FIRST + 16), private=False)
    assert vmm.process.space.is_large(range(user, user + 512)).all()
    vmm.write((FIRST + 8) * PAGE, b"shared")
    assert not vmm.process.space.is_large(range(user, user + 512)).any()
    with pytest.raises(Sigbus):
        vmm.write(FIRST * PAGE, b"oops")
    assert regime.read(FIRST, 7) == b"private"


def test_memory_that_is_not_registered_is_not_launched_nor_converted() -> None:
    regime = Regime("snp", "registered")
    vmm = regime.guest.vmm
    for block in vmm.blocks:
        region = block.address.to_bytes(8, "little") + block.size.to_bytes(8, "little")
        vmm.process.ioctl(vmm.vm_fd, 0x8010AEBC, region)
    with fails(errno.EINVAL):
        regime.convert(range(FIRST, FIRST + 1), private=True)
    with fails(errno.EINVAL):
        regime.guest.launch()


def test_letting_a_region_go_gives_its_pages_back_first() -> None:
    regime = Regime("snp", "registered")
    regime.guest.launch()
    regime.convert(range(FIRST, FIRST + 100), private=True)
    regime.guest.vmm.close()
    assert regime.host.memory.pinned == 0
    free = regime.host.memory.holes(range(regime.host.memory.end))
    assert all(regime.system.machine.rmp.states(pages).max() <= 2 for pages in free), "hypervisor pages"


def test_a_conversion_during_the_launch_is_not_the_launchs_business() -> None:
    """Between two pages of SNP_LAUNCH_UPDATE a page of it becomes shared: EINVAL for that page, the others stay."""
    regime = Regime("snp", "guest_memfd")
    regime.host.step_pages = 4
    vmm = regime.guest.vmm
    image = vmm.image
    convert(vmm, image.gpa, 8 * PAGE, private=True)
    vmm.write(image.gpa, image.data[: 8 * PAGE])
    payload = vmm.kernel.era.payloads[SevOp.SNP_LAUNCH_UPDATE].pack(
        gfn_start=image.gpa >> 12, uaddr=vmm.user(image.gpa), len=8 * PAGE, type=1
    )
    with vmm.scratch.placed(payload) as address:
        command = bytearray(CMD.pack(id=101, data=address, sev_fd=vmm.sev_fd))
        steps = vmm.process.calling(vmm.vm_fd, 0xC008AEBA, command)
        updates = 0
        for step in steps:
            updates += step.name == "launch update: pages"
            if updates == 2:
                regime.vm.private.mark(range((image.gpa >> 12) + 6, (image.gpa >> 12) + 7), False)
        answer = vmm.kernel.era.payloads[SevOp.SNP_LAUNCH_UPDATE].unpack(vmm.process.load(address, len(payload)))
    assert (answer.gfn_start, answer.len) == ((image.gpa >> 12) + 6, 2 * PAGE)
    pages = regime.sample("half").pages
    assert (pages.assigned, pages.private) == (6, 7), "the page that failed keeps its memory"
