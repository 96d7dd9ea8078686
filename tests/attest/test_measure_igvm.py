"""IGVM files: the launch they describe, page by page, and files that describe none."""

from contextlib import suppress
from hashlib import sha384

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.measure import snp_digest, snp_runs, vmsa_pages
from snpbook.attest.measure_chain import launch_digest
from snpbook.attest.measure_igvm import igvm_runs
from snpbook.spec.image import Image, ImageError
from snpbook.spec.pages import LaunchPage
from tests.attest import ovmf_images as ovmf
from tests.attest.igvm_files import CPUID, CPUID_XF, NORMAL, SECRETS, Writer

PAGE, LARGE = b"a page.." * 512, b"2 megabytes....." * (1 << 17)
VMSA_GPA = 0xFFFFFFFFF000


def digest_of(steps: list[tuple[int, int, bytes]]) -> bytes:
    """The chain over (type, gpa, contents), spelled out."""
    digest = bytes(48)
    for kind, gpa, contents in steps:
        tail = bytes([0x70, 0, kind, 0, 0, 0, 0, 0]) + gpa.to_bytes(8, "little")
        digest = sha384(digest + (sha384(contents).digest() if contents else bytes(48)) + tail).digest()
    return digest


def test_directives_are_measured_in_file_order() -> None:
    writer = Writer().platform().header(0x101, "<QII", 0x30000, 1, 0).area(0x2000, 7)
    writer.page(0x5000, PAGE).page(0x4000).page(0x6000, b"\1" * 4096, flags=2)
    writer.page(0x7000, kind=SECRETS).page(0x8000, PAGE, CPUID).page(0x9000, PAGE, CPUID_XF)
    writer.insert(0xA000, 7).vmsa(VMSA_GPA, PAGE, 1)
    zeroed = PAGE[:0x2F0] + bytes(16) + PAGE[0x300:]
    expected = [(1, 0x5000, PAGE), (1, 0x4000, bytes(4096)), (4, 0x6000, b""), (5, 0x7000, b""), (6, 0x8000, b"")]
    expected += [(6, 0x9000, b""), (4, 0xA000, b""), (4, 0xB000, b""), (2, VMSA_GPA, zeroed)]
    assert launch_digest(igvm_runs(writer.finish())) == digest_of(expected)


def test_a_large_page_is_512_pages() -> None:
    writer = Writer().platform().page(0x200000, LARGE, flags=1).page(0x400000, flags=1)
    data = LARGE + bytes(2 << 20)
    steps = [(1, 0x200000 + at, data[at : at + 4096]) for at in range(0, len(data), 4096)]
    assert launch_digest(igvm_runs(writer.finish())) == digest_of(steps)


def test_shared_pages_and_other_platforms_do_not_count() -> None:
    writer = Writer().platform(0, 2).platform(2, 4).page(0x1000, PAGE, mask=2).page(0x2000, PAGE, flags=4, mask=4)
    writer.area(0x1000, 0).insert(0x3000, 0, mask=2).vmsa(VMSA_GPA, PAGE, mask=2)
    writer.header(0x80000399, "<BBB", 1, 2, 3)  # the next header starts at a multiple of eight
    for parameter in (0x305, 0x307, 0x309, 0x30B, 0x30C, 0x30E, 0x80000399):
        writer.header(parameter, "<Q", 0)
    assert igvm_runs(writer.finish()) == []
    assert len(igvm_runs(writer.page(0x1000, mask=6).finish())) == 1


