"""The launch digest as the firmware accumulates it: PAGE_INFO structures chained with SHA-384.

Nothing of this is shared with the relying party's own computation. Source: SNP ABI, SNP_LAUNCH_UPDATE.
"""

from __future__ import annotations

from hashlib import sha384

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.launch import DIGEST_SIZE, PAGE_INFO
from snpbook.spec.pages import PAGE_SIZE, LaunchPage

NO_CONTENTS = bytes(DIGEST_SIZE)
_PREFIX = 64
"""Bytes of a page compared first: most pages that are not uniform differ there."""


def page_contents(pages: NDArray[np.uint8]) -> list[bytes]:
    """SHA-384 of each 4 KB page (n, 4096); pages filled with one 64-bit value are hashed once per value."""
    words = pages.view("<u8")
    uniform = (words[:, : _PREFIX // 8] == words[:, :1]).all(axis=1)
    uniform[uniform] = (words[uniform] == words[uniform, :1]).all(axis=1)
    known: dict[int, bytes] = {}
    digests: list[bytes] = []
    view = np.ascontiguousarray(pages).data.cast("B")
    first = words[:, 0].tolist()
    for i, same in enumerate(uniform.tolist()):
        digest = known.get(first[i]) if same else None
        if digest is None:
            digest = sha384(view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]).digest()
            if same:
                known[first[i]] = digest
        digests.append(digest)
    return digests


def extend(
    digest: bytes,
    kind: LaunchPage,
    gpas: NDArray[np.uint64],
    contents: list[bytes],
    perms: tuple[int, int, int],
    imi_page: int = 0,
) -> bytes:
    """The digest after pages of one type at `gpas`, in order, with the VMPL1 to VMPL3 permissions."""
    tail = PAGE_INFO.pack(
        length=PAGE_INFO.size,
        page_type=kind,
        imi_page=imi_page,
        vmpl1_perms=perms[0],
        vmpl2_perms=perms[1],
        vmpl3_perms=perms[2],
    )
    rests = np.tile(np.frombuffer(tail, np.uint8)[DIGEST_SIZE:], (len(contents), 1))
    rests[:, :DIGEST_SIZE] = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, DIGEST_SIZE)
    rests[:, PAGE_INFO.offset("gpa") - DIGEST_SIZE :] = gpas.astype("<u8").view(np.uint8).reshape(-1, 8)
    for rest in rests.view(f"V{rests.shape[1]}").reshape(-1).tolist():
        digest = sha384(digest + rest).digest()
    return digest
