"""Where an SVSM keeps what it has: between the first section of its metadata and the firmware, all memory is its own.

Its sections are, in this order, page tables, secrets page, CPUID page, state, save areas; behind them lie the pages
that it shares with its host. The formats are this SVSM's own (MODEL). Source: COCONUT-SVSM (what there is).
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.guest.layout import CERTIFICATE_PAGES, SHARED_PAGES, TABLE_PAGES, Layout
from snpbook.spec import layout as spec
from snpbook.spec.cite import Cite
from snpbook.spec.image import Image, ImageError, SectionType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.tpm import PCRS

PROCESSORS = 64
"""Processors that the sample image has save areas for."""
REGISTERED = 128
"""Save areas that can be registered at once."""
SEED_SIZE, PCR_SIZE = 32, 32
PCRS_SIZE = PCRS * PCR_SIZE

_CITE = Cite("SVSM", "implementation")
HEAD = spec.Layout(
    "SvsmState",
    64,
    _CITE,
    [
        spec.uint("begun", 0, 1, note="one start of the first processor, and no second"),
        spec.uint("lock", 1, 1, note="a processor serves a call, and no other does"),
        spec.uint("tpm_started", 2, 1),
        spec.uint("pcr_updates", 4, 4),
        spec.uint("low_end", 8, 8, note="the guest's RAM below 4 GiB, in pages"),
        spec.uint("high_end", 16, 8, note="and above"),
        spec.raw("tpm_seed", 32, SEED_SIZE, note="of the endorsement hierarchy"),
    ],
)
ENTRY = spec.Layout(
    "SvsmSaveArea",
    32,
    _CITE,
    [
        spec.uint("vmsa", 0, 8, note="guest address; 0 for an entry that is free"),
        spec.uint("calling_area", 8, 8),
        spec.uint("processor", 16, 4),
        spec.uint("current", 20, 1, note="the one that its processor runs"),
        spec.uint("used", 21, 1, note="checked and marked"),
    ],
)


@dataclass(frozen=True, slots=True)
class Places:
    """Guest addresses; `own` is all that the SVSM has, `layout` what its kernel side needs."""

    own: range
    layout: Layout
    state: int
    save_areas: int

    @classmethod
    def of(cls, svsm: Image, firmware: int) -> Places:
        """The places of an image whose firmware begins at guest address `firmware`.

        `ImageError` for sections of other kinds or in another order.
        """
        kinds = [section.type for section in svsm.sections]
        memory = SectionType.SEC_MEM
        if kinds != [memory, SectionType.SECRETS, SectionType.CPUID, memory, memory]:
            raise ImageError(f"this SVSM wants tables, secrets, CPUID, state and save areas: {svsm.sections}")
        tables, secrets, cpuid, state, areas = svsm.sections
        shared = areas.gpa + areas.size
        layout = Layout(tables.gpa, shared, secrets.gpa, cpuid.gpa, tables.size // PAGE_SIZE - TABLE_PAGES)
        return cls(range(tables.gpa, firmware), layout, state.gpa, areas.gpa)

    @property
    def firmware(self) -> int:
        """Where the guest's firmware begins; it ends at 4 GiB."""
        return self.own.stop

    @property
    def shared(self) -> range:
        """The shared pages behind those of the first processor's tables: certificates, and a GHCB for each other."""
        first = (self.layout.shared >> PAGE_SHIFT) + SHARED_PAGES
        return range(first, first + CERTIFICATE_PAGES + PROCESSORS - 1)

    def ghcb(self, processor: int) -> int:
        """The GHCB of a processor, by its number."""
        if not processor:
            return self.layout.ghcb
        return self.shared[CERTIFICATE_PAGES + processor - 1] << PAGE_SHIFT

    def save_area(self, number: int) -> int:
        """A page for a save area: 0 is the guest's first, the others those of processors at VMPL0 by number."""
        return self.save_areas + number * PAGE_SIZE

    @property
    def pcrs(self) -> int:
        """The vTPM's platform configuration registers."""
        return self.state + HEAD.size

    @property
    def apic_ids(self) -> int:
        """The APIC IDs of the processors by number, four bytes each: all ones for no processor."""
        return self.pcrs + PCRS_SIZE

    @property
    def entries(self) -> int:
        """The registered save areas."""
        return self.state + PAGE_SIZE

    def field(self, name: str) -> tuple[int, int]:
        """Address and size of a field of the state."""
        field = HEAD.fields[name]
        return self.state + field.offset, field.size
