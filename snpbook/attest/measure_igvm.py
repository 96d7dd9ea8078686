"""The launch that an IGVM file describes for SEV-SNP: its directives, in file order.

Source: igvm_defs of Microsoft's IGVM specification, and how loaders measure it: data in the file as NORMAL pages (a
page without data as one of zeros), parameters of the host UNMEASURED, shared pages not at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from snpbook.attest.measure import vmsa_run
from snpbook.attest.measure_chain import Run
from snpbook.spec.igvm import GPA_LIMIT, DataType, HeaderType, Igvm, Platform
from snpbook.spec.image import FOUR_GIB, ImageError
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE, LaunchPage

_TYPES = {
    DataType.NORMAL: LaunchPage.NORMAL,
    DataType.SECRETS: LaunchPage.SECRETS,
    DataType.CPUID: LaunchPage.CPUID,
    DataType.CPUID_XF: LaunchPage.CPUID,
}


def igvm_runs(data: bytes) -> list[Run]:
    """What the launch of an IGVM file adds to an SEV-SNP guest; `ImageError` where it cannot be launched so.

    Alone the file decides: vCPUs, their number and state, and the order of pages.
    """
    igvm = Igvm.parse(data)
    mask = 0
    for kind, header in igvm.headers:
        if kind is HeaderType.SUPPORTED_PLATFORM and header.platform is Platform.SEV_SNP:
            mask |= header.mask
    if not mask:
        raise ImageError("the IGVM file is not made for SEV-SNP")
    return list(_directives(igvm, mask))


def _directives(igvm: Igvm, mask: int) -> Iterator[Run]:
    areas: dict[int, int] = {}
    for kind, header in igvm.headers:
        match kind:
            case HeaderType.PARAMETER_AREA:
                if header.index in areas:
                    raise ImageError(f"parameter area {header.index} is declared twice")
                areas[header.index] = header.size
            case HeaderType.PARAMETER_INSERT if header.mask & mask:
                if header.index not in areas:
                    raise ImageError(f"parameter area {header.index} is inserted before it is declared")
                size = areas[header.index]
                _check_place(header.gpa, size, PAGE_SIZE)
                yield Run(f"parameter area {header.index}", LaunchPage.UNMEASURED, header.gpa, blank=size)
            case HeaderType.PAGE_DATA if header.mask & mask and not header.shared:
                yield _page_data(igvm, header)
            case HeaderType.VP_CONTEXT if header.mask & mask:
                _check_place(header.gpa, PAGE_SIZE, PAGE_SIZE)
                yield vmsa_run(header.vp, igvm.bytes_at(header.file_offset, PAGE_SIZE), header.gpa)


def _page_data(igvm: Igvm, header: Record) -> Run:
    size = LARGE_PAGE_SIZE if header.large else PAGE_SIZE
    _check_place(header.gpa, size, size)
    if header.data_type not in _TYPES:
        raise ImageError(f"the page data for {header.gpa:#x} have the unknown type {header.data_type}")
    kind, name = _TYPES[header.data_type], f"{header.data_type.name} data"
    if header.unmeasured and kind is LaunchPage.NORMAL:
        kind = LaunchPage.UNMEASURED
    if kind is not LaunchPage.NORMAL:
        return Run(name, kind, header.gpa, blank=size)
    data = igvm.bytes_at(header.file_offset, size) if header.file_offset else bytes(size)
    return Run(name, kind, header.gpa, data)


def _check_place(gpa: int, size: int, alignment: int) -> None:
    if gpa % alignment or size % alignment or size > FOUR_GIB or gpa + size > GPA_LIMIT:
        raise ImageError(f"{size:#x} bytes at guest address {gpa:#x} are no pages of {alignment:#x} in guest memory")
