import numpy as np

from snpbook.exercises.first_light import usable_pages
from snpbook.spec.rmp import RMP_ENTRY


def test_reference_equals_the_decoded_columns() -> None:
    rng = np.random.default_rng(11)
    words = rng.integers(0, 1 << 64, (4096, 2), np.uint64)
    words[:, 0] &= ~np.uint64(0x3FC << 51)  # ASIDs 0 to 3, so that each is met often
    fields = RMP_ENTRY.columns(words.view(RMP_ENTRY.dtype)[:, 0])
    for asid in range(4):
        usable = (fields["assigned"] == 1) & (fields["validated"] == 1) & (fields["immutable"] == 0)
        assert usable_pages(words, asid) == np.count_nonzero(usable & (fields["asid"] == asid)) > 0
