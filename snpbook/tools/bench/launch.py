"""Rows L: a launch of 4 MiB against the hash floor, the least that measuring it can cost.

The floor is SHA-384 of each 4 KB page and of its 112-byte PAGE_INFO, in one loop, and no other work. A launch is
copy, RMPUPDATE, the firmware's checks, digest chain, encryption in place and the final RMP state, with a recorder on
and the guest context in DRAM.
"""

from __future__ import annotations

from functools import partial
from hashlib import sha384
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
from snpbook.tools.bench.measure import Comparison, Row, at_most

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


def launch(product: str, uniform: float) -> Comparison:
    """A launch through the firmware's commands."""
    image = image_bytes(uniform)
    system = System(product, "bench")
    recorder = system.record()
    system.host.boot()
    ccp, cpu = system.host.ccp, system.host.cpu
    gctx, asid = ccp.create_context(), 1
    ccp.launch_start(gctx, DEFAULT_POLICY, bytes(16))
    ccp.activate(gctx, asid)
    pages = system.host.memory.allocate(PAGES)
    gfns = range(len(pages))
    content = np.frombuffer(image, np.uint8).reshape(-1, PAGE_SIZE)

    def run() -> None:
        cpu.write_pages(pages, content)
        rmpupdate(cpu, pages, gfns, NewState(assigned=True, asid=asid, immutable=True))
        ccp.launch_update(gctx, pages, LaunchPage.NORMAL)
        system.machine.rmp.fill(pages, 0)  # back to the start, by no instruction
        recorder.events.clear()

    return Comparison(partial(hash_floor, image), run)


def digest() -> Comparison:
    """The relying party's digest of the same image."""
    image = image_bytes(0)
    parsed = Image.parse(image)
    return Comparison(partial(hash_floor, image), partial(firmware_digest, parsed))


ROWS = [
    Row("L1", "launch of 4 MiB, milan : hash floor", at_most(1.4), partial(launch, "milan", 0)),
    Row("L1-genoa", "launch of 4 MiB, genoa : hash floor", at_most(1.9), partial(launch, "genoa", 0)),
    Row("L3", "launch, 60 % of pages uniform : hash floor", at_most(0.9), partial(launch, "milan", UNIFORM)),
    Row("L4", "digest alone : hash floor", at_most(1.08), digest),
]
