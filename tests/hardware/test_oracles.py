"""The slow oracles of RMP and access checks, held against the documents' numbers and expectations worked by hand."""

from dataclasses import replace
from typing import Any

import pytest

from tests.reference.access import access, instruction_fault
from tests.reference.rmp import Entry, ReferenceRmp

MB2, GB1 = 512, 512 * 512
"""4 KB pages in a mapping."""

VALID_2MB = 0x4018000049800003
"""2 MB, validated, ASID 3, GPA 0x4980_0000."""


@pytest.mark.parametrize(
    ("entry", "low", "state"),
    [
        (Entry(), 0, "HYPERVISOR"),
        (Entry(immutable=True), 0x4, "HV_FIXED"),
        (Entry(assigned=True, immutable=True, lock=True), 0x8000000000000005, "FIRMWARE"),
        (Entry(assigned=True, immutable=True, lock=True, vmsa=True), 0xA000000000000005, "CONTEXT"),
        (Entry(assigned=True, immutable=True, lock=True, gfn=2 << 36 | 1), 0x8002000000001005, "FIRMWARE_IOMMU"),
        (Entry(assigned=True), 0x1, "RECLAIM"),
        (Entry(assigned=True, asid=1, gfn=1), 0x0008000000001001, "GUEST_INVALID"),
        (Entry(assigned=True, asid=1, gfn=1, validated=True), 0x4008000000001001, "GUEST_VALID"),
        (Entry(assigned=True, large=True, asid=3, gfn=0x49800, validated=True), VALID_2MB, "GUEST_VALID"),
        (Entry(assigned=True, immutable=True, asid=5, gfn=0xFFFFFFFFF), 0x0028FFFFFFFFF005, "PRE_GUEST"),
        (Entry(assigned=True, asid=5, gfn=0xFFFFFFFFF, validated=True, vmsa=True), 0x6028FFFFFFFFF001, "GUEST_VALID"),
        (Entry(assigned=True, immutable=True, lock=True, gfn=1 << 36 | 0x123456), 0x8001000123456005, "METADATA"),
        (Entry(subpages=3), 0x18, "HYPERVISOR"),
    ],
)
def test_quadwords_and_states(entry: Entry, low: int, state: str) -> None:
    assert entry.raw() == (low, 0)
    assert entry.state() == state


# Instructions.


def large_guest() -> ReferenceRmp:
    """Pages 512 to 1023 are one validated 2 MB page of ASID 3 at GPA 0x4980_0000; 1024 to 1535 the hypervisor's."""
    rmp = ReferenceRmp(1536)
    assert rmp.rmpupdate(512, 0x49800, True, 3, large=True) == 0
    assert rmp.pvalidate(512, 0x49800, 3, True, large=True) == (0, False)
    return rmp


def small_guest() -> ReferenceRmp:
    """Page 7 is a validated 4 KB page of ASID 1 at guest page 9; nothing else is assigned."""
    rmp = ReferenceRmp(1024)
    assert rmp.rmpupdate(7, 9, True, 1) == 0
    assert rmp.pvalidate(7, 9, 1, True) == (0, False)
    return rmp


def test_psmash() -> None:
    rmp = large_guest()
    rmp.table[512].vmpl = [15, 5, 1, 0]
    assert rmp.psmash(512) == 0
    pages = [rmp.table[page].raw() for page in (512, 513, 1023)]
    assert pages == [(0x4018000049800FF9, 0x1050F), (0x4018000049801001, 0x1050F), (0x40180000499FF001, 0x1050F)]
    assert rmp.counters == {3: 512}
    before = [rmp.table[page].raw() for page in range(512, 1024)]
    rmp.recount()
    assert before == [rmp.table[page].raw() for page in range(512, 1024)]
    rmp.table[513].vmpl[1] = 0
    assert rmp.table[512].vmpl[1] == rmp.table[514].vmpl[1] == 5


