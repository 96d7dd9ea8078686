"""Where the guest's programs put what they need: page tables in validated memory, shared pages in free RAM.

The program stands for the code in the firmware image, so it knows the image's own tables. Source: edk2 OvmfPkg
(SEV metadata).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from snpbook.spec.image import Image, ImageError, SectionType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE

TABLE_PAGES = 4
"""PML4, one page of 1 GB entries, one of 2 MB entries, one of 4 KB entries for the shared pages."""
SHARED_PAGES = 3
"""GHCB, request page, response page."""
CERTIFICATE_PAGES = 4
"""Behind them: private, until a certificate table is to come."""
LATER_PAGES = 2
"""Behind those: for the #HV doorbell, and for the firmware's tables."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest addresses. `spare_tables` counts the pages behind the tables, in which a 2 MB entry can be taken apart.

    `notes` is room of `notes_size` bytes that the launch validated, for the table of unaccepted memory. Behind it lies
    `calling_area`, for a kernel that has an SVSM.
    """

    tables: int
    shared: int
    secrets: int
    cpuid: int
    spare_tables: int = 0
    notes: int = 0
    notes_size: int = 0
    calling_area: int = 0

    @classmethod
    def of(cls, image: Image) -> Layout:
        """Choose the places from the image's metadata.

        `ImageError` where the image has no secrets page, no CPUID page or no room that is validated at launch.
        """
        rom = image.gpa >> PAGE_SHIFT
        room = [s for s in image.sections_of(SectionType.SEC_MEM) if s.size >= TABLE_PAGES * PAGE_SIZE]
        secrets, cpuid = (image.sections_of(kind) for kind in (SectionType.SECRETS, SectionType.CPUID))
        wanted = {"secrets page": secrets, f"SEC memory of {TABLE_PAGES} pages": room, "CPUID page": cpuid}
        missing = next((name for name, found in wanted.items() if not found), None)
        if missing is not None:
            found = f"SEV metadata without a {missing}" if image.sections else "no SEV metadata"
            raise ImageError(f"the image cannot boot as an SNP guest: it has {found}")
        taken = {page for s in image.sections for page in range(s.gpa >> PAGE_SHIFT, s.gpa + s.size >> PAGE_SHIFT)}
        size = SHARED_PAGES + CERTIFICATE_PAGES + LATER_PAGES
        free = (
            base + i
            for base in range(0, rom, PAGES_PER_LARGE)
            for i in range(1, PAGES_PER_LARGE - size)
            if taken.isdisjoint(range(base + i, base + i + size))
        )
        spare = room[0].size // PAGE_SIZE - TABLE_PAGES
        place = cls(room[0].gpa, next(free) << PAGE_SHIFT, secrets[0].gpa, cpuid[0].gpa, spare)
        others = [s for s in image.sections_of(SectionType.SEC_MEM) if s is not room[0]]
        notes = max(others, key=lambda s: s.size, default=None)
        if notes is None:
            return place
        size = notes.size - PAGE_SIZE
        return replace(place, notes=notes.gpa, notes_size=size, calling_area=notes.gpa + size)

    @property
    def ghcb(self) -> int:
        return self.shared

    @property
    def request(self) -> int:
        return self.shared + PAGE_SIZE

    @property
    def response(self) -> int:
        return self.shared + 2 * PAGE_SIZE

    @property
    def certificates(self) -> int:
        return self.shared + SHARED_PAGES * PAGE_SIZE

    @property
    def doorbell(self) -> int:
        """The page behind the certificates: private, until a guest under restricted injection listens there."""
        return self.certificates + CERTIFICATE_PAGES * PAGE_SIZE

    @property
    def boot_tables(self) -> int:
        """The page behind that: private, for what the firmware tells the kernel."""
        return self.doorbell + PAGE_SIZE
