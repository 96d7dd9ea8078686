"""One KVM_MEMORY_ENCRYPT_OP under way: its structure, what the firmware answers, and the blobs that it copies.

Sources: Linux arch/x86/kvm/svm/sev.c (sev_mem_enc_ioctl, sev_issue_cmd), drivers/crypto/ccp/sev-dev.c
(psp_copy_user_blob, sev_issue_cmd_external_user).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snpbook.host.ccp.device import SevDevice
from snpbook.host.ccp.mailbox import CommandRefused, answered
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_psp import BLOB_LIMIT
from snpbook.spec.uapi_sev import SevOp

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel


@dataclass(slots=True)
class SevCall:
    """The sub-command `op` with the structure at `data`, and a descriptor of /dev/sev; `error` goes back."""

    process: Process
    op: SevOp
    data: int
    fd: int
    error: int

    @property
    def kernel(self) -> Kernel:
        return self.process.kernel

    # The caller's memory.

    def payload(self) -> Record:
        """The sub-command's structure, copied from the process. EFAULT."""
        layout = self.kernel.era.payloads[self.op]
        return layout.unpack(self.process.space.copy_in(self.data, layout.size))

    def store(self, payload: Record) -> None:
        """Copy the structure back. EFAULT."""
        self.process.space.copy_out(self.data, bytes(payload))

    def user_blob(self, address: int, size: int) -> bytes:
        """A blob in the caller's memory. EINVAL for none, or for more than 16 KiB; EFAULT."""
        good = bool(address) and 0 < size <= BLOB_LIMIT
        check(good, errno.EINVAL, "a blob in user memory", f"1 to {BLOB_LIMIT} bytes", f"{size} at {address:#x}")
        return self.process.space.copy_in(address, size)

    @contextmanager
    def copied(self, address: int, size: int) -> Iterator[int]:
        """A blob of the caller's in pages of the kernel: their system address."""
        data = self.user_blob(address, size)
        with self.room(size) as paddr:
            self.kernel.cpu.write(paddr, data)
            yield paddr

    @contextmanager
    def room(self, size: int) -> Iterator[int]:
        """Zeroed pages of the kernel: their system address. ENOMEM."""
        memory = self.kernel.memory
        pages = memory.allocate(-(-size // PAGE_SIZE))
        try:
            self.kernel.cpu.zero(pages.start << PAGE_SHIFT, len(pages) << PAGE_SHIFT)
            yield pages.start << PAGE_SHIFT
        finally:
            memory.release(pages)

    # The firmware.

    def check_fd(self, fd: int) -> None:
        """Firmware commands go through an open /dev/sev. EBADF."""
        file = self.process.file(fd)
        check(isinstance(file, SevDevice), errno.EBADF, "sev_fd is an open /dev/sev", SevDevice.device, file.device)

    @contextmanager
    def told(self) -> Iterator[None]:
        """What the firmware answers inside is told in `error`; where it was not asked, nothing is."""
        try:
            yield
        except KernelError as error:
            status = answered(error)
            if status is not None:
                self.error = int(status)
            raise
        self.error = 0

    def issue(self, fd: int, command: Command, **fields: Any) -> Record:
        """Issue a command through a descriptor of /dev/sev: its buffer as the firmware left it. EBADF, EIO."""
        self.check_fd(fd)
        with self.told():
            return self.kernel.ccp.command(command, **fields)

    def attempt(self, fd: int, command: Command, **fields: Any) -> tuple[Record, KernelError | None]:
        """Issue a command whose buffer counts also where it is refused, as for the length that it would need."""
        try:
            return self.issue(fd, command, **fields), None
        except CommandRefused as error:
            layout = BUFFERS[command]
            assert layout is not None, command
            return layout.unpack(error.buffer), error
