"""Why the RMP said no, in words: which check, what it wanted, what it found, and where that is written.

The verdict is always the model's own, handed in; this file only finds the check that belongs to it and reads the values
off the entry. Sources: APM2 15.36.3 to 15.36.10; order of RMPUPDATE's checks as published on the kvm list (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from snpbook.hardware.checks import Access
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.rmp import U64, Rmp
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE, PageSize, VmplPermission
from snpbook.spec.rmp import RMP_ENTRY, RmpCode

_ACCESS = "APM2 15.36.10"
_WORDS = {
    VmplPermission.READ: "read", VmplPermission.WRITE: "write", VmplPermission.EXECUTE_USER: "execute as user",
    VmplPermission.EXECUTE_SUPERVISOR: "execute as supervisor",
    VmplPermission.SUPERVISOR_SHADOW_STACK: "shadow stack",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One check: its name, what it wants, what it found; `met` is None where it was not reached."""

    name: str
    expected: str
    found: str
    met: bool | None
    cite: str


@dataclass(frozen=True, slots=True)
class Page:
    """What the checks see of a page: its entry, that of the first page of its 2 MB region, and the one that answers."""

    number: int
    covered: bool
    entry: Record
    head: Record
    answers: Record
    in_use: bool = False

    @classmethod
    def of(cls, rmp: Rmp, number: int, in_use: bool = False) -> Page:
        """The page as the table has it now; the entries of a page without one read as zero."""
        place = np.array([number], U64)
        covered = bool(rmp.covers(place)[0])
        entry, head = (rmp.peek(place & mask).tobytes() for mask in (U64(2**64 - 1), U64(2**64 - PAGES_PER_LARGE)))
        answers = rmp.effective(place).tobytes() if covered else entry
        unpack = RMP_ENTRY.unpack
        return cls(number, covered, unpack(entry), unpack(head), unpack(answers), in_use)


def rights(value: int) -> str:
    """One VMPL's permission byte in words."""
    return ", ".join(word for right, word in _WORDS.items() if value & right) or "nothing"


def owner(entry: Record) -> str:
    """Whose page it is, by its entry."""
    if not entry.assigned:
        return "not assigned"
    return f"assigned to ASID {entry.asid}" if entry.asid else "assigned to the firmware"


def size(large: int) -> str:
    """A page size bit in words."""
    return "2 MB" if large else "4 KB"


def guest_steps(
    page: Page, gfn: int, asid: int, vmpl: int, need: VmplPermission, verdict: Access, *, large: bool = False
) -> list[Step]:
    """The checks on a private access of an SNP guest, of which `verdict` is the first that failed."""
    entry, right = page.answers, getattr(page.answers, f"vmpl{vmpl}")
    checks = [
        (Access.NOT_COVERED, "RMP-Covered", "an entry", "an entry" if page.covered else "no entry"),
        (Access.NOT_GUEST_OWNED, "Guest-Owned", f"assigned to ASID {asid}", owner(entry)),
        (Access.REVERSE_MAP, "Reverse-Map", f"GPA {gfn << PAGE_SHIFT:#x}", f"GPA {entry.gfn << PAGE_SHIFT:#x}"),
        (Access.IMMUTABLE, "Mutable", "not immutable", "immutable" if entry.immutable else "not immutable"),
        (Access.PAGE_SIZE, "Page-Size", f"{size(large)}, as mapped", size(entry.page_size)),
        (Access.NOT_VALIDATED, "Validated", "validated", "validated" if entry.validated else "not validated"),
        (Access.VMPL, f"VMPL{vmpl} permissions", rights(need), rights(right)),
    ]
    return _until(checks, verdict)


def not_canonical(address: int) -> Step:
    """The check on an address before any walk, failed: of 48 bits, the highest is repeated up to bit 63."""
    return Step("Canonical address", "bits 63 to 47 alike", f"{address:#x}", False, "APM2 5.3.1")


def hypervisor_steps(page: Page, verdict: Access, *, large: bool = False) -> list[Step]:
    """The one check on a write by the host, a device or a guest without SNP, and on an SNP guest's shared write."""
    found, wanted = owner(page.head if large else page.entry), "not assigned"
    if large:
        wanted = "none of the 512 pages assigned"
        others = page.head.subpage_count
        found = f"{others} others assigned" if others and not page.head.assigned else found
    return _until([(Access.NOT_HYPERVISOR_OWNED, "Hypervisor-Owned", wanted, found)], verdict)


def _until(checks: Sequence[tuple[Access, str, str, str]], verdict: Access) -> list[Step]:
    """The checks in order: met before the verdict's, not reached behind it."""
    order = [access for access, *_ in checks]
    stop = len(order) if verdict is Access.GRANTED else order.index(verdict)
    return [
        Step(name, expected, found if at <= stop else "", None if at > stop else at < stop, _ACCESS)
        for at, (_, name, expected, found) in enumerate(checks)
    ]


@dataclass(frozen=True, slots=True)
class Operands:
    """What an instruction was given: RMPUPDATE the `new` state, those of a guest the other fields."""

    new: NewState | None = None
    gfn: int = 0
    vmpl: int = 0
    target: int = 0
    rights: int = 0
    large: bool = False
    vmpls: int = 4


_Rule = tuple[RmpCode, str, Callable[[Page, Operands], bool], Callable[[Page, Operands], tuple[str, str]]]


def _aligned(page: Page, _: Operands) -> tuple[str, str]:
    return f"a page number divisible by {PAGES_PER_LARGE:#x}", f"{page.number:#x}"


