"""A program of the guest's user: descriptors, its own stretch of memory, and system calls that the kernel answers.

Every pointer in a structure is an address of the process; the kernel copies through it, and only through it. Sources:
Linux fs/ioctl.c, mm/gup.c (access_ok).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Protocol

from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec.process import FIRST_DESCRIPTOR
from snpbook.spec.refusal import Refusal


class SystemCallFailed(Refusal, OSError):
    """A system call in the guest that failed."""

    def __init__(self, number: int, rule: str, expected: object = "", found: object = "") -> None:
        super().__init__(rule, expected, found, "LINUX")
        self.errno = number

    def __str__(self) -> str:
        return f"{errno.errorcode[self.errno or errno.EIO]}: {super().__str__()}"


class Signal(ProgramFailure):
    """The kernel ended a program of the user; the guest goes on."""


class Device(Protocol):
    """What stands behind a device's path."""

    async def ioctl(self, process: Process, number: int, argument: bytearray) -> None:
        """One ioctl; `argument` is the structure, in place. Raises with an errno."""


class Process:
    """A process with the private memory `memory` (guest addresses), whose kernel has `devices` by path."""

    def __init__(self, cpu: GuestCpu, memory: range, devices: Mapping[str, Device]) -> None:
        self._cpu, self._memory, self._devices = cpu, memory, dict(devices)
        self._open: dict[int, Device] = {}

    def open(self, path: str) -> int:
        """A descriptor; ENOENT for a path that is no device."""
        if path not in self._devices:
            raise SystemCallFailed(errno.ENOENT, "the path exists", sorted(self._devices), path)
        number = next(i for i in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + len(self._open) + 1) if i not in self._open)
        self._open[number] = self._devices[path]
        return number

    def close(self, descriptor: int) -> None:
        self._device(descriptor)
        del self._open[descriptor]

    async def ioctl(self, descriptor: int, number: int, argument: bytearray) -> None:
        """An ioctl with a structure; EBADF for no descriptor, else what the device answers."""
        await self._device(descriptor).ioctl(self, number, argument)

    async def load(self, address: int, size: int) -> bytes:
        """Memory of the process, or copy_from_user: EFAULT where it is not its own."""
        self.check(address, size)
        data: bytes = await self._cpu.read(address, size)
        return data

    async def store(self, address: int, data: bytes) -> None:
        """copy_to_user."""
        self.check(address, len(data))
        await self._cpu.write(address, data)

    def check(self, address: int, size: int) -> None:
        """access_ok."""
        if not self._memory.start <= address <= address + size <= self._memory.stop:
            raise SystemCallFailed(errno.EFAULT, "memory of the process", self._memory, f"{address:#x}+{size:#x}")

    def _device(self, descriptor: int) -> Device:
        if descriptor not in self._open:
            raise SystemCallFailed(errno.EBADF, "an open descriptor", sorted(self._open), descriptor)
        return self._open[descriptor]
