"""The firmware's rules for CPUID against the sheet's shorthand, and against what real processors say of themselves."""

from __future__ import annotations

import pytest

from snpbook.spec.cpuid_policy import (
    CHECKED_LEAVES,
    CPUID_RULES,
    XSAVE_BASE,
    XSAVE_COMPACTED_SIZES,
    XSAVE_STANDARD_ENDS,
    Rule,
    RuleKind,
)
from snpbook.spec.products import product

# EAX EBX ECX EDX: U unchecked (or by parts), L at most, M subset, = exact, F signature, X and C sizes of XSAVE areas.
SHORTHAND = """
0 LUUU; 1 FUMM; 2 UUUU; 4 UUUU; 5 UUUU; 6 M=M=; 7.0 LMMM; 7.1 M===; B.0 UUUU; B.1 UUUU; B.2 UUUU;
D.0 MXU=; D.1 MCMM; D.2 ====; D.5 ==M=; D.6 ==M=; D.7 ==M=; D.9 ====; D.B ====; D.C ====;
F.0 =U=U; F.1 UUUU; 10.0 =U=U; 10.1 UU=U;
80000000 LUUU; 80000001 FUMM; 80000002 UUUU; 80000003 UUUU; 80000004 UUUU; 80000005 UUUU; 80000006 UUUU;
80000007 =MUM; 80000008 UMUU; 8000000A UU=M; 80000019 UU==; 8000001A U===; 8000001B M===;
8000001D.0 UUUU; 8000001D.1 UUUU; 8000001D.2 UUUU; 8000001D.3 UUUU; 8000001D.4 U=U=; 8000001E UUUU; 8000001F MUUU;
80000020.0 =U==; 80000020.1 U==U; 80000020.2 U==U; 80000020.3 =UM=; 80000021 MU==; 80000022 MUU=; 80000023 MU==;
80000024.0 LMM=; 80000024.1 M===; 80000026 UUUU
"""
LETTERS = {
    RuleKind.UNCHECKED: "U", RuleKind.AT_MOST: "L", RuleKind.SUBSET: "M", RuleKind.EXACT: "=",
    RuleKind.SIGNATURE: "F", RuleKind.XSAVE_STANDARD: "X", RuleKind.XSAVE_COMPACTED: "C",
}  # fmt: skip


def test_rules() -> None:
    expected = {}
    for part in SHORTHAND.split(";"):
        key, letters = part.split()
        leaf, dot, subleaf = key.partition(".")
        expected[int(leaf, 16), int(subleaf, 16) if dot else None] = letters
    assert {key: "".join(LETTERS[rule.kind] for rule in rules) for key, rules in CPUID_RULES.items()} == expected


@pytest.mark.parametrize(
    ("subleaf", "size", "offset"),
    [
        (2, 0x100, 0x240), (5, 0x40, 0x340), (6, 0x200, 0x380), (7, 0x400, 0x580), (9, 8, 0x980), (11, 0x10, 0),
        (12, 0x18, 0),
    ],
)  # fmt: skip
def test_xsave_components(subleaf: int, size: int, offset: int) -> None:
    """Each component's own leaf, and what it makes of the whole area."""
    eax, ebx, ecx, edx = CPUID_RULES[0xD, subleaf]
    assert (eax.value, ebx.value, edx.value) == (size, offset, 0)
    assert ecx.value == {2: 0, 9: 0, 11: 1, 12: 1}.get(subleaf)
    assert XSAVE_COMPACTED_SIZES[subleaf] == size
    if offset:
        assert XSAVE_STANDARD_ENDS[subleaf] == offset + size
    assert list(XSAVE_STANDARD_ENDS) == sorted(XSAVE_STANDARD_ENDS, reverse=True)


