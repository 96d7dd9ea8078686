"""What a launch adds to a guest, and the hash over it: a chain over pages for SNP, plain SHA-256 before.

A launch is a list of `Run`s: the same list gives the digest, the pages to dump and what `measure_explain` compares.
Sources: SNP ABI (PAGE_INFO, SNP_LAUNCH_UPDATE), SEV API (LAUNCH_MEASURE).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256, sha384
from struct import Struct

from snpbook.spec.launch import DIGEST_SIZE, PAGE_INFO
from snpbook.spec.pages import PAGE_SIZE, LaunchPage

ZERO_DIGEST = bytes(DIGEST_SIZE)
"""The launch digest before the first page, and the contents of pages whose bytes are not measured."""

_pack_info = Struct(f"<{DIGEST_SIZE}s{DIGEST_SIZE}s8sQ").pack
"""PAGE_INFO in the form that a loop over pages can afford: both digests, the words below, the gpa."""
_WORDS = {
    kind: PAGE_INFO.pack(length=PAGE_INFO.size, page_type=kind)[2 * DIGEST_SIZE : PAGE_INFO.offset("gpa")]
    for kind in LaunchPage
}
"""Length, type and permissions of a page, which nothing but its type decides."""


@dataclass(frozen=True, slots=True)
class Run:
    """Pages of one type from `gpa` upwards, called `name` after what put them there.

    `data` are the bytes of NORMAL and VMSA pages, as measured; the other types have `blank` bytes of memory instead.
    """

    name: str
    type: LaunchPage
    gpa: int
    data: bytes = b""
    blank: int = 0

    def __repr__(self) -> str:
        return f"Run({self.name}: {self.type.name} {self.gpa:#x}+{len(self.data) or self.blank:#x})"


def launch_digest(runs: Iterable[Run], digest: bytes = ZERO_DIGEST) -> bytes:
    """The launch digest after these runs of whole pages, from the `digest` before them.

    A page equal to the one before it, as in the padding of images and among VMSAs, is hashed once.
    """
    before: memoryview = memoryview(b"")
    contents = ZERO_DIGEST
    for run in runs:
        words, data = _WORDS[run.type], run.data
        view = memoryview(data)
        for offset in range(0, len(data), PAGE_SIZE):
            if not before or not data.startswith(before, offset):
                before = view[offset : offset + PAGE_SIZE]
                contents = sha384(before).digest()
            digest = sha384(_pack_info(digest, contents, words, run.gpa + offset)).digest()
        for gpa in range(run.gpa, run.gpa + run.blank, PAGE_SIZE):
            digest = sha384(_pack_info(digest, ZERO_DIGEST, words, gpa)).digest()
    return digest


def legacy_digest(runs: Iterable[Run]) -> bytes:
    """The digest in the LAUNCH_MEASURE of an SEV or SEV-ES guest: of all bytes, wherever they lie."""
    return sha256(b"".join([run.data for run in runs])).digest()
