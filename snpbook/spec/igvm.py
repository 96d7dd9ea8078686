"""IGVM files: a whole launch in one file, as directives for the loader.

`Igvm.parse` reads the headers and checks lengths and checksum; what a directive means for the measurement is for
`snpbook.attest.measure_igvm`. Source: igvm_defs of Microsoft's IGVM specification, format version 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

from snpbook.spec.cite import Cite
from snpbook.spec.image import ImageError
from snpbook.spec.layout import Layout, Record, bits, raw, uint

CITE = Cite("IGVM", "file format")
MAGIC = b"IGVM"
VERSION = 1
ALIGNMENT = 8
"""Each variable header starts at a multiple of this many bytes."""
OPTIONAL = 0x8000_0000
"""Bit 31 of a header's type: whoever does not know the type may pass over it."""

GPA_LIMIT = 1 << 52
"""Guest physical addresses have no more than 52 bits."""


class Platform(IntEnum):
    """What a file can be loaded for; the file gives each of its platforms one bit of the compatibility masks."""

    NATIVE = 0
    VSM = 1
    SEV_SNP = 2
    TDX = 3


class HeaderType(IntEnum):
    """The variable headers.

    SRAT, MMIO_RANGES, ERROR_RANGE, SLIT, PPTT and DEVICE_TREE are unconfirmed. A header without contents in `_BODIES`
    adds no page of its own.
    """

    SUPPORTED_PLATFORM = 0x001
    GUEST_POLICY = 0x101
    PARAMETER_AREA = 0x301
    PAGE_DATA = 0x302
    PARAMETER_INSERT = 0x303
    VP_CONTEXT = 0x304
    REQUIRED_MEMORY = 0x305
    VP_COUNT = 0x307
    SRAT = 0x308
    MADT = 0x309
    MMIO_RANGES = 0x30A
    SNP_ID_BLOCK = 0x30B
    MEMORY_MAP = 0x30C
    ERROR_RANGE = 0x30D
    COMMAND_LINE = 0x30E
    SLIT = 0x30F
    PPTT = 0x310
    DEVICE_TREE = 0x312


class DataType(IntEnum):
    """What the pages of a PAGE_DATA directive become."""

    NORMAL = 0
    SECRETS = 1
    CPUID = 2
    CPUID_XF = 3


FIXED_HEADER = Layout(
    "IgvmFixedHeader",
    24,
    CITE,
    [
        raw("magic", 0, 4),
        uint("version", 4, 4),
        uint("variable_offset", 8, 4),
        uint("variable_size", 12, 4),
        uint("total_size", 16, 4),
        uint("checksum", 20, 4, note="CRC-32 of fixed and variable headers, this field zero"),
    ],
)
VARIABLE_HEADER = Layout("IgvmVariableHeader", 8, CITE, [uint("type", 0, 4), uint("length", 4, 4)])

SUPPORTED_PLATFORM = Layout(
    "IgvmSupportedPlatform",
    16,
    CITE,
    [
        uint("mask", 0, 4),
        uint("highest_vtl", 4, 1),
        uint("platform", 5, 1, enum=Platform),
        uint("version", 6, 2),
        uint("shared_boundary", 8, 8),
    ],
)
GUEST_POLICY = Layout("IgvmGuestPolicy", 16, CITE, [uint("policy", 0, 8), uint("mask", 8, 4)])
PARAMETER_AREA = Layout(
    "IgvmParameterArea", 16, CITE, [uint("size", 0, 8), uint("index", 8, 4), uint("file_offset", 12, 4)]
)
PAGE_DATA = Layout(
    "IgvmPageData",
    24,
    CITE,
    [
        uint("gpa", 0, 8),
        uint("mask", 8, 4),
        uint("file_offset", 12, 4, note="0: a page of zeros"),
        bits("large", 16, 4, 0, note="2 MB"),
        bits("unmeasured", 16, 4, 1),
        bits("shared", 16, 4, 2),
        uint("data_type", 20, 2, enum=DataType),
    ],
)
PARAMETER_INSERT = Layout(
    "IgvmParameterInsert", 16, CITE, [uint("gpa", 0, 8), uint("mask", 8, 4), uint("index", 12, 4)]
)
VP_CONTEXT = Layout(
    "IgvmVpContext", 24, CITE, [uint("gpa", 0, 8), uint("mask", 8, 4), uint("file_offset", 12, 4), uint("vp", 16, 2)]
)
_BODIES = {
    HeaderType.SUPPORTED_PLATFORM: SUPPORTED_PLATFORM,
    HeaderType.GUEST_POLICY: GUEST_POLICY,
    HeaderType.PARAMETER_AREA: PARAMETER_AREA,
    HeaderType.PAGE_DATA: PAGE_DATA,
    HeaderType.PARAMETER_INSERT: PARAMETER_INSERT,
    HeaderType.VP_CONTEXT: VP_CONTEXT,
}
"""The headers whose contents matter to a measurement."""


