"""A launch page by page on a bench: the PAGE_INFO of each page, and the digest that the firmware holds after it.

PAGE_INFO is put together from what the host asked for, the digest read out of the guest's context: that the one is the
hash of the other is the firmware's doing. Source: SNP ABI, SNP_LAUNCH_UPDATE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha384

from snpbook.firmware.bench import CONTEXT, SPARE, Bench
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.launch import DIGEST_SIZE, PAGE_INFO
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE, LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.vmsa import UNMEASURED_FROM, UNMEASURED_TO

ASID = 1


@dataclass(frozen=True, slots=True)
class Page:
    """A page of 4 KB to be launched, with the rights of VMPL1 to VMPL3."""

    kind: LaunchPage
    gpa: int
    data: bytes = field(default=bytes(PAGE_SIZE), repr=False)
    rights: tuple[int, int, int] = (0, 0, 0)

    @property
    def contents(self) -> bytes:
        """CONTENTS of its PAGE_INFO: only two types have their bytes measured."""
        match self.kind:
            case LaunchPage.NORMAL:
                return sha384(self.data).digest()
            case LaunchPage.VMSA:
                gap = bytes(UNMEASURED_TO - UNMEASURED_FROM)
                return sha384(self.data[:UNMEASURED_FROM] + gap + self.data[UNMEASURED_TO:]).digest()
        return bytes(DIGEST_SIZE)

    def info(self, before: bytes) -> Record:
        """Its PAGE_INFO where the digest so far is `before`."""
        vmpl1, vmpl2, vmpl3 = self.rights
        return PAGE_INFO.record(digest_cur=before, contents=self.contents, length=PAGE_INFO.size, page_type=self.kind,
                                vmpl1_perms=vmpl1, vmpl2_perms=vmpl2, vmpl3_perms=vmpl3, gpa=self.gpa)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """One page of a launch: its PAGE_INFO, and the launch digest in the guest's context after it."""

    info: Record
    digest: bytes

    @property
    def hashed(self) -> bool:
        """Whether the digest is the hash of the PAGE_INFO."""
        return sha384(bytes(self.info)).digest() == self.digest


def begin(bench: Bench, policy: int = DEFAULT_POLICY) -> None:
    """A guest in LAUNCH with an ASID, on a bench that is initialised."""
    bench.assign(CONTEXT, FIRMWARE)
    bench.command(Command.SNP_GCTX_CREATE, gctx_paddr=CONTEXT)
    bench.command(Command.SNP_LAUNCH_START, gctx_paddr=CONTEXT, policy=policy)
    bench.command(Command.SNP_ACTIVATE, gctx_paddr=CONTEXT, asid=ASID)


def grow(bench: Bench, pages: Sequence[Page]) -> list[Link]:
    """Launch the pages on a bench where a guest is in LAUNCH; the first refusal is raised."""
    links: list[Link] = []
    for number, page in enumerate(pages):
        spa = SPARE + number * PAGE_SIZE
        before = _digest(bench)
        bench.host.write(spa, page.data)
        bench.assign(spa, NewState(assigned=True, asid=ASID, immutable=True), page.gpa)
        vmpl1, vmpl2, vmpl3 = page.rights
        made = bench.command(Command.SNP_LAUNCH_UPDATE, gctx_paddr=CONTEXT, page_paddr=spa, page_type=page.kind,
                             vmpl1_perms=vmpl1, vmpl2_perms=vmpl2, vmpl3_perms=vmpl3)  # fmt: skip
        if made.refusal is not None:
            raise made.refusal
        links.append(Link(page.info(before), _digest(bench)))
    return links


def _digest(bench: Bench) -> bytes:
    context = bench.context()
    if context is None:
        raise ValueError("the bench has no guest in LAUNCH: call begin first")
    digest: bytes = context.launch_digest
    return digest
