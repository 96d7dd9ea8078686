"""Firmware images: tables decoded as they lie, and every damage answered by an `ImageError`, never by anything else."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.spec import guid
from snpbook.spec.image import METADATA_HEADER, METADATA_SECTION, TABLE_ENTRY, Image, ImageError, SectionType
from snpbook.spec.resources import resource

SAMPLE = resource("data", "firmware", "sample.fd").read_bytes()
OVMF = [path for path in (Path("/usr/share/ovmf/OVMF.fd"), Path("/usr/share/OVMF/OVMF_CODE_4M.fd")) if path.exists()]
METADATA_AT = len(SAMPLE) - int.from_bytes(Image.parse(SAMPLE).table[guid.SEV_METADATA][:4], "little")
TABLE_FROM = 512
"""The sample's tables lie in its last bytes."""


def use(data: bytes) -> None:
    """Everything that a reader may ask of an image."""
    image = Image.parse(data)
    assert repr(image).startswith("Image(")
    questions: list[Callable[[], Any]] = [
        lambda: image.gpa,
        lambda: image.sections,
        lambda: image.ap_reset_eip,
        lambda: image.hash_table_base,
        lambda: [image.sections_of(kind) for kind in SectionType],
    ]
    for question in questions:
        with suppress(ImageError):
            question()


def only_image_errors(data: bytes) -> None:
    """Nothing else may come out: no IndexError of a table that leads out of the file, no ValueError of a number."""
    with suppress(ImageError):
        use(data)


def test_the_sample() -> None:
    image = Image.parse(SAMPLE)
    assert image.gpa == 2**32 - len(SAMPLE)
    assert image.bsp_reset_eip == 0xFFFFFFF0
    assert [section.type for section in image.sections] == [SectionType(record.type) for record in image.metadata]
    assert len(image.sections_of(SectionType.SECRETS)) == len(image.sections_of(SectionType.CPUID)) == 1
    assert image.ap_reset_eip == int.from_bytes(image.table[guid.SEV_ES_RESET_BLOCK][:4], "little")


@pytest.mark.skipif(not OVMF, reason="no OVMF is installed")
@pytest.mark.parametrize("path", OVMF, ids=lambda path: path.name)
def test_real_images(path: Path) -> None:
    use(path.read_bytes())
    assert guid.SEV_ES_RESET_BLOCK in Image.parse(path.read_bytes()).table


@given(places=st.dictionaries(st.integers(1, TABLE_FROM), st.integers(0, 255), max_size=8))
def test_changed_bytes_in_the_guid_table(places: dict[int, int]) -> None:
    data = bytearray(SAMPLE)
    for place, value in places.items():
        data[-place] = value
    only_image_errors(bytes(data))


@given(
    places=st.dictionaries(st.integers(-16, 160), st.sampled_from([0, 1, 2, 0x7F, 0xFF]), max_size=8),
    offset=st.one_of(st.none(), st.integers(0, 2**32 - 1), st.integers(0, 40)),
)
def test_changed_bytes_in_the_metadata(places: dict[int, int], offset: int | None) -> None:
    data = bytearray(SAMPLE)
    for place, value in places.items():
        data[METADATA_AT + place] = value
    if offset is not None:
        entry = data.rindex(guid.SEV_METADATA.bytes_le)
        data[entry - 6 : entry - 2] = offset.to_bytes(4, "little")
    only_image_errors(bytes(data))


@given(size=st.one_of(st.integers(0, 600), st.integers(0, len(SAMPLE))))
def test_the_end_of_an_image(size: int) -> None:
    only_image_errors(SAMPLE[len(SAMPLE) - size :])


@given(data=st.binary(max_size=300))
def test_anything(data: bytes) -> None:
    only_image_errors(data)
    footer = TABLE_ENTRY.pack(size=len(data) % 200, guid=guid.OVMF_FOOTER.bytes_le)
    only_image_errors(data + footer + bytes(32))


def entry(identifier: Any, content: bytes, size: int | None = None) -> bytes:
    size = len(content) + TABLE_ENTRY.size if size is None else size
    return content + TABLE_ENTRY.pack(size=size, guid=identifier.bytes_le)


def build(*entries: bytes, footer_size: int | None = None, before: bytes = b"") -> bytes:
    """An image of one page with a GUID table of these entries."""
    body = b"".join(entries)
    size = len(body) + TABLE_ENTRY.size if footer_size is None else footer_size
    tail = before + body + TABLE_ENTRY.pack(size=size, guid=guid.OVMF_FOOTER.bytes_le) + bytes(32)
    return tail.rjust(4096, b"\0")


def metadata(
    count: int = 1, size: int | None = None, signature: bytes = b"ASEV", version: int = 1, kind: int = 1
) -> bytes:
    body = METADATA_SECTION.pack(gpa=0x800000, size=0x1000, type=kind) * 1
    full = METADATA_HEADER.size + count * METADATA_SECTION.size
    header = METADATA_HEADER.pack(
        signature=signature, size=full if size is None else size, version=version, count=count
    )
    tables = entry(guid.SEV_METADATA, (len(header + body) + 22 + TABLE_ENTRY.size + 32).to_bytes(4, "little"))
    return build(tables, before=header + body)


DAMAGES: dict[str, tuple[bytes, str]] = {
    "too short": (bytes(49), "49 bytes are no firmware image: even its table's footer does not fit"),
    "footer too large": (build(footer_size=5000), "the GUID table's entry at file offset 0xfbc has size 0"),
    "entry too small": (build(entry(guid.SECRET_AREA, b"", 5)), "entry at file offset 0xfbc has size 5"),
    "metadata outside": (
        build(entry(guid.SEV_METADATA, (5000).to_bytes(4, "little"))),
        r"the SEV metadata offset 0x1388 \(from the end\) lies outside the file",
    ),
    "wrong signature": (metadata(signature=b"ASEX"), "has signature b'ASEX', version 1"),
    "wrong version": (metadata(version=2), "has signature b'ASEV', version 2"),
    "too many sections": (metadata(count=1, size=16), "has 1 sections, but 16 bytes"),
    "sections beyond the end": (metadata(count=400), "has 400 sections"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tables_are_named(name: str) -> None:
    data, text = DAMAGES[name]
    with pytest.raises(ImageError, match=text):
        Image.parse(data)


def test_what_only_some_uses_need() -> None:
    image = Image.parse(metadata(kind=99))
    with pytest.raises(ImageError, match="SEV metadata section 0 has the unknown type 0x63"):
        _ = image.sections
    with pytest.raises(ImageError, match="no SEV-ES reset block"):
        _ = image.ap_reset_eip
    with pytest.raises(ImageError, match="97 bytes are no firmware image: its size is a multiple of 4096"):
        _ = Image.parse(bytes(97)).gpa
    empty = Image.parse(bytes(4096))
    assert (empty.table, empty.metadata, empty.hash_table_base) == ({}, (), 0)
