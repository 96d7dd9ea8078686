"""Firmware images: the GUID table at the end of an OVMF file and the SEV metadata it points to.

`Image.parse` is the only reader of these tables, for the VMM, the guest and the relying party.
Sources: edk2 ResetVectorVtf0.asm and OvmfSevMetadata.asm; QEMU's reading of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from snpbook.spec import guid
from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, Record, raw, uint
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.vmsa import BSP_RESET_EIP

FOUR_GIB = 0x1_0000_0000
FOOTER_GAP = 32
"""The GUID table ends 32 bytes before the end of the file, below the reset vector."""


class SectionType(IntEnum):
    """What the VMM must place into a section of guest memory before the guest starts."""

    SEC_MEM = 1
    SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    KERNEL_HASHES = 0x10


TABLE_ENTRY = Layout("OvmfTableEntry", 18, Cite("OVMF", "GUID table"), [uint("size", 0, 2), raw("guid", 2, 16)])
METADATA_HEADER = Layout(
    "SevMetadataHeader",
    16,
    Cite("OVMF", "SEV metadata"),
    [raw("signature", 0, 4), uint("size", 4, 4), uint("version", 8, 4), uint("count", 12, 4)],
)
METADATA_SECTION = Layout(
    "SevMetadataSection",
    12,
    Cite("OVMF", "SEV metadata"),
    [uint("gpa", 0, 4), uint("size", 4, 4), uint("type", 8, 4, enum=SectionType)],
)
SIGNATURE = b"ASEV"


class ImageError(ValueError):
    """The file is no firmware image, or its tables contradict themselves."""


@dataclass(frozen=True, slots=True)
class Section:
    """One range of guest memory named by the SEV metadata; sizes in bytes."""

    type: SectionType
    gpa: int
    size: int

    def __repr__(self) -> str:
        return f"Section({self.type.name} {self.gpa:#x}+{self.size:#x})"


@dataclass(frozen=True, slots=True, repr=False)
class Image:
    """A firmware file that ends at 4 GiB of guest memory, with its tables decoded.

    `table` maps each GUID to its data; `metadata` holds the records of the SEV metadata in file order. A fault that
    matters to one use only (a size that is no whole page, a section of unknown type) is refused by the property that
    needs it, because legacy SEV launches such files as plain bytes.
    """

    data: bytes
    table: dict[UUID, bytes]
    metadata: tuple[Record, ...]

    @classmethod
    def parse(cls, data: bytes) -> Image:
        """Decode an image; `ImageError` says which table is wrong and where.

        An image without a GUID table is accepted: it simply declares nothing.
        """
        if len(data) < FOOTER_GAP + TABLE_ENTRY.size:
            raise ImageError(f"{len(data)} bytes are no firmware image: even its table's footer does not fit")
        table = _parse_table(data)
        return cls(data, table, _parse_metadata(data, table))

    def __repr__(self) -> str:
        return f"Image({len(self.data):#x} bytes, {len(self.metadata)} sections)"

    @property
    def gpa(self) -> int:
        """Where the image starts in guest memory; `ImageError` where it is no whole pages below 4 GiB."""
        if len(self.data) % PAGE_SIZE:
            raise ImageError(f"{len(self.data)} bytes are no firmware image: its size is a multiple of {PAGE_SIZE}")
        if len(self.data) > FOUR_GIB:
            raise ImageError(f"{len(self.data)} bytes do not fit below 4 GiB")
        return FOUR_GIB - len(self.data)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The sections in file order, which is the launch order; `ImageError` where a type is unknown."""
        for i, record in enumerate(self.metadata):
            if not isinstance(record.type, SectionType):
                raise ImageError(f"SEV metadata section {i} has the unknown type {record.type:#x}")
        return tuple(Section(record.type, record.gpa, record.size) for record in self.metadata)

    @property
    def ap_reset_eip(self) -> int:
        """Where application processors start; `ImageError` where the image does not say."""
        if guid.SEV_ES_RESET_BLOCK not in self.table:
            raise ImageError(f"no SEV-ES reset block ({guid.SEV_ES_RESET_BLOCK}) in the GUID table")
        return int.from_bytes(self.table[guid.SEV_ES_RESET_BLOCK][:4], "little")

    @property
    def bsp_reset_eip(self) -> int:
        """Where the first processor starts, whatever the image says."""
        return BSP_RESET_EIP

    @property
    def svsm_entry(self) -> int:
        """Where an SVSM starts, from its own beginning on; `ImageError` where the image is none."""
        if guid.SVSM_INFO not in self.table:
            raise ImageError(f"no SVSM entry point ({guid.SVSM_INFO}) in the GUID table")
        return int.from_bytes(self.table[guid.SVSM_INFO][:4], "little")

    @property
    def hash_table_base(self) -> int:
        """Guest address of the area for kernel hashes; 0 where the image supports none."""
        return int.from_bytes(self.table.get(guid.HASH_TABLE_AREA, b"")[:4], "little")

    @property
    def secret_base(self) -> int:
        """Guest address of the area for a launch secret; 0 where the image has none."""
        return int.from_bytes(self.table.get(guid.SECRET_AREA, b"")[:4], "little")

    def sections_of(self, kind: SectionType) -> tuple[Section, ...]:
        """The sections of one type, in file order."""
        return tuple(section for section in self.sections if section.type is kind)


def _parse_table(data: bytes) -> dict[UUID, bytes]:
    footer_at = len(data) - FOOTER_GAP - TABLE_ENTRY.size
    footer = TABLE_ENTRY.unpack(data, footer_at)
    if footer.guid != guid.OVMF_FOOTER.bytes_le:
        return {}
    start = max(footer_at + TABLE_ENTRY.size - footer.size, 0)  # what claims more than there is, gets what there is
    table: dict[UUID, bytes] = {}
    end = footer_at
    while end - start >= TABLE_ENTRY.size:
        entry_at = end - TABLE_ENTRY.size
        entry = TABLE_ENTRY.unpack(data, entry_at)
        if entry.size < TABLE_ENTRY.size:
            raise ImageError(f"the GUID table's entry at file offset {entry_at:#x} has size {entry.size}")
        end = max(end - entry.size, start)
        table[UUID(bytes_le=entry.guid)] = data[end:entry_at]
    return table


def _parse_metadata(data: bytes, table: dict[UUID, bytes]) -> tuple[Record, ...]:
    if guid.SEV_METADATA not in table:
        return ()
    offset = int.from_bytes(table[guid.SEV_METADATA][:4], "little")
    if not METADATA_HEADER.size <= offset <= len(data):
        raise ImageError(f"the SEV metadata offset {offset:#x} (from the end) lies outside the file")
    start = len(data) - offset
    header = METADATA_HEADER.unpack(data, start)
    if header.signature != SIGNATURE or header.version != 1:
        raise ImageError(f"the SEV metadata at {start:#x} has signature {header.signature!r}, version {header.version}")
    end = METADATA_HEADER.size + header.count * METADATA_SECTION.size
    if header.count and (end > header.size or start + end > len(data)):
        raise ImageError(f"the SEV metadata at {start:#x} has {header.count} sections, but {header.size} bytes")
    offsets = range(start + METADATA_HEADER.size, start + end, METADATA_SECTION.size)
    return tuple(METADATA_SECTION.unpack(data, at) for at in offsets)
