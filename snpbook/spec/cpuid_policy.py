"""What the firmware lets a host tell a guest about CPUID: one rule for each register of each leaf.

It applies to SNP_LAUNCH_UPDATE's CPUID page and to MSG_CPUID_REQ. A leaf that is not listed must be all zero.
Source: firmware 1.55.25 (CPUID look-up). The exact masks of that build are Genoa's; here a mask is the processor's
own register, which gives the same on Genoa (MODEL).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class RuleKind(Enum):
    """How a register is judged."""

    UNCHECKED = "anything"
    AT_MOST = "not above the limit, or else the processor's own value"
    SUBSET = "no bit that the processor has not"
    EXACT = "the value, or else the processor's own"
    SIGNATURE = "family, model and stepping not above the processor's"
    XSAVE_STANDARD = "size of the standard-format XSAVE area of XCR0_IN"
    XSAVE_COMPACTED = "size of the compacted XSAVE area of XCR0_IN and XSS_IN"


@dataclass(frozen=True, slots=True)
class Part:
    """Bits `lo` .. `lo + width - 1` of a register with a rule of their own: at most or exactly `value`."""

    lo: int
    width: int
    kind: RuleKind
    value: int


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule of one register.

    `value` is the limit of AT_MOST or what EXACT wants; None stands for the processor's own (of AT_MOST: inferred).
    Bits of `free` may be anything, bits of `required` must be set, bits of `reserved` must be clear. `parts` are bits
    with a rule of their own.
    """

    kind: RuleKind
    value: int | None = None
    free: int = 0
    required: int = 0
    reserved: int = 0
    parts: tuple[Part, ...] = ()


Rules = tuple[Rule, Rule, Rule, Rule]
"""For EAX, EBX, ECX and EDX."""

_U = Rule(RuleKind.UNCHECKED)
_M = Rule(RuleKind.SUBSET)
_OWN = Rule(RuleKind.EXACT)
_FMS = Rule(RuleKind.SIGNATURE)


def _at_most(limit: int) -> Rule:
    return Rule(RuleKind.AT_MOST, limit)


def _exact(value: int) -> Rule:
    return Rule(RuleKind.EXACT, value)


def _clear(reserved: int) -> Rule:
    return Rule(RuleKind.UNCHECKED, reserved=reserved)


def _parts(*parts: tuple[int, int, RuleKind, int]) -> Rule:
    return Rule(RuleKind.UNCHECKED, parts=tuple(Part(*part) for part in parts))


_MOST, _IS = RuleKind.AT_MOST, RuleKind.EXACT
_ZERO, _ALL = _exact(0), (_U, _U, _U, _U)

