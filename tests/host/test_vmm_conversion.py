"""Conversions: what each side holds afterwards and how much memory that takes, with and without discarding."""

from __future__ import annotations

import errno

import pytest

from snpbook.host.refusal import KernelError
from snpbook.host.vmm.exits import convert
from snpbook.system import Guest
from tests.host.test_vmm_order import host
from tests.machines import MIB, PAGE

ERAS = pytest.mark.parametrize("era", ["mainline", "rfc-v7"])
AT, PAGES = 4 * MIB, 64


def guest_of(era: str, *, discard: bool) -> Guest:
    guest = host(era).create_vm(memory="12 MiB", discard=discard)
    guest.launch()
    return guest


def private_pages(guest: Guest) -> int:
    slot = guest.vmm.vm.slots.of(AT >> 12)
    assert slot is not None
    file = getattr(slot.private, "pages", None) or slot.private.file.pages
    return int(file.resident)


@ERAS
@pytest.mark.parametrize("discard", [True, False])
def test_memory_in_use(era: str, discard: bool) -> None:
    guest = guest_of(era, discard=discard)
    vmm, memory = guest.vmm, guest.system.host.memory
    convert(vmm, AT, PAGES * PAGE, private=False)
    start = memory.free
    vmm.write(AT, b"s" * PAGES * PAGE)
    assert memory.free == start - PAGES
    convert(vmm, AT, PAGES * PAGE, private=True)
    eager = PAGES * (era == "rfc-v7")  # that KVM gives private pages memory as they are converted
    assert memory.free == start - (eager if discard else PAGES)
    convert(vmm, AT, PAGES * PAGE, private=False)
    assert memory.free == start - (0 if discard else PAGES)
    assert vmm.read(AT, 4) == (bytes(4) if discard else b"ssss"), "what was discarded reads as zeros"


@pytest.mark.parametrize("discard", [True, False])
def test_the_private_side_lasts_without_a_punch(discard: bool) -> None:
    """A guest that goes to shared and back finds its private page as it was, or a new one, by `discard`."""
    guest = guest_of("mainline", discard=discard)
    vmm = guest.vmm

    before = private_pages(guest)
    guest.boot()
    taken = private_pages(guest)
    assert taken > before
    convert(vmm, AT, PAGE, private=False)
    assert private_pages(guest) == taken - (1 if discard else 0)
    convert(vmm, AT, PAGE, private=True)
    assert private_pages(guest) == taken - (1 if discard else 0), "converting alone takes no memory"


@ERAS
def test_what_cannot_be_converted(era: str) -> None:
    vmm = guest_of(era, discard=True).vmm
    hole = 64 * MIB
    for gpa, size in ((AT + 1, PAGE), (AT, 0), (AT, 100)):
        with pytest.raises(KernelError) as caught:
            convert(vmm, gpa, size, private=True)
        assert caught.value.errno == errno.EINVAL
    convert(vmm, hole, PAGE, private=False)
    with pytest.raises(KernelError) as caught:
        convert(vmm, hole, PAGE, private=True)
    assert caught.value.errno == errno.EINVAL
