"""A process: descriptors, capabilities, limits and an address space, and the system calls on them.

This is the surface of the kernel: everything that user space does to /dev/sev, /dev/kvm and their files goes through
here, with the errno of Linux in a `KernelError`. Each call has a form that can be cut into (`calling`) and one that
runs to its end. Sources: Linux fs/, mm/; man-pages 2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from itertools import count
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from snpbook.host import page_fault
from snpbook.host.address_space import AddressSpace
from snpbook.host.files import Argument, File, Stat
from snpbook.host.huge_pages import HugeAnonymousMemory
from snpbook.host.memory import PageFile
from snpbook.host.memory_files import MemoryFile, RestrictedMemory
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Steps, finish
from snpbook.spec.eras import PrivateFile
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import (
    FIRST_DESCRIPTOR,
    MEMLOCK_LIMIT,
    USER_BASE,
    USER_END,
    Advice,
    Capability,
    MapFlags,
    MemfdFlags,
    Protection,
)
from snpbook.trace import Ioctl, SystemCall

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel

_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class Process:
    """One process of the host. `memlock` is RLIMIT_MEMLOCK in bytes; root may open everything."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        root: bool = True,
        capabilities: Iterable[Capability] = (),
        memlock: int = MEMLOCK_LIMIT,
    ) -> None:
        self.kernel, self.root, self.memlock = kernel, root, memlock
        self.capabilities = frozenset(capabilities) | (frozenset(Capability) if root else frozenset())
        self.space = AddressSpace(kernel.cpu)
        self.locked = 0
        """Bytes that count against RLIMIT_MEMLOCK."""
        self._files: dict[int, File] = {}

    def __repr__(self) -> str:
        return f"Process({len(self._files)} descriptors, {self.space!r})"

    # Descriptors.

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        """open(2) of a device: ENOENT where the kernel has none by that name, EACCES without the right."""
        with self._told("open", path=path, flags=flags):
            maker = self.kernel.devices.get(path)
            if maker is None:
                raise KernelError(errno.ENOENT, "the device exists", ", ".join(sorted(self.kernel.devices)), path)
            check(self.root, errno.EACCES, f"{path} may be opened", "root or the group of the device", "another user")
            return self.install(maker(flags & _ACCESS))

    def install(self, file: File) -> int:
        """The lowest free descriptor now refers to `file`."""
        number = next(number for number in count(FIRST_DESCRIPTOR) if number not in self._files)
        self._files[number] = file
        file.hold()
        return number

    def file(self, fd: int) -> File:
        """What a descriptor refers to; EBADF for none."""
        file = self._files.get(fd)
        if file is None:
            raise KernelError(errno.EBADF, "an open descriptor", f"one of {sorted(self._files)}", fd)
        return file

    def close(self, fd: int) -> None:
        """close(2): the last reference releases the file."""
        with self._told("close", fd=fd):
            file = self.file(fd)
            del self._files[fd]
            file.let_go()

    def exit(self) -> None:
        """The process ends: its memory goes, then its descriptors in their order."""
        self.space.clear()
        for fd in sorted(self._files):
            self.close(fd)

    # Device calls.

    def ioctl(self, fd: int, number: int, argument: int | bytes | bytearray = 0) -> Any:
        """ioctl(2), with the conventions of Python's `fcntl.ioctl`.

        A `bytearray` is changed in place, also by a call that fails; for `bytes` the changed copy is returned;
        for a number (which may be an address of the process) the call's return value is.
        """
        if not isinstance(argument, bytes):
            return finish(self.calling(fd, number, argument))
        buffer = bytearray(argument)
        finish(self.calling(fd, number, buffer))
        return bytes(buffer)

    def calling(self, fd: int, number: int, argument: int | bytearray = 0) -> Steps[int]:
        """An ioctl in steps, between which others may run. It holds its file, whoever closes the descriptor meanwhile.

        A kind of file first says whether the process may use it at all, then whether it knows the number.
        """
        file, given, failed = self.file(fd), Argument(self, argument), 0
        name = f"{number:#x}"
        file.hold()
        try:
            file.admit(self)
            call = file.calls().get(number)
            if call is None:
                raise KernelError(file.unknown(), f"an ioctl of {file.device}", "a number that it knows", name)
            name = call.name
            result = call.handler(file, self, given)
            if isinstance(result, GeneratorType):
                result = yield from result
            return int(result)  # type: ignore[arg-type]
        except KernelError as error:
            failed = error.errno or errno.EIO
            raise
        finally:
            file.let_go()
            if self.kernel.cpu.trace:
                event = Ioctl(device=file.device, name=name, errno=failed, arguments=given.fields)
                self.kernel.cpu.trace.emit(event)

    # Memory.

    def mmap(
        self,
        size: int,
        protection: int = Protection.READ | Protection.WRITE,
        flags: int = MapFlags.PRIVATE | MapFlags.ANONYMOUS,
        fd: int = -1,
        offset: int = 0,
        address: int = 0,
    ) -> int:
        """mmap(2): the address, of which `address` is a hint that is not taken unless it is fixed.

        Private mappings of files, which copy on write, are not modelled (EINVAL), nor is PROT_NONE: all can be read.
        """
        with self._told("mmap", size=size, flags=int(flags), fd=fd, offset=offset):
            check(offset >= 0 and offset % PAGE_SIZE == 0, errno.EINVAL, "the offset is whole pages", PAGE_SIZE, offset)
            file = None if flags & MapFlags.ANONYMOUS else self.file(fd)
            check(size > 0, errno.EINVAL, "the length of a mapping", "at least 1", size)
            size = -(-size // PAGE_SIZE) * PAGE_SIZE
            fixed = self._fixed(address, size) if flags & MapFlags.FIXED else 0
            room = USER_END - USER_BASE
            check(size <= room, errno.ENOMEM, "room in the address space", hex(room), hex(size))
            kind = flags & (MapFlags.SHARED | MapFlags.PRIVATE)
            one = kind in (MapFlags.SHARED, MapFlags.PRIVATE)
            check(one, errno.EINVAL, "one of MAP_SHARED and MAP_PRIVATE", "one", hex(flags))
            if file is None and kind == MapFlags.SHARED:
                file, offset = MemoryFile(self.kernel), 0
                file.truncate(size)
            pages: PageFile
            if file is None:
                pages, offset = HugeAnonymousMemory(self.kernel.cpu, self.kernel.memory, size), 0
            else:
                pages = file.mapping(offset, size)
                shared = kind == MapFlags.SHARED
                check(shared, errno.EINVAL, "a file is mapped shared", "MAP_SHARED", "MAP_PRIVATE")
            writable = bool(protection & Protection.WRITE)
            return self.space.map(pages, offset, size, writable=writable, address=fixed, holder=file)

    def _fixed(self, address: int, size: int) -> int:
        """The place that MAP_FIXED names; EINVAL, ENOMEM or EPERM where nothing can be."""
        check(address % PAGE_SIZE == 0, errno.EINVAL, "the address is whole pages", PAGE_SIZE, hex(address))
        check(
            0 <= address <= USER_END - size, errno.ENOMEM, "the mapping lies in user space", hex(USER_END), hex(address)
        )
        check(address >= USER_BASE, errno.EPERM, "vm.mmap_min_addr", hex(USER_BASE), hex(address))
        return address

    def munmap(self, address: int, size: int) -> None:
        """munmap(2); EINVAL for no whole pages, none at all, or what no process has."""
        with self._told("munmap", address=address, size=size):
            check(
                0 < size <= USER_END - address,
                errno.EINVAL,
                "a part of user space",
                hex(USER_END),
                f"{address:#x}+{size:#x}",
            )
            self.space.unmap(_pages(address, size))

    def madvise(self, address: int, size: int, advice: int) -> None:
        """madvise(2). The advices on huge pages hold for all of the memory of a mapping (MODEL)."""
        with self._told("madvise", address=address, size=size, advice=int(advice)):
            check(advice in Advice._value2member_map_, errno.EINVAL, "an advice that is modelled", list(Advice), advice)
            pages = _pages(address, size)
            if not pages:
                return
            if advice == Advice.DONTNEED:
                self.space.discard(pages)
            elif advice == Advice.REMOVE:
                self.space.remove(pages)
            else:
                self.space.want_huge(pages, advice == Advice.HUGEPAGE)

    def load(self, address: int, size: int) -> bytes:
        """What the process reads at an address of its own; EFAULT stands for SIGSEGV."""
        return self.space.copy_in(address, size)

    def store(self, address: int, data: bytes) -> None:
        """What the process writes at an address of its own. `Sigbus`; EFAULT stands for SIGSEGV."""
        page_fault.store(self, address, data)

    # Files of memory.

    def memfd_create(self, flags: int = 0) -> int:
        """memfd_create(2): a file of size 0."""
        with self._told("memfd_create", flags=flags):
            known = MemfdFlags.CLOEXEC | MemfdFlags.ALLOW_SEALING
            check(not flags & ~int(known), errno.EINVAL, "flags of memfd_create", known, hex(flags))
            return self.install(MemoryFile(self.kernel))

    def memfd_restricted(self, flags: int = 0) -> int:
        """memfd_restricted of UPM v10 (system call 451); ENOSYS where the kernel has none."""
        with self._told("memfd_restricted", flags=flags):
            has = self.kernel.era.private_file is PrivateFile.RESTRICTEDMEM
            check(has, errno.ENOSYS, "memfd_restricted", "a kernel with UPM v10", self.kernel.era.name)
            check(flags == 0, errno.EINVAL, "flags of memfd_restricted", 0, flags)
            return self.install(RestrictedMemory(self.kernel))

    def ftruncate(self, fd: int, size: int) -> None:
        with self._told("ftruncate", fd=fd, size=size):
            file = self.file(fd)
            check(size >= 0, errno.EINVAL, "a size", "0 or more", size)
            file.truncate(size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        with self._told("fallocate", fd=fd, mode=mode, offset=offset, size=size):
            file = self.file(fd)
            check(offset >= 0 < size, errno.EINVAL, "a range", "offset >= 0, size > 0", f"{offset}, {size}")
            file.fallocate(mode, offset, size)

    def fstat(self, fd: int) -> Stat:
        return self.file(fd).stat()

    def read(self, fd: int, size: int) -> bytes:
        return self.file(fd).read(size)

    def write(self, fd: int, data: bytes) -> int:
        return self.file(fd).write(data)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return self.file(fd).read(size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self.file(fd).write(data, offset)

    def _told(self, name: str, **arguments: Any) -> _Told:
        return _Told(self.kernel, name, arguments)


class _Told:
    """A system call, traced with its errno when it ends."""

    def __init__(self, kernel: Kernel, name: str, arguments: Mapping[str, Any]) -> None:
        self._kernel, self._name, self._arguments = kernel, name, arguments

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        trace = self._kernel.cpu.trace
        if trace and (error is None or isinstance(error, KernelError)):
            number = error.errno or errno.EIO if isinstance(error, KernelError) else 0
            trace.emit(SystemCall(name=self._name, errno=number, arguments=self._arguments))


def _pages(address: int, size: int) -> range:
    good = address >= 0 and address % PAGE_SIZE == 0 and size >= 0
    check(good, errno.EINVAL, "address and size", "whole pages", f"{address:#x}+{size:#x}")
    return range(address >> PAGE_SHIFT, -(-(address + size) // PAGE_SIZE))