def _is_large(record: Record) -> bool:
    return bool(record.assigned and record.page_size == PageSize.SIZE_2M)


_OFF = (
    RmpCode.FAIL_INPUT, "a 2 MB page begins at a multiple of 2 MB",
    lambda page, given: bool(given.large and page.number % PAGES_PER_LARGE), _aligned,
)  # fmt: skip
_OFF_ADDRESS = (
    RmpCode.FAIL_INPUT, "the address of a 2 MB page is a multiple of 2 MB",
    lambda page, given: bool(given.large and given.gfn % PAGES_PER_LARGE),
    lambda page, given: (f"divisible by {PAGES_PER_LARGE << PAGE_SHIFT:#x}", f"{given.gfn << PAGE_SHIFT:#x}"),
)  # fmt: skip
_COVERED = (
    RmpCode.FAIL_INPUT, "the page has an entry",
    lambda page, given: not page.covered, lambda page, given: ("an entry", "no entry"),
)  # fmt: skip
_IN_USE = (
    RmpCode.FAIL_INUSE, "the entry is not in use by a running vCPU",
    lambda page, given: page.in_use, lambda page, given: ("not in use", "a running vCPU's VMCB or VMSA"),
)  # fmt: skip
_IMMUTABLE = (
    RmpCode.FAIL_PERMISSION, "the entry is not immutable: only the firmware may change that one",
    lambda page, given: bool(page.entry.immutable), lambda page, given: ("not immutable", "immutable"),
)  # fmt: skip
_SIZE = (
    RmpCode.FAIL_SIZEMISMATCH, "a 2 MB instruction needs a 2 MB entry",
    lambda page, given: True, lambda page, given: ("2 MB", size(page.answers.page_size)),
)  # fmt: skip

_RULES: dict[str, Sequence[_Rule]] = {
    "RMPUPDATE": [
        _OFF,
        (
            RmpCode.FAIL_INPUT, "a page given back has no ASID and is not immutable",
            lambda page, given: bool(given.new and not given.new.assigned),
            lambda page, given: ("ASID 0, not immutable", _operand(given.new)),
        ),
        _COVERED, _IN_USE, _IMMUTABLE,
        (
            RmpCode.FAIL_OVERLAP, "a 4 KB page does not lie inside a 2 MB entry",
            lambda page, given: not given.large and _is_large(page.head),
            lambda page, given: ("4 KB entries", f"a 2 MB entry, {owner(page.head)}"),
        ),
        (
            RmpCode.FAIL_OVERLAP, "no 4 KB page of the region is assigned",
            lambda page, given: given.large,
            lambda page, given: ("none assigned", f"{page.head.subpage_count + page.head.assigned} assigned"),
        ),
    ],
    "PSMASH": [
        _OFF, _COVERED, _IN_USE,
        (
            RmpCode.FAIL_BADADDR, "only an assigned 2 MB entry can be smashed",
            lambda page, given: True, lambda page, given: ("a 2 MB entry", f"{size(0)}, {owner(page.entry)}"),
        ),
        _IMMUTABLE,
    ],
    "RMPREAD": [_COVERED],
    "PVALIDATE": [_OFF_ADDRESS, _SIZE],
    "RMPADJUST": [
        _OFF_ADDRESS,
        (
            RmpCode.FAIL_PERMISSION, "the target is a less privileged VMPL",
            lambda page, given: given.target <= given.vmpl,
            lambda page, given: (f"above {given.vmpl}", f"VMPL{given.target}"),
        ),
        (
            RmpCode.FAIL_INPUT, "the target VMPL exists",
            lambda page, given: given.target >= given.vmpls,
            lambda page, given: (f"below {given.vmpls}", str(given.target)),
        ),
        _SIZE,
        (
            RmpCode.FAIL_PERMISSION, "nobody grants a right that it does not hold itself",
            lambda page, given: True,
            lambda page, given: (f"within: {_held(page, given)}", rights(given.rights)),
        ),
    ],
    "RMPQUERY": [
        (
            RmpCode.FAIL_PERMISSION, "the target is a less privileged VMPL that exists (inferred)",
            lambda page, given: True,
            lambda page, given: (f"{given.vmpl + 1} to {given.vmpls - 1}", f"VMPL{given.target}"),
        ),
    ],
}  # fmt: skip
"""The checks that give a code, in the order of the instruction: code, rule, whether it fails, expected and found."""

_CITES = {
    "RMPUPDATE": "APM2 15.36.5", "PSMASH": "APM2 15.36.11", "RMPREAD": "LINUX arch/x86/virt/svm/sev.c (mainline)",
    "PVALIDATE": "APM2 15.36.6", "RMPADJUST": "APM2 15.36.7", "RMPQUERY": "APM2 15.36.7",
}  # fmt: skip


def code_reason(instruction: str, code: RmpCode, page: Page, given: Operands) -> Step:
    """The check behind a return code other than success; `page` as it was before the instruction."""
    for ruled, rule, fails, values in _RULES[instruction]:
        if ruled is code and fails(page, given):
            return Step(rule, *values(page, given), False, _CITES[instruction])
    raise LookupError(f"{instruction} answered {code.name} for page {page.number:#x}, and no check of it fails")


def _operand(new: NewState | None) -> str:
    assert new is not None
    return f"ASID {new.asid}" + (", immutable" if new.immutable else "")


def _held(page: Page, given: Operands) -> str:
    return rights(getattr(page.answers, f"vmpl{given.vmpl}"))