def allows(rule: Rule, value: int, own: int, area: int) -> bool:
    """One register judged the slow way; `area` is the size that XSAVE rules ask for."""
    limit = own if rule.value is None else rule.value
    verdicts = {
        RuleKind.UNCHECKED: True,
        RuleKind.AT_MOST: value <= limit,
        RuleKind.SUBSET: value & ~(own | rule.free) == 0,
        RuleKind.EXACT: value == limit,
        RuleKind.SIGNATURE: value <= own,
        RuleKind.XSAVE_STANDARD: value == area,
        RuleKind.XSAVE_COMPACTED: value == area,
    }
    parts = True
    for part in rule.parts:
        found = value >> part.lo & (1 << part.width) - 1
        parts &= found <= part.value if part.kind is RuleKind.AT_MOST else found == part.value
    return verdicts[rule.kind] and parts and value & rule.required == rule.required and not value & rule.reserved


# XCR0 and XSS as the operating system had them when the leaves were read.
STATES = {"milan": (0b111, 1 << 11), "genoa": (0b11100111, 1 << 11)}


@pytest.mark.parametrize("name", STATES)
def test_a_processor_may_say_what_it_is(name: str) -> None:
    """Every leaf of a real Milan and a real Genoa is listed, and passes."""
    part, (xcr0, xss) = product(name), STATES[name]
    standard = next(end for bit, end in XSAVE_STANDARD_ENDS.items() if xcr0 >> bit & 1)
    compacted = XSAVE_BASE + sum(size for bit, size in XSAVE_COMPACTED_SIZES.items() if (xcr0 | xss) >> bit & 1)
    extra = [(0x80000001, None), (0x80000008, None), (0x8000001F, None)]
    for leaf, subleaf in [*part.leaves, *extra]:
        rules = CPUID_RULES.get((leaf, subleaf)) or CPUID_RULES[leaf, None]
        own = part.cpuid(leaf, subleaf or 0)
        for register, rule, value in zip("abcd", rules, own, strict=True):
            area = compacted if rule.kind is RuleKind.XSAVE_COMPACTED else standard
            assert allows(rule, value, value, area), f"{leaf:#x}.{subleaf} e{register}x = {value:#x}"


def test_bits_with_rules_of_their_own() -> None:
    own = 0
    osxsave = CPUID_RULES[1, None][2]
    assert allows(osxsave, 1 << 27 | 1 << 31, own, 0)
    assert not allows(osxsave, 1 << 26, own, 0)
    assert allows(CPUID_RULES[7, 0][2], 1 << 4, own, 0)
    assert not allows(CPUID_RULES[7, 0][2], 1 << 3, own, 0)
    assert not allows(CPUID_RULES[0xD, 0][0], 0b01, 0b111, 0), "x87 and SSE are always there"
    sizes = CPUID_RULES[0x80000008, None][0]
    assert allows(sizes, 0xFF3934, own, 0)
    assert not any(allows(sizes, value, own, 0) for value in (0x3935, 0x3A34))
    memory = CPUID_RULES[0x8000001F, None][1]
    assert allows(memory, 4 << 12 | 0x3F << 6 | 51, own, 0)
    assert not any(allows(memory, value, own, 0) for value in (5 << 12 | 51, 50))
    counters = CPUID_RULES[0x80000022, None][1]
    assert allows(counters, 0x10 << 4 | 6, own, 0)
    assert not any(allows(counters, value, own, 0) for value in (0x11 << 4, 7))
    assert [rule.reserved for rule in CPUID_RULES[5, None]] == [0xFFFF0000, 0xFFFF0000, 0xFFFFFFFC, 0xFFFFFF00]


def test_hypervisor_leaves_are_not_checked() -> None:
    assert [0x40000000 in leaves for leaves in CHECKED_LEAVES] == [False, False]
    assert 0xFFFF in CHECKED_LEAVES[0]
    assert 0x80000000 in CHECKED_LEAVES[1]
    assert 0x80010000 not in CHECKED_LEAVES[1]
    assert all(any(leaf in leaves for leaves in CHECKED_LEAVES) for leaf, _ in CPUID_RULES)
