"""Pages in every state that an access can meet, each made by the instructions and table entries that lead to it."""

from __future__ import annotations

from dataclasses import replace

from snpbook.hardware.attempts import Order, attempt
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.workbench import PLAY, BareGuest, Workbench
from snpbook.spec.pages import PAGES_PER_LARGE, VmplPermission
from snpbook.spec.vmcb import PTE_NO_EXECUTE, PTE_PRESENT, PTE_USER, PTE_WRITE
from snpbook.widgets.access_explorer import Specimen

_FIRST, _OTHER_ASID = 0x10, 2
_SMALL = (
    "private and validated", "private, not validated yet", "shared: the hypervisor's", "another guest's",
    "remapped: the RMP names another GPA", "frozen for swapping: immutable", "VMPL1 may only read it",
    "not mapped by the hypervisor", "not mapped by the guest", "read-only in the guest's tables",
    "no-execute in the guest's tables", "supervisor only in the guest's tables",
)  # fmt: skip
_VALID, _FRESH, _SHARED, _FOREIGN, _REMAPPED, _FROZEN, _READ_ONLY, _UNMAPPED, _ABSENT, *_PROTECTED = _SMALL


def specimens(bench: Workbench, guest: BareGuest, plain: BareGuest) -> list[Specimen]:
    """The pages, mapped for both guests; most are the property of `guest`."""
    found = [Specimen(name, _FIRST + at, PLAY.start + at) for at, name in enumerate(_SMALL)]
    by_name = {one.name: one for one in found}
    for one in found:
        _prepare(bench, guest, one)
    host, gfn, page = NewState(assigned=True, asid=guest.asid), by_name[_REMAPPED].gfn, by_name[_REMAPPED].page
    attempt(bench, Order("RMPUPDATE", range(page, page + 1), gfn + PAGES_PER_LARGE, host))
    attempt(bench, Order("PVALIDATE", range(page, page + 1), gfn + PAGES_PER_LARGE, asid=guest.asid))
    frozen = by_name[_FROZEN]
    attempt(bench, Order("RMPUPDATE", _one(frozen), frozen.gfn, replace(host, immutable=True)))
    guest.unmap(by_name[_UNMAPPED].gfn)
    guest.protect(by_name[_ABSENT].gfn, clear=PTE_PRESENT)
    for name, (clear, add) in zip(_PROTECTED, ((PTE_WRITE, 0), (0, PTE_NO_EXECUTE), (PTE_USER, 0)), strict=True):
        guest.protect(by_name[name].gfn, clear=clear, add=add)
    found += _large(bench, guest)
    for one in found:
        plain.map(one.gfn, _one(one))
    return found


def _prepare(bench: Workbench, guest: BareGuest, one: Specimen) -> None:
    """Map a page, and make it the guest's as far as its name says."""
    guest.map(one.gfn, _one(one))
    if one.name in (_SHARED, _REMAPPED):
        return
    asid = _OTHER_ASID if one.name == _FOREIGN else guest.asid
    attempt(bench, Order("RMPUPDATE", _one(one), one.gfn, NewState(assigned=True, asid=asid)))
    if one.name in (_FRESH, _FOREIGN):
        return
    attempt(bench, Order("PVALIDATE", _one(one), one.gfn, asid=asid))
    for vmpl in range(1, bench.machine.product.vmpls):
        rights = VmplPermission.READ if (one.name, vmpl) == (_READ_ONLY, 1) else VmplPermission.ALL
        attempt(bench, Order("RMPADJUST", _one(one), one.gfn, asid=asid, target=vmpl, rights=rights))


def _large(bench: Workbench, guest: BareGuest) -> list[Specimen]:
    """Two pages of 2 MB, validated: one mapped by a leaf of 2 MB, one page of the other by a leaf of 4 KB."""
    page, gfn = PLAY.stop - PAGES_PER_LARGE, PAGES_PER_LARGE
    both = range(page, page + 2 * PAGES_PER_LARGE)
    new = NewState(assigned=True, asid=guest.asid, large=True)
    attempt(bench, Order("RMPUPDATE", both, gfn, new))
    attempt(bench, Order("PVALIDATE", both, gfn, asid=guest.asid, large=True))
    inside = Specimen("inside a 2 MB page, mapped as 2 MB", gfn + 5, page + 5)
    broken = Specimen("inside a 2 MB page, mapped as 4 KB", gfn + PAGES_PER_LARGE + 5, page + PAGES_PER_LARGE + 5)
    guest.map(broken.gfn, _one(broken))
    return [inside, broken]


def _one(one: Specimen) -> range:
    return range(one.page, one.page + 1)
