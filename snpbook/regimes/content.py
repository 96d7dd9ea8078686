"""What a guest finds in a page that was shared in between: the old content, nobody's, or none.

It decides between regimes what conversions are worth: which of them keep a page, and what PVALIDATE says of it.
Sources: Linux virt/kvm/guest_memfd.c (inferred for a flip without a punch); RFC v7 patch 55; UPM v10.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from snpbook.regimes.regime import FIRST, Regime
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

SECRET, PUBLIC = b"a secret", b"public!!"
"""What the guest wrote while the page was private, and the VMM while it was shared."""


class Found(StrEnum):
    """What the guest reads in the end."""

    SECRET = "what it wrote"
    PUBLIC = "what the VMM wrote"
    ZEROS = "zeros"
    NOISE = "noise"
    NOTHING = "nothing: the access faults"


@dataclass(frozen=True, slots=True)
class Flip:
    """The outcome: `pvalidate` is (return code, no change) where the guest validated the page again.

    `raw_zeros` says whether the frame held zeros when it came: a decrypted zero is noise. `kept` says whether it is the
    frame of before, which the guest had at first.
    """

    found: Found
    pvalidate: tuple[int, bool] | None
    kept: bool
    raw_zeros: bool


def flip(
    kind: str,
    backend: str,
    *,
    discard: bool,
    accept: bool = True,
    rescind: bool = False,
    vmm_writes: bool = True,
) -> Flip:
    """Private with a secret, shared, private again. An SNP guest that does not `accept` anew is stopped by a fault.

    It is to `rescind` its validation before it shares a page, as Linux does; what PVALIDATE says depends on that. On
    registered memory the VMM's page is the guest's, so that what it `vmm_writes` destroys what is there.
    """
    regime, page = Regime(kind, backend, discard=discard), range(FIRST, FIRST + 1)
    regime.guest.launch()
    regime.convert(page, private=True)
    regime.touch(page, SECRET)
    before = regime.frames(page).tolist()
    if rescind and kind == "snp":
        regime.pvalidate(FIRST, validate=False)
    regime.convert(page, private=False)
    if vmm_writes:
        regime.vmm.write(FIRST << PAGE_SHIFT, PUBLIC)
    regime.convert(page, private=True)
    answer = regime.pvalidate(FIRST) if accept and kind == "snp" else None
    try:
        read = regime.read(FIRST, len(SECRET))
    except RuntimeError:
        return Flip(Found.NOTHING, answer, kept=regime.frames(page).tolist() == before, raw_zeros=False)
    frame = int(regime.frames(page)[0])
    raw = regime.system.machine.dram.read(frame << PAGE_SHIFT, PAGE_SIZE)
    known = {SECRET: Found.SECRET, PUBLIC: Found.PUBLIC, bytes(len(SECRET)): Found.ZEROS}
    return Flip(known.get(read, Found.NOISE), answer, kept=[frame] == before, raw_zeros=not any(raw))
