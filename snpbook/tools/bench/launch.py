"""Rows L: a launch of 4 MiB against the hash floor, the least that measuring it can cost, and against another's digest.

The floor is SHA-384 of each 4 KB page and of its 112-byte PAGE_INFO, in one loop, and no other work. A launch is
copy, RMPUPDATE, the firmware's checks, digest chain, encryption in place and the final RMP state, with a recorder on
and the guest context in DRAM. Rows that need what may not be installed here (sev-snp-measure, Debian's ovmf) are
optional.
"""

from __future__ import annotations

from functools import partial
from hashlib import sha384
from importlib import import_module
from pathlib import Path
from random import Random

import numpy as np

from snpbook.attest.measure import firmware_digest
from snpbook.hardware.host_instructions import NewState
from snpbook.host.rmp import rmpupdate
from snpbook.spec.image import Image
from snpbook.spec.launch import PAGE_INFO
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.system import System
from snpbook.tools.bench.digest import CODE_4M
from snpbook.tools.bench.measure import Comparison, NotMeasurableError, Row, Work, at_most

SIZE = 4 << 20
PAGES = SIZE >> PAGE_SHIFT
UNIFORM = 0.6
"""The share of pages filled with one value in real firmware, Debian's OVMF_CODE_4M.fd among it."""


def image_bytes(uniform: float) -> bytes:
    """A seeded image of which the given share of pages holds one value each."""
    rng = Random("launch")
    pages = [rng.randbytes(PAGE_SIZE) for _ in range(PAGES)]
    for number in rng.sample(range(PAGES), int(uniform * PAGES)):
        pages[number] = b"\xff" * PAGE_SIZE
    return b"".join(pages)


def hash_floor(image: bytes) -> None:
    """Hash what has to be hashed."""
    view, info = memoryview(image), bytes(PAGE_INFO.size)
    for start in range(0, len(image), PAGE_SIZE):
        sha384(view[start : start + PAGE_SIZE]).digest()
        sha384(info).digest()


def launch(product: str, image: bytes, by_page: bool = False) -> Work:
    """A launch through the firmware's commands: of all pages at once, or page after page."""
    system = System(product, "bench")
    recorder = system.record()
    system.host.boot()
    ccp, cpu = system.host.ccp, system.host.cpu
    gctx, asid = ccp.create_context(), 1
    ccp.launch_start(gctx, DEFAULT_POLICY, bytes(16))
    ccp.activate(gctx, asid)
    pages = system.host.memory.allocate(len(image) >> PAGE_SHIFT)
    content = np.frombuffer(image, np.uint8).reshape(-1, PAGE_SIZE)
    step = 1 if by_page else len(pages)

    def run() -> None:
        for first in range(0, len(pages), step):
            some = pages[first : first + step]
            cpu.write_pages(some, content[first : first + step])
            rmpupdate(cpu, some, range(first, first + step), NewState(assigned=True, asid=asid, immutable=True))
            ccp.launch_update(gctx, some, LaunchPage.NORMAL)
        system.machine.rmp.fill(pages, 0)  # back to the start, by no instruction
        recorder.events.clear()

    return run


def against_floor(product: str, uniform: float = 0, *, by_page: bool = False) -> Comparison:
    """A launch of a made image."""
    image = image_bytes(uniform)
    return Comparison(partial(hash_floor, image), launch(product, image, by_page))


def real_image() -> Comparison:
    """A launch of the firmware that Debian ships."""
    if not Path(CODE_4M).is_file():
        raise NotMeasurableError(f"there is no {CODE_4M}: on Debian, apt install ovmf")
    image = Path(CODE_4M).read_bytes()
    return Comparison(partial(hash_floor, image), launch("milan", image))


def against_peer() -> Comparison:
    """A launch of a made image, and the loop in which sev-snp-measure digests it."""
    try:
        peer = import_module("sevsnpmeasure.gctx")
    except ImportError:
        raise NotMeasurableError("sev-snp-measure is not installed: make test installs it") from None
    image = image_bytes(0)
    return Comparison(lambda: peer.GCTX().update_normal_pages(0, image), launch("milan", image))


def digest() -> Comparison:
    """The relying party's digest of the same image."""
    image = image_bytes(0)
    parsed = Image.parse(image)
    return Comparison(partial(hash_floor, image), partial(firmware_digest, parsed))


ROWS = [
    Row("L1", "launch of 4 MiB, milan : hash floor", at_most(1.4), partial(against_floor, "milan")),
    Row("L1-genoa", "launch of 4 MiB, genoa : hash floor", at_most(1.9), partial(against_floor, "genoa")),
    Row("L2", "launch of 4 MiB : sev-snp-measure's digest", at_most(1.15), against_peer, optional=True),
    Row("L3", "launch of Debian's OVMF_CODE_4M.fd : hash floor", at_most(0.9), real_image, optional=True),
    Row("L3", "launch, 60 % of pages uniform : hash floor", at_most(0.9), partial(against_floor, "milan", UNIFORM)),
    Row("L5", "launch page by page : hash floor", at_most(4), partial(against_floor, "milan", by_page=True)),
    Row("L4", "digest alone : hash floor", at_most(1.08), digest),
]