def test_refusals_of_psmash_in_their_order() -> None:
    rmp = large_guest()
    rmp.in_use = {512, 1535}
    assert rmp.psmash(513, current_asid=1) == 1
    assert rmp.psmash(512, current_asid=1) == rmp.psmash(1536, current_asid=1) == 2
    assert rmp.psmash(1536) == 1
    assert rmp.psmash(512) == rmp.psmash(1024) == 3
    rmp.in_use = set()
    assert rmp.psmash(1024) == rmp.psmash(0) == 7
    rmp.entry(0).immutable = True
    assert rmp.psmash(0) == 7
    rmp.table[512].immutable = True
    assert rmp.psmash(512) == 2
    rmp.table[512].immutable = False
    assert (rmp.psmash(512), rmp.psmash(512)) == (0, 7)


def test_rmpread() -> None:
    rmp = large_guest()
    assert rmp.rmpupdate(1025, 0xFFFFFFFFF, True, 5, immutable=True) == 0
    assert rmp.rmpread(1025) == (0, bytes.fromhex("00f0ffffffff0000 01 00 01 00 05000000"))
    assert rmp.rmpread(1024) == (0, bytes.fromhex("0000000000000000 00 02 00 00 00000000"))
    assert rmp.rmpread(512) == (0, bytes.fromhex("0000804900000000 01 01 00 00 03000000"))
    assert rmp.rmpread(513) == (0, bytes.fromhex("0000000000000000 01 00 00 00 00000000"))
    assert rmp.rmpread(1536) == (1, b"")
    assert rmp.rmpread(1536, current_asid=1) == rmp.rmpread(512, current_asid=1) == (2, b"")


def test_guest_mode_comes_first_for_rmpupdate() -> None:
    assert ReferenceRmp(512).rmpupdate(513, 0, False, 5, large=True, current_asid=1) == 2


def test_rmpadjust() -> None:
    rmp = small_guest()
    entry = rmp.table[7]
    assert rmp.rmpadjust(7, 9, 1, 0, 1, 0b0011, vmsa=True) == 0
    assert (entry.vmpl, entry.vmsa) == ([15, 3, 0, 0], True)
    assert rmp.rmpadjust(7, 9, 1, 1, 3, 0b0001, vmsa=False) == 0  # VMPL1 may not touch VMSA
    assert (entry.vmpl, entry.vmsa) == ([15, 3, 0, 1], True)
    assert rmp.rmpadjust(7, 9, 1, 1, 2, 0b0101) == 2  # VMPL1 lacks X
    assert rmp.rmpadjust(7, 9, 1, 0, 1, 0b10000) == 2  # nobody holds SSS
    assert (entry.vmpl, entry.vmsa) == ([15, 3, 0, 1], True)


def test_refusals_of_rmpadjust_in_their_order() -> None:
    """Everything is wrong at the start and is mended one by one, in the order of the sheet."""
    rmp = ReferenceRmp(512)
    entry = rmp.entry(7)
    entry.immutable = True
    order: list[int | str] = []

    def attempt(page: int = 7, target: int = 3, large: bool = True, virtual: int = 0) -> None:
        order.append(rmp.rmpadjust(page, 9, 1, 2, target, 0b1, large=large, virtual=virtual))

    attempt(512, 2, virtual=1)
    attempt(512, 2)
    attempt(512, 4)
    attempt(512)
    attempt()
    entry.assigned, entry.asid = True, 1
    attempt()
    entry.gfn = 9
    attempt()
    entry.immutable = False
    attempt()
    entry.validated = True
    attempt()
    attempt(large=False)
    entry.vmpl[2] = 0b1
    attempt(large=False)
    assert order == [1, 2, 1, "NOT_COVERED", "NOT_GUEST_OWNED", "REVERSE_MAP", "IMMUTABLE", "NOT_VALIDATED", 6, 2, 0]

    large = large_guest()
    large.table[512].validated = False
    assert large.rmpadjust(513, 0x49801, 3, 0, 1, 1) == "PAGE_SIZE"  # before Validated
    assert large.rmpadjust(512, 0x49800, 3, 0, 1, 1, large=True) == "NOT_VALIDATED"
    assert large.pvalidate(512, 0x49800, 3, True, large=True, virtual=1) == (1, False)