CPUID_RULES: Mapping[tuple[int, int | None], Rules] = {
    (0x00000000, None): (_at_most(0x10), _U, _U, _U),
    (0x00000001, None): (_FMS, _parts((8, 8, _IS, 8)), Rule(RuleKind.SUBSET, free=1 << 27 | 1 << 31), _M),
    (0x00000002, None): _ALL,
    (0x00000004, None): _ALL,
    (0x00000005, None): (_clear(0xFFFF0000), _clear(0xFFFF0000), _clear(0xFFFFFFFC), _clear(0xFFFFFF00)),
    (0x00000006, None): (_M, _ZERO, _M, _ZERO),
    (0x00000007, 0): (_at_most(1), _M, Rule(RuleKind.SUBSET, free=1 << 4), _M),
    (0x00000007, 1): (_M, _ZERO, _ZERO, _ZERO),
    (0x0000000B, 0): _ALL,
    (0x0000000B, 1): _ALL,
    (0x0000000B, 2): _ALL,
    (0x0000000D, 0): (Rule(RuleKind.SUBSET, required=0b11), Rule(RuleKind.XSAVE_STANDARD), _U, _ZERO),
    (0x0000000D, 1): (_M, Rule(RuleKind.XSAVE_COMPACTED), _M, _M),
    (0x0000000D, 2): (_exact(0x100), _exact(0x240), _ZERO, _ZERO),
    (0x0000000D, 5): (_exact(0x040), _exact(0x340), _M, _ZERO),
    (0x0000000D, 6): (_exact(0x200), _exact(0x380), _M, _ZERO),
    (0x0000000D, 7): (_exact(0x400), _exact(0x580), _M, _ZERO),
    (0x0000000D, 9): (_exact(0x008), _exact(0x980), _ZERO, _ZERO),
    (0x0000000D, 0xB): (_exact(0x010), _ZERO, _exact(1), _ZERO),
    (0x0000000D, 0xC): (_exact(0x018), _ZERO, _exact(1), _ZERO),
    (0x0000000F, 0): (_OWN, _U, _OWN, _U),
    (0x0000000F, 1): (_U, _U, _U, _U),
    (0x00000010, 0): (_OWN, _U, _OWN, _U),
    (0x00000010, 1): (_U, _U, _OWN, _U),
    (0x80000000, None): (_at_most(0x80000028), _U, _U, _U),
    (0x80000001, None): (_FMS, _U, _M, _M),
    **{(leaf, None): _ALL for leaf in range(0x80000002, 0x80000007)},
    (0x80000007, None): (_ZERO, _M, _U, _M),
    (0x80000008, None): (
        _parts((0, 8, _MOST, 52), (8, 8, _MOST, 57), (16, 8, _MOST, 0xFF)),
        _M,
        _U,
        _parts((0, 16, _MOST, 7), (16, 16, _MOST, 1)),
    ),
    (0x8000000A, None): (_U, _U, _ZERO, _M),
    (0x80000019, None): (_U, _U, _OWN, _OWN),
    (0x8000001A, None): (_U, _OWN, _OWN, _OWN),
    (0x8000001B, None): (_M, _OWN, _OWN, _OWN),
    **{(0x8000001D, subleaf): _ALL for subleaf in range(4)},
    (0x8000001D, 4): (_U, _OWN, _U, _OWN),
    (0x8000001E, None): _ALL,
    (0x8000001F, None): (_M, _parts((0, 6, _IS, 51), (12, 4, _MOST, 4)), _U, _U),
    (0x80000020, 0): (_OWN, _U, _OWN, _OWN),
    (0x80000020, 1): (_U, _OWN, _OWN, _U),
    (0x80000020, 2): (_U, _OWN, _OWN, _U),
    (0x80000020, 3): (_OWN, _U, _M, _OWN),
    (0x80000021, None): (_M, _U, _OWN, _OWN),
    (0x80000022, None): (_M, _parts((0, 4, _MOST, 6), (4, 6, _MOST, 0x10)), _U, _OWN),
    (0x80000023, None): (_M, _U, _OWN, _OWN),
    (0x80000024, 0): (Rule(RuleKind.AT_MOST), _M, _M, _OWN),
    (0x80000024, 1): (_M, _OWN, _OWN, _OWN),
    (0x80000026, None): _ALL,
}
"""By (leaf, subleaf); subleaf None stands for every ECX. Reserved bits of a listed leaf are violations as well."""

CORRECTION_QUIRKS: Mapping[tuple[int, int | None, int], tuple[int, int]] = {
    (0x00000007, 0, 3): (0, 0xFFFFFFFF),
    (0x8000001F, None, 1): (0x3F, 0xFC0),
}
"""By (leaf, subleaf, number of the register): what its correction spoils, as bits that survive and bits that it clears.

Illegal bits in EDX of leaf 7 cost all of the register; of a C-bit's wrong position the extra bits stay (1.55.25).
"""

CHECKED_LEAVES = (range(0x00010000), range(0x80000000, 0x80010000))
"""Leaves outside, such as a hypervisor's own, are nobody's business."""

XSAVE_BASE = 0x240
XSAVE_STANDARD_ENDS = {9: 0x988, 7: 0x980, 6: 0x580, 5: 0x380, 2: 0x340}
"""By bit of XCR0_IN, highest first: the size of an area whose highest component that is."""
XSAVE_COMPACTED_SIZES = {2: 0x100, 5: 0x40, 6: 0x200, 7: 0x400, 9: 0x8, 11: 0x10, 12: 0x18}
"""By bit of XCR0_IN or XSS_IN: what a component adds to the base."""
