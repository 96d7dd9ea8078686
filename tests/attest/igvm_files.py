"""IGVM files written by hand, from the format's description and apart from `snpbook.spec.igvm`."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

MASK = 0x1
NORMAL, SECRETS, CPUID, CPUID_XF = range(4)


@dataclass
class Writer:
    """Headers and data of one file; data offsets are known only once all headers are, hence `finish`."""

    headers: list[tuple[int, str, list[object]]] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)

    def header(self, kind: int, form: str, *values: object) -> Writer:
        """One variable header; a value of bytes stands for its place among the file's data."""
        self.headers.append((kind, form, list(values)))
        return self

    def platform(self, platform: int = 2, mask: int = MASK) -> Writer:
        return self.header(1, "<IBBHQ", mask, 0, platform, 1, 0)

    def page(self, gpa: int, data: bytes | int = 0, kind: int = NORMAL, flags: int = 0, mask: int = MASK) -> Writer:
        return self.header(0x302, "<QIIIHH", gpa, mask, data, flags, kind, 0)

    def area(self, size: int, index: int) -> Writer:
        return self.header(0x301, "<QII", size, index, 0)

    def insert(self, gpa: int, index: int, mask: int = MASK) -> Writer:
        return self.header(0x303, "<QII", gpa, mask, index)

    def vmsa(self, gpa: int, page: bytes, vcpu: int = 0, mask: int = MASK) -> Writer:
        return self.header(0x304, "<QIIHHI", gpa, mask, page, vcpu, 0, 0)

    def finish(self, *, version: int = 1, checksum: int | None = None, total: int | None = None) -> bytes:
        """The file; keyword arguments replace what would be right."""
        size = sum(8 + -(-struct.calcsize(form) // 8) * 8 for _, form, _ in self.headers)
        data, variable = b"", b""
        for kind, form, values in self.headers:
            placed = []
            for value in values:
                if isinstance(value, bytes):
                    placed.append(24 + size + len(data))
                    data += value
                else:
                    placed.append(value)
            body = struct.pack(form, *placed)
            variable += struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)
        whole = 24 + size + len(data) if total is None else total
        fixed = struct.pack("<4sIIIII", b"IGVM", version, 24, size, whole, 0)
        right = zlib.crc32(fixed + variable)
        return fixed[:20] + struct.pack("<I", right if checksum is None else checksum) + variable + data
