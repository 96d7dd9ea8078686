"""How the kernel refuses: an `OSError` with the errno of the system call, and the reason behind it."""

from __future__ import annotations

import errno as codes

from snpbook.spec.refusal import Refusal
from snpbook.spec.status import Status
from snpbook.spec.uapi_kvm import EHWPOISON

_NAMES = {**codes.errorcode, EHWPOISON: "EHWPOISON"}
"""By number; Python's own table lacks the last."""


class KernelError(Refusal, OSError):
    """A system call that failed; `firmware` is the status where the firmware was the cause."""

    def __init__(
        self,
        errno: int,
        rule: str,
        expected: object = "",
        found: object = "",
        cite: str = "LINUX",
        firmware: Status | None = None,
    ) -> None:
        super().__init__(rule, expected, found, cite)
        self.errno, self.firmware = errno, firmware

    def __str__(self) -> str:
        number = self.errno or codes.EIO
        name = _NAMES.get(number, f"errno {number}")
        return f"{name}: {super().__str__()}"


def check(condition: bool, errno: int, rule: str, expected: object = "", found: object = "") -> None:
    """One check of a system call."""
    if not condition:
        raise KernelError(errno, rule, expected, found)
