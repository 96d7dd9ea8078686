"""The slow oracle of both page walks, held against expectations worked by hand.

Guest pages 1 to 8 are system pages 0x201 to 0x208, nested tables pages 0x10 to 0x13, guest tables guest pages
1 to 4. Virtual page 0 is guest page 5, private; virtual page 1 is guest page 8, shared and the hypervisor's.
"""

from typing import Any

import pytest

from tests.reference.rmp import ReferenceRmp
from tests.reference.walks import Fault, Vcpu

MB2, GB1 = 512, 512 * 512
"""4 KB pages in a mapping."""
C = 1 << 51


def vcpu(**state: Any) -> Vcpu:
    rmp = ReferenceRmp(2048)
    for gfn in range(1, 8):
        assert rmp.rmpupdate(0x200 + gfn, gfn, True, 1) == 0
        assert rmp.pvalidate(0x200 + gfn, gfn, 1, True) == (0, False)
    nested = {0x10000: 0x11007, 0x11000: 0x12007, 0x12000: 0x13007}
    nested |= {0x13000 + 8 * gfn: (0x200 + gfn) * 4096 | 7 for gfn in range(1, 9)}
    guest = {0x201000: C | 0x2007, 0x202000: C | 0x3007, 0x203000: C | 0x4007, 0x204000: C | 0x5007, 0x204008: 0x8007}
    return Vcpu(nested, guest, rmp, nested_root=0x10000, cr3=C | 0x1000, **state)


def test_accessed_and_dirty_bits() -> None:
    cpu = vcpu()
    found = cpu.access(0, "write")
    assert (found.outcome, found.page, found.gfn, found.private) == (("GRANTED", 0), 0x205, 5, True)
    assert cpu.updates == [
        ("nested", 0x10000, 0x20),
        ("nested", 0x11000, 0x20),
        ("nested", 0x12000, 0x20),
        ("nested", 0x13008, 0x60),  # a walk of the guest's tables writes, as the nested tables see it
        ("nested", 0x13010, 0x60),
        ("nested", 0x13018, 0x60),
        ("nested", 0x13020, 0x60),
        ("guest", 0x201000, 0x20),
        ("guest", 0x202000, 0x20),
        ("guest", 0x203000, 0x20),
        ("guest", 0x204000, 0x60),
        ("nested", 0x13028, 0x60),
    ]
    cpu.updates.clear()
    assert cpu.access(0, "write").outcome == cpu.access(0, "read").outcome == ("GRANTED", 0)
    assert cpu.updates == []
    shared = cpu.access(1, "read")
    assert (shared.page, shared.private) == (0x208, False)
    assert cpu.updates == [("guest", 0x204008, 0x20), ("nested", 0x13040, 0x20)]
    assert cpu.access(0, "fetch").page == 0x205
    assert cpu.access(2**35, "read").outcome == ("#GP", 0)


@pytest.mark.parametrize(
    ("address", "word", "kind", "state", "code"),
    [
        (0x204000, 0, "read", {}, 0),
        (0x202000, 0, "write", {"cpl": 3}, 6),
        (0x204000, 0, "fetch", {}, 0x10),
        (0x204000, 0, "fetch", {"no_execute": False}, 0),
        (0x204000, C | 0x5005, "write", {}, 3),
        (0x204000, C | 0x5005, "write", {"write_protect": False}, None),
        (0x204000, C | 0x5005, "write", {"write_protect": False, "cpl": 3}, 7),
        (0x203000, C | 0x4005, "write", {}, 3),
        (0x202000, C | 0x3003, "read", {"cpl": 3}, 5),
        (0x202000, C | 0x3003, "read", {"cpl": 2}, None),
        (0x204000, 1 << 63 | C | 0x5007, "fetch", {}, 0x11),
        (0x202000, 1 << 63 | C | 0x3007, "fetch", {"cpl": 3}, 0x15),
        (0x202000, 1 << 63 | C | 0x3007, "read", {}, None),
        (0x204000, 1 << 63 | C | 0x5007, "read", {"no_execute": False}, 9),
        (0x201000, C | 0x2087, "read", {}, 9),
        (0x203000, 1 << 48 | C | 0x4007, "write", {}, 0xB),
        (0x203000, C | 0x2087, "read", {}, 9),  # 2 MB, bit 13
        (0x203000, C | 0x1087, "read", {}, ("NPF", 0x5_0000_0004)),  # bit 12 is PAT: guest page 0, not mapped
        (0x202000, C | 0x200087, "read", {}, 9),  # 1 GB, bit 21
        (0x202000, C | 0x2087, "read", {}, 9),  # 1 GB, bit 13
        (0x204000, C | 1 << 48 | 0x5007, "read", {"guest_width": 49}, ("NPF", 0x5_0000_0004)),  # four levels end
        (0x204000, C | 0x5007, "read", {"virtual_tom": 2**30}, 9),
    ],
)
def test_guest_tables(address: int, word: int, kind: str, state: dict[str, Any], code: Any) -> None:
    """The final nested entry of guest page 5 is missing as well where a #PF is due: the guest's tables come first."""
    cpu = vcpu(**state)
    cpu.guest[address] = word
    if state.get("virtual_tom"):
        cpu.guest |= {0x201000: 0x2007, 0x202000: 0x3007, 0x203000: 0x4007}
    if code is not None:
        del cpu.host[0x13028]
    outcome = ("GRANTED", 0) if code is None else code if isinstance(code, tuple) else ("#PF", code)
    assert cpu.access(0, kind).outcome == outcome