def test_rmpquery() -> None:
    rmp = large_guest()
    rmp.table[512].vmpl, rmp.table[512].vmsa = [15, 5, 1, 0], True
    assert rmp.rmpquery(700, 0x49800 + 188, 3, 0, 1) == (0, True, 5, True)
    assert rmp.rmpquery(512, 0x49800, 3, 1, 2) == (0, True, 1, True)
    refused = [rmp.rmpquery(512, 0x49800, 3, current, target)[0] for current, target in ((1, 0), (1, 1), (0, 4))]
    assert refused == [2, 2, 2]
    assert rmp.rmpquery(1536, 0, 3, 0, 1)[0] == "NOT_COVERED"
    assert rmp.rmpquery(512, 0x49801, 3, 0, 1)[0] == "REVERSE_MAP"
    rmp.table[512].validated = False
    assert rmp.rmpquery(512, 0x49800, 3, 0, 1) == ("NOT_VALIDATED", False, 0, False)


# Access checks. Page 7 is the guest's, 8 the hypervisor's with a guest's page in its 2 MB, 600 far from any.

HOST = [
    ("read", 7, 1, ("GRANTED", 0)),
    ("fetch", 7, 1, ("GRANTED", 0)),
    ("write", 7, 1, ("#PF", 0x8000_0003)),
    ("walk", 7, 1, ("#PF", 0x8000_0001)),
    ("ad-update", 7, 1, ("#PF", 0x8000_0003)),
    ("write", 8, 1, ("GRANTED", 0)),
    ("write", 8, MB2, ("#PF", 0x8000_0003)),
    ("write", 8, GB1, ("#PF", 0x8000_0003)),
    ("ad-update", 8, MB2, ("GRANTED", 0)),
    ("walk", 8, MB2, ("GRANTED", 0)),
    ("write", 600, GB1, ("GRANTED", 0)),
    ("write", 5000, 1, ("GRANTED", 0)),
]


@pytest.mark.parametrize(("kind", "page", "mapping", "outcome"), HOST)
def test_host(kind: str, page: int, mapping: int, outcome: tuple[str, int]) -> None:
    assert access("host", kind, False, small_guest(), page, mapping=mapping) == outcome


def test_host_at_cpl3_and_a_neighbour_in_a_2_mb_entry() -> None:
    assert access("host", "write", False, small_guest(), 7, cpl=3) == ("#PF", 0x8000_0007)
    assert access("host", "write", False, large_guest(), 1023) == ("#PF", 0x8000_0003)


def test_device() -> None:
    rmp = small_guest()
    pages = [(kind, page) for kind in ("read", "write") for page in (7, 8)]
    found = [access("device", kind, False, rmp, page)[0] for kind, page in pages]
    assert found == ["GRANTED", "GRANTED", "IOMMU", "GRANTED"]
    assert access("device", "write", False, rmp, 8, mapping=MB2) == ("IOMMU", 0)


@pytest.mark.parametrize(
    ("actor", "kind", "c_bit", "outcome"),
    [
        ("guest", "read", False, ("GRANTED", 0)),
        ("guest", "fetch", False, ("GRANTED", 0)),
        ("guest", "write", False, ("NPF", 0x1_8000_0007)),
        ("guest", "write", True, ("NPF", 0x1_8000_0007)),
        ("guest", "walk", False, ("NPF", 0x2_8000_0007)),
        ("sev", "write", True, ("NPF", 0x5_8000_0007)),
        ("sev-es", "write", False, ("NPF", 0x1_8000_0007)),
        ("sev-es", "ad-update", False, ("NPF", 0x6_8000_0007)),
        ("snp", "read", False, ("GRANTED", 0)),
        ("snp", "write", False, ("NPF", 0x1_8000_0007)),
    ],
)
def test_guests_by_hypervisor_owned(actor: str, kind: str, c_bit: bool, outcome: tuple[str, int]) -> None:
    assert access(actor, kind, c_bit, small_guest(), 7, 9, 1) == outcome
    assert access(actor, kind, c_bit, small_guest(), 600, 9, 1) == ("GRANTED", 0)
    large = "NPF" if outcome[0] == "NPF" and kind != "ad-update" else "GRANTED"  # its neighbour, 2 MB
    assert access(actor, kind, c_bit, small_guest(), 8, 9, 1, mapping=GB1)[0] == large


