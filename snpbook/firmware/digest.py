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
_PREFIX = 8
"""Words of a page compared first: most pages that do not hold one value throughout differ there."""


def page_contents(pages: NDArray[np.uint8]) -> list[bytes]:
    """SHA-384 of each 4 KB page (n, 4096); pages filled with one 64-bit value are hashed once per value."""
    words = pages.view("<u8")
    likely = (words[:, :_PREFIX] == words[:, :1]).all(axis=1)
    view = np.ascontiguousarray(pages).data.cast("B")
    if not likely.any():
        return [sha384(view[start : start + PAGE_SIZE]).digest() for start in range(0, len(view), PAGE_SIZE)]
    known: dict[int, tuple[bytes, bytes]] = {}
    digests: list[bytes] = []
    for i, (value, uniform) in enumerate(zip(words[:, 0].tolist(), likely.tolist(), strict=True)):
        page = view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
        if uniform:
            if value not in known:
                pattern = value.to_bytes(8, "little") * (PAGE_SIZE // 8)
                known[value] = pattern, sha384(pattern).digest()
            pattern, digest = known[value]
            if page.tobytes() == pattern:
                digests.append(digest)
                continue
        digests.append(sha384(page).digest())
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
