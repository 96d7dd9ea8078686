"""The reverse map table: one page against a table of plain objects (R1), many pages against one page (R2 to R4).

The plain objects are the tests' reference, which passes the same property tests and lives in a clone only. Every
access is granted, as nearly every access is.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np

from snpbook.hardware.checks import check_guest, check_guest_one
from snpbook.hardware.dram import Dram, Pages, page_numbers
from snpbook.hardware.host_instructions import HYPERVISOR, NewState, rmpupdate, rmpupdate_one
from snpbook.hardware.page_instructions import pvalidate, pvalidate_one
from snpbook.hardware.rmp import Rmp, chunks
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.pages import LARGE_PAGE_SIZE, VmplPermission
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE
from snpbook.tools.bench.measure import Comparison, NotMeasurableError, Row, Work, at_least, at_most

_REFERENCE = Path("tests", "reference", "rmp.py")
_ASID, _SHIFT = 5, 1000
_NEED = VmplPermission.READ | VmplPermission.WRITE
_ONE_BY_ONE, _SMALL_TABLE = 1000, 2048
_BATCH, _LONG, _TABLE = 512, 1 << 17, 1 << 22


def _reference() -> ModuleType:
    """The tests' table of plain objects; `NotMeasurableError` outside a clone."""
    path = Path(__file__).resolve().parents[3] / _REFERENCE
    if not path.is_file():
        raise NotMeasurableError(f"its reference is {_REFERENCE} of the source tree: run it in a clone")
    spec = spec_from_file_location("snpbook_reference_rmp", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _table(entries: int) -> Rmp:
    """A table all of whose pages one guest has accepted, guest page = system page + 1000."""
    size = -(-(BOOKKEEPING_SIZE + entries * ENTRY_SIZE) // LARGE_PAGE_SIZE) * LARGE_PAGE_SIZE
    rmp = Rmp(Dram(size), RmpRange(0, BOOKKEEPING_SIZE + entries * ENTRY_SIZE - 1))
    for run in chunks(range(entries)):
        pages = page_numbers(run)
        gfns = pages + np.uint64(_SHIFT)
        rmpupdate(rmp, run, gfns, NewState(assigned=True, asid=_ASID))
        pvalidate(rmp, pages, gfns, _ASID, True)
    return rmp


def _single(instruction: str) -> Comparison:
    """The instruction on 1000 pages, one after the other, and back again where it changes them."""
    objects, rmp = _reference().ReferenceRmp(_SMALL_TABLE), _table(_SMALL_TABLE)
    pages = Random("rmp").sample(range(_SMALL_TABLE), _ONE_BY_ONE)
    for page in range(_SMALL_TABLE):
        objects.rmpupdate(page, page + _SHIFT, True, _ASID)
        objects.pvalidate(page, page + _SHIFT, _ASID, True)
    guest, need = NewState(assigned=True, asid=_ASID), int(_NEED)

    def update_objects() -> None:
        for page in pages:
            objects.rmpupdate(page, 0, False)
            objects.rmpupdate(page, page + _SHIFT, True, _ASID)

    def update() -> None:
        for page in pages:
            rmpupdate_one(rmp, page, 0, HYPERVISOR)
            rmpupdate_one(rmp, page, page + _SHIFT, guest)

    def validate_objects() -> None:
        for page in pages:
            objects.pvalidate(page, page + _SHIFT, _ASID, False)
            objects.pvalidate(page, page + _SHIFT, _ASID, True)

    def validate() -> None:
        for page in pages:
            pvalidate_one(rmp, page, page + _SHIFT, _ASID, False)
            pvalidate_one(rmp, page, page + _SHIFT, _ASID, True)

    def check_objects() -> None:
        for page in pages:
            objects.check(page, page + _SHIFT, _ASID, 0, need)

    def check() -> None:
        for page in pages:
            check_guest_one(rmp, page, page + _SHIFT, _ASID, 0, need)

    work: dict[str, tuple[Work, Work, int]] = {
        "RMPUPDATE": (update_objects, update, 2 * _ONE_BY_ONE),
        "PVALIDATE": (validate_objects, validate, 2 * _ONE_BY_ONE),
        "check": (check_objects, check, _ONE_BY_ONE),
    }
    theirs, ours, units = work[instruction]
    return Comparison(theirs, ours, units, units)


def _batch(pages: Pages, gfns: Pages) -> Comparison:
    """The access check of all pages at once against one call a page, for the first 1000 of the same pages."""
    rmp = _table(_TABLE)
    first = [int(page) for page in pages[:_ONE_BY_ONE]]
    need = int(_NEED)

    def one_by_one() -> None:
        for page in first:
            check_guest_one(rmp, page, page + _SHIFT, _ASID, 0, need)

    return Comparison(one_by_one, lambda: check_guest(rmp, pages, gfns, _ASID, 0, _NEED), len(first), len(pages))


def _run(count: int) -> Comparison:
    return _batch(range(_SHIFT, _SHIFT + count), range(2 * _SHIFT, 2 * _SHIFT + count))


def _copy() -> Comparison:
    """The check of a long run against a copy of the same entries."""
    rmp, pages = _table(_TABLE), range(_SHIFT, _SHIFT + _LONG)
    gfns, entries = range(2 * _SHIFT, 2 * _SHIFT + _LONG), rmp.load(pages)
    target = np.zeros_like(entries)
    return Comparison(
        lambda: np.copyto(target, entries), lambda: check_guest(rmp, pages, gfns, _ASID, 0, _NEED), _LONG, _LONG
    )


def _scattered() -> Comparison:
    pages = np.random.default_rng(4).permutation(_TABLE)[:_LONG].astype(np.uint64)
    return _batch(pages, pages + np.uint64(_SHIFT))


ROWS = [
    *(
        Row("R1", f"one {name} : table of objects", at_most(1.5), partial(_single, name))
        for name in ("RMPUPDATE", "PVALIDATE", "check")
    ),
    Row("R2", "check of 512 pages : one by one", at_least(12), partial(_run, _BATCH)),
    Row("R3", "check of 2^17 pages : one by one", at_least(60), partial(_run, _LONG)),
    Row("R3", "check of 2^17 pages : copy of entries", at_least(0.1), _copy),
    Row("R4", "check of 2^17 scattered : one by one", at_least(25), _scattered),
]
