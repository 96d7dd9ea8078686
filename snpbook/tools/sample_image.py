"""Makes `sample.fd` and `svsm.bin` in `data/firmware`: small images, so that nothing need be downloaded.

The one has the shape of OVMF, the other that of an SVSM before IGVM: what a launch reads (GUID table, SEV metadata and
more), in the places that the `.toml` beside each names; its code is a HLT loop, and guest programs of the model stand
for the rest. Run `python -m snpbook.tools.sample_image` to write the files again; the same bytes come out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from hashlib import shake_256
from typing import Any
from uuid import UUID

from snpbook.spec import guid
from snpbook.spec.image import (
    FOOTER_GAP,
    METADATA_HEADER,
    METADATA_SECTION,
    SIGNATURE,
    TABLE_ENTRY,
    Section,
    SectionType,
)
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.resources import resource

PAGES, SVSM_PAGES = 16, 8
RESET_CODE = b"\xf4\xeb\xfd"
"""HLT; JMP to it."""


def build() -> bytes:
    """The firmware: filler pages, some of them uniform as in real firmware, and the tables at the end."""
    places = _places("sample.toml")
    entries = {
        guid.HASH_TABLE_AREA: _u32(*places["hash_area"]),
        guid.SECRET_AREA: _u32(*places["secret_area"]),
        guid.SEV_ES_RESET_BLOCK: _u32(places["ap_reset_eip"]),
    }
    image = bytearray(_assembled("firmware", PAGES, places, entries))
    reset = len(image) - 16
    image[reset:] = RESET_CODE.ljust(16, b"\x90")
    return bytes(image)


def build_svsm() -> bytes:
    """The SVSM: the same, with the place where its processors start."""
    places = _places("svsm.toml")
    image = bytearray(_assembled("SVSM", SVSM_PAGES, places, {guid.SVSM_INFO: _u32(places["entry"])}))
    start = places["entry"]
    image[start : start + len(RESET_CODE)] = RESET_CODE
    return bytes(image)


def _places(name: str) -> dict[str, Any]:
    return tomllib.loads(resource("data", "firmware", name).read_text())


def _assembled(what: str, pages: int, places: Mapping[str, Any], entries: dict[UUID, bytes]) -> bytes:
    """Filler pages, the SEV metadata at the last page's start, the GUID table at its end."""
    sections = [Section(SectionType[s["type"]], s["gpa"], s["size"]) for s in places["section"]]
    image = bytearray()
    for page in range(pages):
        kind = page % 4
        text = f"snpbook sample {what}, page {page}\n".encode()
        filler = {0: text * PAGE_SIZE, 1: b"\xff" * PAGE_SIZE, 2: bytes(PAGE_SIZE)}.get(kind)
        image += (filler or shake_256(text).digest(PAGE_SIZE))[:PAGE_SIZE]
    metadata = METADATA_HEADER.pack(
        signature=SIGNATURE,
        size=METADATA_HEADER.size + len(sections) * METADATA_SECTION.size,
        version=1,
        count=len(sections),
    )
    metadata += b"".join(METADATA_SECTION.pack(gpa=s.gpa, size=s.size, type=s.type) for s in sections)
    start = len(image) - PAGE_SIZE
    image[start : start + len(metadata)] = metadata
    table = _table({guid.SEV_METADATA: _u32(len(image) - start), **entries})
    end = len(image) - FOOTER_GAP
    image[end - len(table) : end] = table
    return bytes(image)


def _table(entries: dict[UUID, bytes]) -> bytes:
    """The GUID table, read backwards: data, size, GUID for each entry, the footer last."""
    body = b"".join(
        data + TABLE_ENTRY.pack(size=len(data) + TABLE_ENTRY.size, guid=g.bytes_le) for g, data in entries.items()
    )
    return body + TABLE_ENTRY.pack(size=len(body) + TABLE_ENTRY.size, guid=guid.OVMF_FOOTER.bytes_le)


def _u32(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


if __name__ == "__main__":
    for name, content in (("sample.fd", build()), ("svsm.bin", build_svsm())):
        (resource("data", "firmware") / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes")