def test_the_same_launch_has_the_same_digest_in_either_form() -> None:
    """An IGVM file written from an OVMF image measures what the image does."""
    sections = [(0x800000, 0x2000, ovmf.SEC_MEM), (0x80D000, 0x1000, ovmf.SECRETS), (0x80E000, 0x1000, ovmf.CPUID)]
    entries = [ovmf.entry(ovmf.RESET, b"\4\xb0\x80\0"), ovmf.entry(ovmf.METADATA, (2000).to_bytes(4, "little"))]
    image = Image.parse(ovmf.place(ovmf.image([PAGE, bytes(4096)], entries), ovmf.metadata(sections), 2000))
    vmsas = vmsa_pages(image, 3, 0x800F12)
    writer = Writer().platform()
    for run in snp_runs(image, vmsas):
        if run.type is LaunchPage.ZERO:
            continue  # IGVM knows no ZERO pages
        kind = {LaunchPage.NORMAL: NORMAL, LaunchPage.SECRETS: SECRETS, LaunchPage.CPUID: CPUID}.get(run.type)
        for offset in range(0, len(run.data) or run.blank, 4096):
            if kind is None:
                writer.vmsa(run.gpa, run.data)
            else:
                writer.page(run.gpa + offset, run.data[offset : offset + 4096] or 0, kind)
    bare = Image(image.data, image.table, image.metadata[1:])
    assert launch_digest(igvm_runs(writer.finish())) == snp_digest(bare, vmsas)


GOOD = Writer().platform().page(0x1000, PAGE)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "fixed header"),
        (GOOD.finish()[:23], "fixed header"),
        (b"IGVN" + GOOD.finish()[4:], "no IGVM file of version 1"),
        (GOOD.finish(version=2), "no IGVM file of version 1"),
        (GOOD.finish(checksum=1), "checksum"),
        (GOOD.finish()[:-1], "its header says"),
        (GOOD.finish(total=100), "its header says"),
        (Writer().page(0x1000).finish(), "not made for SEV-SNP"),
        (Writer().platform(3).page(0x1000).finish(), "not made for SEV-SNP"),
        (Writer().platform().page(0x1001).finish(), "no pages"),
        (Writer().platform().page(0x1000, flags=1).finish(), "no pages"),
        (Writer().platform().page((1 << 64) - 4096).finish(), "no pages"),
        (Writer().platform().page(0x1000, 0x7FFFFFFF).finish(), "leave the file"),
        (Writer().platform().page(0x1000, kind=9).finish(), "unknown type 9"),
        (Writer().platform().vmsa(0x1000, PAGE[:-1]).finish(), "leave the file"),
        (Writer().platform().insert(0x1000, 3).finish(), "before it is declared"),
        (Writer().platform().area(0x1000, 3).area(0x1000, 3).finish(), "declared twice"),
        (Writer().platform().area(0x1001, 3).insert(0x1000, 3).finish(), "no pages"),
        (Writer().platform().area(1 << 60, 3).insert(0x1000, 3).finish(), "no pages"),
        (Writer().platform().header(0x399, "<Q", 0).finish(), "unknown type 0x399"),
        (Writer().platform().header(0x302, "<Q", 0).finish(), "has 8 bytes"),
    ],
)
def test_files_that_cannot_be_measured(data: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        igvm_runs(data)


@given(st.data())
def test_no_damage_goes_unnoticed_in_the_headers(data: st.DataObject) -> None:
    whole = bytearray(GOOD.finish())
    at = data.draw(st.integers(0, len(whole) - len(PAGE) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ImageError):
        igvm_runs(bytes(whole))


@given(st.data())
def test_no_headers_raise_anything_but_the_parsers_own_error(data: st.DataObject) -> None:
    """Random fields in headers of the right form, the checksum right."""
    writer = Writer().platform()
    u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
    some = st.one_of(st.integers(0, 8).map(lambda n: n * 4096), u64)
    for _ in range(data.draw(st.integers(0, 6))):
        match data.draw(st.integers(0, 4)):
            case 0:
                flags, offset = (
                    data.draw(st.integers(0, 7)),
                    data.draw(st.one_of(st.just(0), st.integers(0, 5000), u32)),
                )
                writer.page(data.draw(some), offset, data.draw(st.integers(0, 5)), flags)
            case 1:
                writer.area(data.draw(some), data.draw(st.integers(0, 2)))
            case 2:
                writer.insert(data.draw(some), data.draw(st.integers(0, 2)))
            case 3:
                writer.vmsa(data.draw(some), data.draw(st.sampled_from([PAGE, PAGE[:8]])), data.draw(u16))
            case 4:
                writer.header(data.draw(u32), "<QQ", data.draw(u64), data.draw(u64))
    with suppress(ImageError):
        launch_digest(igvm_runs(writer.finish()))
