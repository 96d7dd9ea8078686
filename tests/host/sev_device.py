"""/dev/sev as a program uses it, with numbers and structures typed again, and a look at where every page is."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp import Parameters
from snpbook.host.kernel import Kernel
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.trace import FirmwareCommand
from tests.machines import Board

ISSUE_CMD = 0xC0105300
(
    RESET, STATUS, PEK_GEN, PEK_CSR, PDH_GEN, PDH_EXPORT, PEK_IMPORT, GET_ID, GET_ID2, SNP_STATUS, COMMIT, SET_CONFIG,
    VLEK_LOAD,
) = range(13)  # fmt: skip
SET_EXT_CONFIG, GET_EXT_CONFIG = 10, 11
DEVICE = "ccp 0000:22:00.1: "
MARK = 0x77
"""What the caller leaves in `error`."""
NO_FW_CALL = 0xFFFFFFFF


class Host:
    """A machine whose kernel has booted, and a process with /dev/sev open and a megabyte to work in."""

    def __init__(
        self,
        era: str = "mainline",
        *,
        lazy: bool = False,
        ccp: str = "",
        flags: int = os.O_RDWR,
        boot: bool = True,
        **board: Any,
    ) -> None:
        self.board = Board(**board)
        self.kernel = Kernel(HostCpu(self.board.machine))
        self.era, self.modules = era, {"ccp": f"{ccp} psp_init_on_probe=0" if lazy else ccp}
        if boot:
            self.boot()
        self.process: Process = self.kernel.process()
        self.fd = self.process.open("/dev/sev", flags)
        self.memory = self.process.mmap(1 << 20)
        self.process.store(self.memory, bytes(1 << 20))

    def boot(self) -> None:
        self.kernel.boot(self.era, modules=self.modules)

    @property
    def ccp(self) -> Any:
        return self.kernel.ccp

    def issue(self, command: int, data: int = 0, fd: int = 0) -> tuple[int, int]:
        """The errno, 0 for success, and `error` after the call."""
        buffer, number = bytearray(struct.pack("<IQI", command, data, MARK)), 0
        try:
            self.process.ioctl(fd or self.fd, ISSUE_CMD, buffer)
        except KernelError as error:
            number = error.errno or 0
        after = struct.unpack("<IQI", buffer)
        assert after[:2] == (command, data)
        return number, after[2]

    def put(self, data: bytes, at: int = 0) -> int:
        self.process.store(self.memory + at, data)
        return self.memory + at

    def get(self, size: int, at: int = 0) -> bytes:
        return self.process.load(self.memory + at, size)

    def commands(self) -> list[str]:
        """The firmware commands since the last time, without those that take pages back."""
        events, self.board.log.events[:] = self.board.log.of(FirmwareCommand), []
        return [event.name for event in events if event.name != "SNP_PAGE_RECLAIM"]


def check_pages(host: Host, before: int) -> None:
    """Free pages are the hypervisor's; what is in use is what was, what is leaked, and what Linux loses unlisted."""
    kernel, rmp = host.kernel, host.board.machine.rmp
    for run in kernel.memory._free:
        states = rmp.states(run)
        assert (states == PageState.HYPERVISOR).all(), run
    leaks = kernel.ccp.leaks
    gone = [page for run in (*leaks.listed, *leaks.forgotten) for page in run]
    assert len(gone) == len(set(gone)), "no page is lost twice"
    own = {buffer >> 12 for buffer in kernel.ccp._buffers}
    assert kernel.memory.allocated == before + len(set(gone) - own)
    free = {page for run in kernel.memory._free for page in (run.start, run.stop - 1)}
    assert not free & set(gone)


def spoil(
    monkeypatch: pytest.MonkeyPatch, host: Host, command: Command, status: Status, after: int = 0, times: int = 1 << 30
) -> None:
    """Let the firmware answer `status` to a command, from its call number `after` on, so many times."""
    processor, calls = host.board.psp, 0
    handlers = dict(processor._commands)
    layout, handler, run_handler = handlers[command]

    def bad() -> bool:
        nonlocal calls
        calls += 1
        return after < calls <= after + times

    def failing(psp: Any, buffer: Any) -> Any:
        if bad():
            raise FirmwareRefusal(status, "spoilt")
        return handler(psp, buffer)

    def failing_run(psp: Any, buffer: Any, pages: range) -> Any:
        assert run_handler is not None
        good = next((index for index in range(len(pages)) if bad()), None)
        if good is None:
            return run_handler(psp, buffer, pages)
        done, refusal = run_handler(psp, buffer, pages[:good]) if good else (0, None)
        return done, refusal or FirmwareRefusal(status, "spoilt")

    handlers[command] = (layout, failing, failing_run if run_handler else None)
    monkeypatch.setattr(processor, "_commands", handlers)


def fail_rmpupdate(monkeypatch: pytest.MonkeyPatch, after: int, *, assigned: bool) -> None:
    """Let RMPUPDATE to assigned (or unassigned) pages fail for the page number `after`, once."""
    original, seen = HostCpu.rmpupdate, 0

    def rmpupdate(self: HostCpu, pages: Any, gfns: Any, new: Any) -> Any:
        nonlocal seen
        if new.assigned is not assigned:
            return original(self, pages, gfns, new)
        first, seen = seen, seen + len(pages)
        if not first <= after < seen:
            return original(self, pages, gfns, new)
        codes = np.zeros(len(pages), np.uint8)
        for index in range(len(pages)):
            if index == after - first:
                codes[index] = 1
            else:
                codes[index] = original(self, pages[index : index + 1], gfns[index : index + 1], new)[0]
        return codes

    monkeypatch.setattr(HostCpu, "rmpupdate", rmpupdate)


def fail_allocation(monkeypatch: pytest.MonkeyPatch, host: Host, number: int) -> Callable[[], int]:
    """Let the allocation number `number` from now on fail: a function that tells how many there were."""
    memory, original, count = host.kernel.memory, host.kernel.memory.allocate, 0

    def allocate(pages: int, align: int = 1) -> range:
        nonlocal count
        count += 1
        if count == number + 1:
            raise KernelError(errno.ENOMEM, "spoilt", "", "")
        return original(pages, align)

    monkeypatch.setattr(memory, "allocate", allocate)
    return lambda: count


@contextmanager
def fails(number: int, firmware: Status | None = None) -> Iterator[KernelError]:
    with pytest.raises(KernelError) as caught:
        yield KernelError(0, "")
    assert (caught.value.errno, caught.value.firmware) == (number, firmware)


def down(init_ex_path: str = "") -> Host:
    """SNP is on in the processor, the driver is there, and nothing is initialised."""
    host = Host()
    host.ccp.shutdown()
    host.ccp.parameters = Parameters(init_ex_path=init_ex_path)
    host.commands()
    host.kernel.log.lines.clear()
    return host


def lines(host: Host) -> list[str]:
    return [line.removeprefix(DEVICE) for line in host.kernel.log.lines]