@dataclass(frozen=True, slots=True, repr=False)
class Igvm:
    """A file with the headers of `_BODIES` decoded, in file order."""

    data: bytes
    headers: tuple[tuple[HeaderType, Record], ...]

    @classmethod
    def parse(cls, data: bytes) -> Igvm:
        """Decode a file; `ImageError` says what is wrong and where."""
        if len(data) < FIXED_HEADER.size:
            raise ImageError(f"{len(data)} bytes are no IGVM file: its fixed header has {FIXED_HEADER.size}")
        fixed = FIXED_HEADER.unpack(data)
        if fixed.magic != MAGIC or fixed.version != VERSION:
            raise ImageError(f"no IGVM file of version {VERSION}: it begins with {fixed.magic!r}, {fixed.version}")
        start, end = fixed.variable_offset, fixed.variable_offset + fixed.variable_size
        if fixed.total_size != len(data):
            raise ImageError(f"the IGVM file has {len(data)} bytes, its header says {fixed.total_size}")
        if start < FIXED_HEADER.size or start % ALIGNMENT or end > len(data):
            raise ImageError(f"the variable headers cannot lie at {start:#x} to {end:#x} of {len(data):#x} bytes")
        checksum = crc32(data[start:end], crc32(bytes(fixed.replace(checksum=0))))
        if checksum != fixed.checksum:
            raise ImageError(f"the headers' checksum is {checksum:#010x}, the file says {fixed.checksum:#010x}")
        return cls(data, tuple(_headers(data[:end], start)))

    def __repr__(self) -> str:
        return f"Igvm({len(self.data):#x} bytes, {len(self.headers)} headers)"

    def bytes_at(self, offset: int, size: int) -> bytes:
        """`size` bytes of the file's data; `ImageError` where the file ends before them."""
        if offset + size > len(self.data):
            raise ImageError(f"{size:#x} bytes at file offset {offset:#x} leave the file")
        return self.data[offset : offset + size]


def _headers(data: bytes, at: int) -> Iterator[tuple[HeaderType, Record]]:
    known = {int(kind) for kind in HeaderType}
    while at < len(data):
        where = f"variable header at {at:#x}"
        if len(data) - at < VARIABLE_HEADER.size:
            raise ImageError(f"the {where} is cut off")
        header = VARIABLE_HEADER.unpack(data, at)
        body = at + VARIABLE_HEADER.size
        if body + header.length > len(data):
            raise ImageError(f"the {where} claims {header.length} bytes, {len(data) - body} are left")
        kind = header.type & ~OPTIONAL
        if kind not in known and not header.type & OPTIONAL:
            raise ImageError(f"the {where} has the unknown type {kind:#x}: it may add pages")
        layout = _BODIES.get(HeaderType(kind)) if kind in known else None
        if layout:
            if header.length != layout.size:
                raise ImageError(f"the {where} has {header.length} bytes, {layout.name} has {layout.size}")
            yield HeaderType(kind), layout.unpack(data, body)
        at = body + -(-header.length // ALIGNMENT) * ALIGNMENT
