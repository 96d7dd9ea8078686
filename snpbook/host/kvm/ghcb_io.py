"""Accesses whose data lie in the scratch area: MMIO, and strings to and from ports.

What a device moves goes to the VMM piece by piece: at most a page of port data, at most 8 bytes of MMIO. Sources: GHCB
specification; Linux arch/x86/kvm/x86.c (kvm_sev_es_mmio_read, _write, kvm_sev_es_string_io), arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from snpbook.host.kvm.exchange import Exchange
from snpbook.host.kvm.instructions import port_exit
from snpbook.host.refusal import check
from snpbook.host.steps import Step, Steps
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import GhcbError, Nae
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_kvm_structs import EXIT_MMIO

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

SIZES = (1, 2, 4)
"""Bytes of one port access."""
_INT_MAX = (1 << 31) - 1


def string(exchange: Exchange, port: int, size: int, *, is_in: bool) -> bool:
    """INS and OUTS: SW_EXITINFO2 counts the elements. EINVAL for more than an `int` counts."""
    count = exchange.info_2
    check(count * size <= _INT_MAX, errno.EINVAL, "the length of a string access", f"up to {_INT_MAX:#x}", count)
    area = exchange.scratch(count * size)
    return area is not None and _string_piece(exchange.vcpu, area, port, size, count, is_in=is_in)


def _string_piece(vcpu: Vcpu, area: int, port: int, size: int, count: int, *, is_in: bool) -> bool:
    """Ask the VMM for as much as fits the page of port data; False where nothing is left."""
    if not count:
        return False
    piece = min(count, PAGE_SIZE // size)
    port_exit(vcpu, port, size, piece, None if is_in else vcpu.vm.read(area, piece * size))
    vcpu.completion = partial(_string_done, area, port, size, count, is_in)
    return True


def _string_done(area: int, port: int, size: int, count: int, is_in: bool, vcpu: Vcpu) -> Steps[bool]:
    yield Step("string access")
    piece = min(count, PAGE_SIZE // size)
    if is_in:
        vcpu.vm.write(area, vcpu.port_data(piece * size))
    return _string_piece(vcpu, area + piece * size, port, size, count - piece, is_in=is_in)


def mmio(exchange: Exchange) -> bool:
    """A read or a write of SW_EXITINFO2 bytes at the guest address SW_EXITINFO1; nothing for length 0."""
    gpa, size, sev = exchange.info_1, exchange.info_2, exchange.vcpu.vm.sev
    assert sev is not None
    if not size:
        return False
    if size > spec.MMIO_LIMIT and sev.ghcb_version >= spec.PROTOCOL_VERSION:
        exchange.refuse(GhcbError.INVALID_INPUT)
        return False
    area = exchange.scratch(size)
    return area is not None and _mmio_piece(exchange.vcpu, area, gpa, size, is_write=exchange.event == Nae.MMIO_WRITE)


def _mmio_piece(vcpu: Vcpu, area: int, gpa: int, size: int, *, is_write: bool) -> bool:
    if not size:
        return False
    piece = min(size, spec.MMIO_LIMIT)
    data = vcpu.vm.read(area, piece) if is_write else b""
    vcpu.leave(
        Exit.MMIO, EXIT_MMIO, phys_addr=gpa, data=data.ljust(spec.MMIO_LIMIT, b"\0"), len=piece, is_write=int(is_write)
    )
    vcpu.completion = partial(_mmio_done, area, gpa, size, is_write)
    return True


def _mmio_done(area: int, gpa: int, size: int, is_write: bool, vcpu: Vcpu) -> Steps[bool]:
    yield Step("MMIO")
    piece = min(size, spec.MMIO_LIMIT)
    if not is_write:
        vcpu.vm.write(area, vcpu.answer(EXIT_MMIO).data[:piece])
    return _mmio_piece(vcpu, area + piece, gpa + piece, size - piece, is_write=is_write)
