"""Firmware that is known from a real report alone: enough to write such reports, not to model what it does.

Source: a real Turin report (version 5, firmware 1.55.65), whose bit 6 of PLATFORM_INFO has no name and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.spec.policy import Tcb
from snpbook.spec.products import FirmwareBuild
from snpbook.spec.releases import release

SEEN_FIRMWARE: Mapping[str, FirmwareBuild] = {
    "turin": FirmwareBuild(
        release("1.58"),
        build=65,
        report_version=5,
        platform_info=0x25,
        tcb=Tcb(fmc=1, bootloader=1, tee=1, snp=4, microcode=0x51),
    )
}
"""By product, for those without firmware in `data/products`; that Turin's is of revision 1.58 is inferred."""
