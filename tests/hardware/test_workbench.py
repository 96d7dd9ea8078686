import pytest

from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.workbench import PLAY, SHARED_WINDOW, Workbench
from snpbook.spec.pages import PageState, VmplPermission

P = PLAY.start


def ready(name: str = "milan") -> Workbench:
    """Guest 1 with two pages of 4 KB and one of 2 MB, validated."""
    bench = Workbench(name)
    guest = bench.guest(1)
    for page, gfn, large in ((P, 0x10, False), (P + 1, 0x11, False), (P + 512, 0x200, True)):
        guest.map(gfn, range(page, page + 1), large=large)
        new = NewState(assigned=True, asid=1, large=large)
        assert not bench.host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), new).any()
        assert guest.pvalidate(gfn, large=large).codes == ("SUCCESS",)
    return bench


def reads(core: GuestCore, address: int) -> bool:
    return isinstance(core.read(address, 4), bytes)


@pytest.mark.parametrize("name", ["milan", "genoa", "turin"])
def test_a_guest_lives_in_its_pages(name: str) -> None:
    bench = ready(name)
    core = bench.guest(1).core()
    for address in (0x10ABC, 0x21FFF0):
        assert core.write(address, b"secret") is None
        assert core.read(address, 6) == b"secret"
        assert core.read(SHARED_WINDOW + address, 6) != b"secret", "without the C-bit it sees ciphertext"
    assert bench.host.read((P << 12) + 0xABC, 6) != b"secret"
    assert reads(bench.guest(1).core(vmpl=2), 0x10000) is False


def test_the_map_is_free_at_first() -> None:
    bench = Workbench()
    bench.guest(1), bench.guest(2, snp=False)
    assert set(bench.machine.rmp.states(PLAY).tolist()) == {PageState.HYPERVISOR}
    assert bench.guest(1) is bench.guest(1)


def test_rights_are_handed_out() -> None:
    guest = ready().guest(1)
    assert guest.rmpadjust(0x10, 2, target=1, rights=VmplPermission.READ).codes == ("SUCCESS",) * 2
    assert reads(guest.core(vmpl=1), 0x11000)
    assert isinstance(guest.core(vmpl=1).write(0x11000, b"x"), Npf)
    assert not reads(guest.core(vmpl=2), 0x11000)
    done = guest.rmpadjust(0x10, target=2, rights=VmplPermission.WRITE, vmpl=1)
    assert (done.codes, done.carries, done.fault) == (("FAIL_PERMISSION",), (), None)


def test_tables_are_changed_at_once() -> None:
    bench = ready()
    guest = bench.guest(1)
    core = guest.core()
    assert reads(core, 0x10000)
    guest.protect(0x10, clear=1)
    fault = core.read(0x10000, 1)
    assert isinstance(fault, GuestException)
    assert fault.vector == 14
    assert reads(core, 0x11000)
    guest.unmap(0x11)
    assert isinstance(core.read(0x11000, 1), Npf)
    guest.map(0x11, range(P + 1, P + 2))
    assert reads(core, 0x11000)


def test_a_leaf_of_2_mb_gives_way_to_leaves_of_4_kb_and_back() -> None:
    bench = ready()
    guest = bench.guest(1)
    assert reads(guest.core(), 0x205000)
    guest.map(0x205, range(P + 517, P + 518))
    mismatch = guest.core().read(0x205000, 1)
    assert isinstance(mismatch, Npf), "the entry is still one of 2 MB"
    guest.map(0x200, range(P + 512, P + 513), large=True)
    assert reads(guest.core(), 0x205000)
