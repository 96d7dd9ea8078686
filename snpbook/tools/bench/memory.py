"""What a machine with 1 TiB of memory costs (D1 to D3): time against a bare mapping, and resident memory; E4's scratch.

Resident memory is that of the row's own process, from /proc/self/status.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from importlib import import_module

import numpy as np

from snpbook.firmware.keys import Chip
from snpbook.firmware.table import power_on
from snpbook.hardware.dram import Dram, Words
from snpbook.hardware.host_instructions import NewState, rmpupdate
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.tweaks import boot_constants
from snpbook.hardware.xex import Xex
from snpbook.host.kernel import Kernel
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.products import product
from snpbook.tools.bench.measure import Comparison, Row, Usage, at_most, megabytes_at_most, resident
from snpbook.trace import Trace

_STEP = 64
_KERNEL = ("ipykernel.kernelapp", "snpbook.labs.first_light")
_TIB, _GUEST_PAGES, _GUESTS, _TOUCHED_PAGES, _SCATTERED = 1 << 40, 1 << 17, 4, 1 << 14, 2000
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def _mapping() -> mmap.mmap:
    """1 TiB of zeros that take memory only where written."""
    region = mmap.mmap(-1, _TIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return region


def _machine() -> Machine:
    return Machine(product("genoa"), _TIB, boot_entropy=bytes(32), trace=Trace())


def _booted() -> Machine:
    machine, values = _machine(), np.random.default_rng(1)
    power_on(machine, Chip.from_seed("bench", "genoa"), values.bytes)
    Kernel(HostCpu(machine)).boot()
    return machine


def _growth(work: Callable[[], object]) -> Usage:
    """By how much resident memory grows, while the outcome of `work` is held."""
    before = resident()
    held = work()
    grown = resident() - before
    del held
    return Usage(grown)


def _scratch() -> Usage:
    """What encrypting 256 MB takes besides source and destination."""
    source, result = (np.ones(1 << 28, np.uint8) for _ in range(2))
    transform = Xex(boot_constants(b"bench")).key(bytes(16)).encrypt
    before = resident("VmHWM")
    transform.span(0, source, result)
    return Usage(resident("VmHWM") - before)


def _creation() -> Comparison:
    def make() -> None:
        _machine().cores.clear()  # cores and machine hold each other: let go of its address space at once

    return Comparison(_mapping, make)


def _guests() -> Machine:
    """Four guests of 512 MiB in the table, and 64 MB of contents."""
    machine = _booted()
    first = _TIB >> PAGE_SHIFT + 1
    for guest in range(_GUESTS):
        pages = range(first + guest * _GUEST_PAGES, first + (guest + 1) * _GUEST_PAGES)
        rmpupdate(machine.rmp, pages, range(_GUEST_PAGES), NewState(assigned=True, asid=guest + 1))
    data = np.ones((_STEP, PAGE_SIZE), np.uint8)
    for start in range(first, first + _TOUCHED_PAGES, _STEP):
        machine.memory.write_pages(0, range(start, start + _STEP), data)
    return machine


def _peak(*modules: str) -> Usage:
    """The most that this process ever held, with some more modules loaded."""
    for module in modules:
        import_module(module)
    held = _guests()
    peak = resident("VmHWM")
    del held
    return Usage(peak)


def _places() -> Words:
    return np.random.default_rng(2).integers(0, _TIB >> PAGE_SHIFT, _SCATTERED, np.uint64)


def _write_scattered() -> Dram:
    dram, page = Dram(_TIB), np.ones((1, PAGE_SIZE), np.uint8)
    for place in _places():
        dram.scatter(np.array([place]), page)
    return dram


def _scattered() -> Comparison:
    flat = np.frombuffer(_mapping(), np.uint8).reshape(-1, PAGE_SIZE)
    dram, places, data = Dram(_TIB), _places(), np.ones((_SCATTERED, PAGE_SIZE), np.uint8)

    def plainly() -> None:
        flat[places] = data

    return Comparison(plainly, lambda: dram.scatter(places, data))


ROWS = [
    Row("E4", "XEX 256 MB, scratch", megabytes_at_most(2), _scratch),
    Row("D1", "1 TiB machine : bare mapping", at_most(200), _creation),
    Row("D1", "1 TiB machine, resident", megabytes_at_most(10), partial(_growth, _machine)),
    Row("D1", "1 TiB machine after SNP_INIT, resident", megabytes_at_most(60), partial(_growth, _booted)),
    Row("D2", "1 TiB, 4 guests, 64 MB touched: whole process", megabytes_at_most(200), _peak),
    Row("D2", "the same in a kernel with widgets", megabytes_at_most(300), partial(_peak, *_KERNEL)),
    Row("D3", "2000 scattered pages : plain writes", at_most(4), _scattered),
    Row("D3", "2000 scattered pages, resident", megabytes_at_most(30), partial(_growth, _write_scattered)),
]
