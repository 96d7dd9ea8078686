"""DBG_DECRYPT and DBG_ENCRYPT: the host reads and writes the memory of a guest whose policy lets it.

The firmware moves multiples of 16 bytes between addresses of that alignment; what does not fit goes through pages of
the kernel. Page by page, as in Linux: both sides of each are pinned for it. Source: Linux arch/x86/kvm/svm/sev.c
(sev_dbg_crypt); that goes beyond what the spec tables say, and is unconfirmed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.kvm.legacy_launch import pinned, sev_guest
from snpbook.host.refusal import check
from snpbook.spec.commands import Command
from snpbook.spec.legacy_launch import PACKET_ALIGNMENT
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm


def decrypt(vm: Vm, call: SevCall) -> None:
    """From the guest's memory at `src_uaddr` in the clear to `dst_uaddr`. EINVAL for no range, ENOMEM, EIO."""
    _debug(vm, call, decrypting=True)


def encrypt(vm: Vm, call: SevCall) -> None:
    """From `src_uaddr` in the clear into the guest's memory at `dst_uaddr`. EINVAL for no range, ENOMEM, EIO."""
    _debug(vm, call, decrypting=False)


def _debug(vm: Vm, call: SevCall, *, decrypting: bool) -> None:
    sev_guest(vm)
    wanted = call.payload()
    source, target, left = wanted.src_uaddr, wanted.dst_uaddr, wanted.len
    good = 0 < left < (1 << 64) - source and target
    check(
        bool(good), errno.EINVAL, "ranges of user memory", "at least a byte", f"{left} from {source:#x} to {target:#x}"
    )
    while left:
        size = min(PAGE_SIZE - source % PAGE_SIZE, PAGE_SIZE - target % PAGE_SIZE, left)
        with pinned(vm, source, size, write=False) as here, pinned(vm, target, size) as there:
            src, dst = _spa(int(here[0]), source), _spa(int(there[0]), target)
            if decrypting:
                _decrypt(vm, call, src, target, dst, size)
            else:
                _encrypt(vm, call, source, src, dst, size)
        source, target, left = source + size, target + size, left - size


def _decrypt(vm: Vm, call: SevCall, src: int, target: int, dst: int, size: int) -> None:
    if not (src | dst | size) % PACKET_ALIGNMENT:
        _issue(vm, call, Command.DBG_DECRYPT, src, dst, size)
        return
    call.process.space.copy_out(target, _read(vm, call, src, size))


def _encrypt(vm: Vm, call: SevCall, source: int, src: int, dst: int, size: int) -> None:
    """What does not fit is read, changed and written back as a whole."""
    if not (src | dst | size) % PACKET_ALIGNMENT:
        _issue(vm, call, Command.DBG_ENCRYPT, src, dst, size)
        return
    first, whole = _whole(dst, size)
    data = bytearray(_read(vm, call, first, whole))
    data[dst - first : dst - first + size] = call.process.space.copy_in(source, size)
    with call.room(whole) as paddr:
        vm.kernel.cpu.write(paddr, bytes(data))
        _issue(vm, call, Command.DBG_ENCRYPT, paddr, first, whole)


def _read(vm: Vm, call: SevCall, src: int, size: int) -> bytes:
    """Decrypted bytes at any address, through a page of the kernel."""
    first, whole = _whole(src, size)
    with call.room(whole) as paddr:
        _issue(vm, call, Command.DBG_DECRYPT, first, paddr, whole)
        return vm.kernel.cpu.read(paddr + src - first, size)


def _issue(vm: Vm, call: SevCall, command: Command, src: int, dst: int, size: int) -> None:
    guest = sev_guest(vm)
    call.issue(guest.fd, command, handle=guest.handle, src_paddr=src, dst_paddr=dst, len=size)


def _spa(frame: int, address: int) -> int:
    return (frame << PAGE_SHIFT) + address % PAGE_SIZE


def _whole(spa: int, size: int) -> tuple[int, int]:
    """The smallest aligned range around one: first address and size."""
    first = spa - spa % PACKET_ALIGNMENT
    return first, -(-(spa + size - first) // PACKET_ALIGNMENT) * PACKET_ALIGNMENT
