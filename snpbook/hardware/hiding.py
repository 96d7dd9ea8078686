"""Ciphertext hiding: reads by the host give a fixed pattern in place of a guest's ciphertext.

An option of Zen 5 and of some Genoa firmware, for SNP guests whose ASID is within a range set at SNP_INIT_EX. Sources:
AMD's patch series "SEV-SNP ciphertext hiding" for Linux; SNP ABI, guest policy bit 24.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes, Pages, Words, page_numbers
from snpbook.hardware.rmp import Rmp
from snpbook.spec.encryption import HIDDEN_BYTE
from snpbook.spec.rmp import ASID, ASID_SHIFT


def owners(rmp: Rmp, pages: Pages) -> Words:
    """The ASID to which the table assigns each page (n,); 0 where it is no guest's."""
    numbers = page_numbers(pages)
    covered, asids = rmp.covers(numbers), np.zeros(len(numbers), np.uint64)
    asids[covered] = (rmp.effective(numbers[covered])[:, 0] & np.uint64(ASID)) >> np.uint64(ASID_SHIFT)
    return asids


def hide(content: Bytes, asids: NDArray[np.integer], max_snp_asid: int) -> Bytes:
    """What a host reads of whole pages (n, 4096) that RMP entries assign to `asids` (n,), 0 for no guest.

    Pages of ASIDs 1 to `max_snp_asid` read as `HIDDEN_BYTE`; without any, `content` itself comes back.
    """
    hidden = (asids > 0) & (asids <= max_snp_asid)
    if not hidden.any():
        return content
    result = content.copy()
    result[hidden] = HIDDEN_BYTE
    return result