def test_checks_of_private_accesses_in_their_order() -> None:
    """All is wrong at the start; each step mends the check that answered."""
    rmp = ReferenceRmp(1024)
    entry = rmp.entry(512)
    entry.immutable, entry.large = True, True
    order = [access("snp", "read", True, rmp, 1024, 9, 1)]

    def attempt(mapping: int = 1) -> None:
        order.append(access("snp", "read", True, rmp, 512, 9, 1, mapping=mapping))

    attempt()
    entry.assigned = True
    attempt()
    entry.asid = 1
    attempt()
    entry.gfn = 9
    attempt()
    entry.immutable = False
    attempt()
    attempt(MB2)
    entry.validated = True
    attempt(GB1)
    entry.vmpl[0] = 1
    attempt(GB1)
    assert order == [("NPF", 0x5_8000_0005)] * 6 + [("#VC", 0x404), ("NPF", 0x15_8000_0005), ("GRANTED", 0)]


@pytest.mark.parametrize(
    ("kind", "cpl", "needs", "refused"),
    [
        ("read", 0, 0b1, 0x15_8000_0005),
        ("write", 0, 0b11, 0x15_8000_0007),
        ("fetch", 3, 0b100, 0x15_8000_0015),
        ("fetch", 2, 0b1000, 0x15_8000_0015),
        ("walk", 3, 0b1, 0x16_8000_0007),
        ("ad-update", 3, 0b11, 0x16_8000_0007),
        ("shadow-stack read", 0, 0b10001, 0x15_8000_0045),
        ("shadow-stack write", 0, 0b10011, 0x15_8000_0047),
    ],
)
def test_permissions(kind: str, cpl: int, needs: int, refused: int) -> None:
    """Every byte of a VMPL: granted just where it holds what is needed. C = 0 is nothing to a fetch or a walk."""
    rmp = small_guest()
    c_bit = kind not in ("fetch", "walk", "ad-update")
    for rights in range(32):
        rmp.table[7].vmpl[1] = rights
        sss_alone = needs & 16 and needs & ~16 & ~rights == 0
        expected = (
            ("GRANTED", 0) if rights & needs == needs else ("NPF", refused | (0x20_0000_0000 if sss_alone else 0))
        )
        assert access("snp", kind, c_bit, rmp, 7, 9, 1, vmpl=1, cpl=cpl) == expected, bin(rights)
        plain = access("snp", kind, c_bit, rmp, 7, 9, 1, vmpl=1, cpl=cpl, vmpl_sss=False)
        assert (plain == ("GRANTED", 0)) == (rights & needs & 15 == needs & 15)


@pytest.mark.parametrize("wrong", [{"assigned": False}, {"asid": 2}, {"gfn": 8}, {"immutable": True}, {"large": True}])
def test_each_check_refuses_alone(wrong: dict[str, Any]) -> None:
    rmp = ReferenceRmp(1024)
    rmp.table[512] = Entry(assigned=True, asid=1, gfn=9, validated=True, vmpl=[15, 0, 0, 0])
    assert access("snp", "write", True, rmp, 512, 9, 1) == ("GRANTED", 0)
    rmp.entries = 512
    assert access("snp", "write", True, rmp, 512, 9, 1) == ("NPF", 0x5_8000_0007)
    rmp.entries = 1024
    rmp.table[512] = replace(rmp.table[512], **wrong)
    assert access("snp", "write", True, rmp, 512, 9, 1) == ("NPF", 0x5_8000_0007)


def test_a_2_mb_entry_speaks_for_its_512_pages() -> None:
    rmp = large_guest()
    assert access("snp", "write", True, rmp, 1023, 0x49800 + 511, 3, mapping=MB2) == ("GRANTED", 0)
    assert access("snp", "write", True, rmp, 1023, 0x49800 + 511, 3) == ("NPF", 0x5_8000_0007)
    assert access("snp", "write", True, rmp, 1023, 0x49800 + 510, 3, mapping=MB2) == ("NPF", 0x5_8000_0007)


def test_faults_of_instructions() -> None:
    assert instruction_fault("NOT_VALIDATED") == ("#VC", 0x404)
    assert instruction_fault("REVERSE_MAP") == ("NPF", 0x5_8000_0005)
    assert instruction_fault("PAGE_SIZE") == ("NPF", 0xD_8000_0005)
