"""OVMF-shaped images made at random, from the documents and apart from `snpbook.spec.image`.

Layout of the end of a file: ... metadata ... | entries, each {data, size, GUID} | footer {size, GUID} | 32 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

from hypothesis import strategies as st

FOOTER, RESET = "96b582de-1fb2-45f7-baea-a366c55a082d", "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
METADATA, HASHES = "dc886566-984a-4798-a75e-5585a7bf67cc", "7255371f-3a3b-4b04-927b-1da6efa8d454"
SECRET, SVSM = "4c2eb361-7d9b-4cc3-8081-127c90d3d294", "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"
SEC_MEM, SECRETS, CPUID, CAA, KERNEL = 1, 2, 3, 4, 0x10


def entry(guid: str, data: bytes, size: int | None = None) -> bytes:
    """One table entry; `size` replaces the true one."""
    return data + struct.pack("<H", len(data) + 18 if size is None else size) + UUID(guid).bytes_le


def metadata(
    sections: list[tuple[int, int, int]], signature: bytes = b"ASEV", version: int = 1, size: int | None = None
) -> bytes:
    """The SEV metadata with sections (gpa, size, type); `size` replaces the true one."""
    body = b"".join(struct.pack("<III", *section) for section in sections)
    header = struct.pack("<III", 16 + len(body) if size is None else size, version, len(sections))
    return b"ASEV" + header + body


def image(pages: list[bytes], entries: list[bytes], footer_size: int | None = None) -> bytes:
    """A file of those pages whose end is overwritten with the table."""
    table = b"".join(entries)
    size = len(table) + 18 if footer_size is None else footer_size
    end = table + struct.pack("<H", size) + UUID(FOOTER).bytes_le + bytes(32)
    data = b"".join(pages)
    return data[: -len(end)] + end


def place(data: bytes, body: bytes, offset_from_end: int) -> bytes:
    """Overwrite `data` so that `body` starts that many bytes before the end."""
    start = len(data) - offset_from_end
    return data[:start] + body + data[start + len(body) :]


@dataclass(frozen=True)
class Oddities:
    """What may be wrong with an image; nothing of it in `images(odd=False)`."""

    section_sizes: st.SearchStrategy[int]
    section_types: st.SearchStrategy[int]
    metadata_sizes: st.SearchStrategy[int | None]
    versions: st.SearchStrategy[int]
    footer_sizes: st.SearchStrategy[int | None]
    entry_sizes: st.SearchStrategy[int | None]
    hash_bases: st.SearchStrategy[int]
    eips: st.SearchStrategy[int]


_pages = st.integers(0, 6).map(lambda n: n * 4096)
_types = st.sampled_from([SEC_MEM, SECRETS, CPUID, CAA])
_none: st.SearchStrategy[int | None] = st.none()
WELL_FORMED = Oddities(
    _pages, _types, _none, st.just(1), _none, _none,
    st.integers(0, 0xFFFFF).map(lambda n: n * 0x1000 + 0xC00),
    st.integers(1, 0xFFFFFFFF),
)  # fmt: skip
ODD = Oddities(
    st.one_of(_pages, st.integers(0, 20000)),
    st.one_of(_types, st.just(KERNEL), st.integers(0, 20)),
    st.one_of(_none, st.integers(0, 200)),
    st.sampled_from([1, 1, 1, 0, 2]),
    st.one_of(_none, st.integers(0, 3000)),
    st.one_of(_none, st.integers(0, 200)),
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 1, 0xFFFFFFF0, 0x80B004]),
)


@st.composite
def images(draw: st.DrawFn, *, odd: bool = False) -> bytes:
    """A small image; with `odd`, tables that contradict themselves are likely."""
    kind = ODD if odd else WELL_FORMED
    noise = st.binary(min_size=64, max_size=64).map(lambda block: block * 64)
    fill = st.integers(0, 255).map(lambda byte: bytes([byte]) * 4096)
    pages = draw(st.lists(st.one_of(fill, noise), min_size=1, max_size=5))

    present = st.booleans() if odd else st.just(True)
    gpas = st.integers(0, 0xFFFFF).map(lambda n: n * 4096)
    sections = draw(st.lists(st.tuples(gpas, kind.section_sizes, kind.section_types), max_size=6))
    kernel_hashes = draw(st.booleans())
    if kernel_hashes:
        sections.insert(draw(st.integers(0, len(sections))), (draw(gpas), 4096, KERNEL))
    body = metadata(sections, version=draw(kind.versions), size=draw(kind.metadata_sizes))

    entries = []
    if kernel_hashes or draw(st.booleans()):
        entries.append(entry(HASHES, struct.pack("<II", draw(kind.hash_bases), 0x400)))
    if draw(present):
        entries.append(entry(RESET, struct.pack("<I", draw(kind.eips)), draw(kind.entry_sizes)))
    offset = draw(st.integers(len(body), 4000)) if odd else 2000
    if draw(present):
        entries.append(entry(METADATA, struct.pack("<I", offset)))
    if draw(st.booleans()):
        entries.append(entry(SECRET, draw(st.binary(max_size=20))))
    if odd and entries and draw(st.booleans()):
        entries.append(draw(st.sampled_from(entries)))
    entries = draw(st.permutations(entries))
    data = place(image(pages, entries, draw(kind.footer_sizes)), body, offset)
    return data if not odd or draw(st.booleans()) else data[draw(st.integers(0, 100)) :]