@pytest.mark.parametrize(
    ("address", "word", "kind", "virtual", "code", "gpa"),
    [
        (0x13028, 0, "read", 0, 0x5_0000_0004, 0x5000),
        (0x13028, 0, "write", 0, 0x5_0000_0006, 0x5000),
        (0x13040, 0, "read", 1, 0x1_0000_0004, 0x8000),
        (0x13040, 0, "fetch", 1, 0x5_0000_0014, 0x8000),
        (0x13018, 0, "write", 0, 0x6_0000_0006, 0x3000),
        (0x13028, 0x205005, "write", 0, 0x5_0000_0007, 0x5000),
        (0x13028, 0x205003, "read", 0, 0x5_0000_0005, 0x5000),
        (0x12000, 0x13003, "read", 0, 0x6_0000_0007, 0x1000),
        (0x13018, 0x203005, "read", 0, 0x6_0000_0007, 0x3000),  # a walk counts as a write
        (0x13028, 1 << 63 | 0x205007, "fetch", 0, 0x5_0000_0015, 0x5000),
        (0x13028, 1 << 43 | 0x205007, "read", 0, 0x5_0000_000D, 0x5000),
        (0x10000, 0x11087, "read", 0, 0x6_0000_000F, 0x1000),
        (0x12000, 0x2087, "read", 0, 0x6_0000_000F, 0x1000),
    ],
)
def test_nested_tables(address: int, word: int, kind: str, virtual: int, code: int, gpa: int) -> None:
    """Guest pages 5 and 8 fail the RMP as well: the nested tables come first."""
    cpu = vcpu()
    cpu.host[address] = word
    cpu.rmp.rmpupdate(0x205, 5, True, 2)
    cpu.rmp.rmpupdate(0x208, 8, True, 2)
    found = cpu.access(virtual, kind)
    assert (found.outcome, found.address) == (("NPF", code), gpa)


def test_nested_no_execute_is_reserved_without_nxe() -> None:
    cpu = vcpu(host_no_execute=False)
    cpu.host[0x13028] |= 1 << 63
    assert cpu.access(0, "read").outcome == ("NPF", 0x5_0000_000D)


def test_the_rmp_speaks_last() -> None:
    cpu = vcpu()
    cpu.rmp.table[0x205].validated = False
    assert (cpu.access(0, "read").outcome, cpu.access(0, "read").address) == (("#VC", 0x404), 0)
    cpu.rmp.rmpupdate(0x208, 8, True, 2)
    assert cpu.access(1, "read").outcome == ("GRANTED", 0)
    assert cpu.access(1, "write").outcome == ("NPF", 0x1_8000_0007)
    cpu.rmp.rmpupdate(0x10, 0, True, 2)
    assert cpu.access(1, "read").outcome == ("NPF", 0x6_8000_0007)


def test_a_d_updates_need_the_right_to_write() -> None:
    cpu = vcpu(vmpl=1)
    for gfn in range(1, 6):
        cpu.rmp.table[0x200 + gfn].vmpl[1] = 1
    assert cpu.access(0, "read").outcome == ("NPF", 0x16_8000_0007)
    for address in (0x201000, 0x202000, 0x203000, 0x204000):
        cpu.guest[address] |= 0x20
    assert cpu.access(0, "read").outcome == ("GRANTED", 0)
    assert cpu.access(0, "write").outcome == ("NPF", 0x16_8000_0007)  # D of the leaf


def test_large_leaves() -> None:
    """Guest and nested 2 MB leaves that map virtual page 512 + 7 to guest page 1024 + 7 to system page 1024 + 7."""
    cpu = vcpu()
    assert cpu.rmp.rmpupdate(1024, 1024, True, 1, large=True) == 0
    assert cpu.rmp.pvalidate(1024, 1024, 1, True, large=True) == (0, False)
    cpu.guest[0x203008] = C | 0x400087
    cpu.host[0x12010] = 0x400087
    found = cpu.access(519, "write")
    assert (found.outcome, found.page, found.gfn, found.mapping) == (("GRANTED", 0), 1031, 1031, MB2)
    assert cpu.updates[-2:] == [("guest", 0x203008, 0x60), ("nested", 0x12010, 0x60)]

    cpu.guest[0x202000] = C | 0x87  # a guest leaf of 1 GB above
    assert cpu.access(1031, "read").page == 1031

    cpu.host[0x11000] = 0x87  # a nested leaf of 1 GB: checked as 2 MB
    assert cpu.physical(1031, "read", True, 0) == (1031, GB1)
    assert cpu.rmp.psmash(1024) == 0
    with pytest.raises(Fault) as fault:
        cpu.physical(1031, "read", True, 0)
    assert fault.value.result.outcome == ("NPF", 0x5_8000_0005)


def test_virtual_tom() -> None:
    cpu = vcpu(virtual_tom=0x8000)
    cpu.guest |= {0x201000: 0x2007, 0x202000: 0x3007, 0x203000: 0x4007, 0x204000: 0x5007}
    assert [cpu.access(page, "read").private for page in (0, 1)] == [True, False]


def test_a_guest_without_sev_has_no_c_bit() -> None:
    cpu = vcpu(actor="guest")
    cpu.rmp = ReferenceRmp(0)
    cpu.cr3 = 0x1000
    assert cpu.access(1, "read").outcome == ("#PF", 9)
    cpu.guest = {address: word & ~C for address, word in cpu.guest.items()}
    assert cpu.access(0, "write").outcome == ("GRANTED", 0)
    del cpu.host[0x13028]
    assert cpu.access(0, "fetch").outcome == ("NPF", 0x1_0000_0014)
