"""MSRs of a core and of a guest: who has which register on which product, and what SNPEn locks.

`ROWS` is written from the manual's table, beside `MSR_FACTS` and not from it.
"""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.hardware.exits import GeneralProtection
from snpbook.hardware.msr import GuestMsrs, Msrs, bios_settings, first_disagreement
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.msr import SAME_ON_ALL_CORES, SYSCFG_BIOS, Msr
from snpbook.spec.products import product
from snpbook.spec.vmsa import reset_vmsa

ALL, SNP, GP = "naples rome milan genoa turin", "milan genoa turin", "#GP"
SNP_ON = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25
RMP = RmpRange(0x7E00000, 0x7EFFFFF)
VTOM_FEATURE, TSC_FEATURE, AVIC_FEATURE = 1 << 1, 1 << 9, 1 << 16
ALL_FEATURES = 0x21FFFF

# Number: (products of the host's, read, write before SNP, write once SNP is on), (products of a guest's, the feature
# it needs, read, write). "ok" a value or an effect, "-" no effect.
_LOCKED = (ALL, "ok", "ok", GP), None
_PLAIN = (ALL, "ok", "ok", "ok"), None
_NOWHERE = None, None
ROWS: dict[int, tuple[Any, Any]] = {
    **dict.fromkeys([0x250, 0x258, 0x259, *range(0x268, 0x270)], _LOCKED),
    **dict.fromkeys([0xC0010016, 0xC0010017, 0xC0010018, 0xC0010019, 0xC001001A, 0xC001001D, 0xC0010119], _LOCKED),
    **dict.fromkeys([0xC0010015, 0xC0010112, 0xC0010113, 0xC0010117, 0xC0011030, 0xC0011033], _PLAIN),
    0xC0010010: ((ALL, "ok", "ok", "-"), None),
    0xC001011E: (("naples rome milan", GP, "ok", "ok"), None),
    0xC001011F: _NOWHERE,
    0xC0010130: (None, (ALL, 0, "ok", "ok")),
    0xC0010131: ((ALL, "ok", GP, GP), (ALL, 0, "ok", GP)),
    0xC0010132: ((SNP, "ok", "ok", "-"), None),
    0xC0010133: ((SNP, "ok", "ok", "-"), None),
    0xC0010134: (None, (SNP, TSC_FEATURE, "ok", GP)),
    0xC0010135: (None, ("genoa turin", VTOM_FEATURE, "ok", "ok")),
    0xC0010136: (("turin", "ok", "ok", GP), None),
    0xC0010138: (None, ("turin", AVIC_FEATURE, "ok", "ok")),
    0xC0011006: ((ALL, "ok", GP, GP), None),
    0xC001F000: _NOWHERE,
    0xC001F001: _NOWHERE,
    0xC001F002: _NOWHERE,
    0xC0010199: _NOWHERE,  # no register of the model
}
# A value that differs from what the BIOS left and that the register can hold.
VALUES = {
    0xC0010133: 0x3FFFFF,
    0xC0010010: SYSCFG_BIOS | 1 << 19,
    0xC0010015: 0x11,
    0xC001011E: 0x5000001,
    0xC0010136: 0x2401,
}
CASES = [(number, name) for number in ROWS for name in ALL.split()]
IDS = [f"{number:#x}-{name}" for number, name in CASES]


class Board:
    """What a core asks of its machine: the RMP, and a cache that knows one mapped page."""

    def __init__(self) -> None:
        self.owned = True
        self.flushed: list[tuple[int, int]] = []

    def owns(self, spa: int) -> bool:
        return self.owned

    def flush(self, address: int, asid: int) -> bool:
        if address >= 1 << 40:
            return False
        self.flushed.append((address, asid))
        return True


def make(name: str, board: Board | None = None) -> Msrs:
    board, p = board or Board(), product(name)
    bios = bios_settings(p, 0x8000000, 0x8000000, (0x7F00000, 0x8000000), RMP)
    return Msrs(p, bios, hypervisor_owns=board.owns, flush_guest_page=board.flush)


def make_guest(name: str, features: int, *, sev: bool = True, sev_es: bool = True) -> GuestMsrs:
    registers = dict(reset_vmsa(0xFFFFFFF0, 0, features))
    return GuestMsrs(product(name), registers, sev, sev_es, 0, 2400, lambda: None)


def attempt(action: Any, *arguments: int) -> str:
    """What an access comes to."""
    try:
        action(*arguments)
    except GeneralProtection as refused:
        return GP if refused.rule and refused.cite else "#GP without a reason"
    return "ok"


def write(msrs: Msrs, number: int) -> str:
    """Write another value: what it comes to, `-` where the register keeps its own."""
    value = VALUES.get(number, 0x200000)
    result = attempt(msrs.wrmsr, number, value)
    if result == "ok" and number not in (0xC001011E, 0xC0010119) and msrs.rdmsr(number) != value:
        return "-"
    return result


@pytest.mark.parametrize(("number", "name"), CASES, ids=IDS)
def test_host(number: int, name: str) -> None:
    names, *expected = ROWS[number][0] or ("", GP, GP, GP)
    if name not in names.split():
        expected = [GP, GP, GP]
    found = [attempt(make(name).rdmsr, number), write(make(name), number)]
    if name in SNP.split():
        msrs = make(name)
        msrs.wrmsr(Msr.SYSCFG, SNP_ON)
        assert msrs.snp_enabled
        found.append(write(msrs, number))
    assert found == expected[: len(found)]


@pytest.mark.parametrize(("number", "name"), CASES, ids=IDS)
def test_guest(number: int, name: str) -> None:
    names, feature, *expected = ROWS[number][1] or ("", 0, GP, GP)
    if name not in names.split():
        expected = [GP, GP]
    for features, outcome in [(ALL_FEATURES, expected), (ALL_FEATURES & ~feature, [GP, GP] if feature else expected)]:
        guest = make_guest(name, features)
        assert [attempt(guest.rdmsr, number), attempt(guest.wrmsr, number, 0x200000)] == outcome


def test_rows_are_every_register() -> None:
    assert set(ROWS) - {0xC0010199} == set(Msr)


@pytest.mark.parametrize("number", [n for n, row in ROWS.items() if row[0] and row[0][3] != "ok"])
def test_refused_write_changes_nothing(number: int) -> None:
    msrs = make("turin")
    msrs.wrmsr(Msr.SYSCFG, SNP_ON)
    before = {msr: msrs.rdmsr(msr) for msr in Msr if attempt(msrs.rdmsr, msr) == "ok"}
    write(msrs, number)
    assert {msr: msrs.rdmsr(msr) for msr in before} == before


def test_snp_does_not_go_off_again() -> None:
    msrs = make("milan")
    msrs.wrmsr(Msr.SYSCFG, SNP_ON)
    msrs.wrmsr(Msr.SYSCFG, 0)
    assert msrs.rdmsr(Msr.SYSCFG) == SNP_ON


def test_locks_are_per_core() -> None:
    one, other = make("milan"), make("milan")
    one.wrmsr(Msr.SYSCFG, SNP_ON)
    other.wrmsr(Msr.TOP_MEM, 0)
    assert other.rdmsr(Msr.TOP_MEM) == 0


@pytest.mark.parametrize("name", ["naples", "rome"])
@pytest.mark.parametrize("bit", [24, 25])
def test_no_snp_without_the_capability(name: str, bit: int) -> None:
    msrs = make(name)
    with pytest.raises(GeneralProtection, match="SYSCFG: reserved bits"):
        msrs.wrmsr(Msr.SYSCFG, 1 << bit)
    assert msrs.rdmsr(Msr.SYSCFG) == 0xF40000


@pytest.mark.parametrize(
    ("number", "value"),
    [(0xC0010010, 1 << 17), (0xC0010010, 1 << 32), (0xC0010117, 1), (0xC0010117, 1 << 52), (0xC0010132, 1 << 52),
     (0xC0010133, 1 << 63), (0xC0010136, 2), (0xC0010136, 1 << 14)],
)  # fmt: skip
def test_reserved_bits_of_the_host(number: int, value: int) -> None:
    with pytest.raises(GeneralProtection, match="reserved bits"):
        make("turin").wrmsr(number, value)


@pytest.mark.parametrize(
    ("number", "value"),
    [(0xC0010135, 1 << 20), (0xC0010135, 1 << 52), (0xC0010138, 1 << 2), (0xC0010138, 1 << 52)],
)
def test_reserved_bits_of_a_guest(number: int, value: int) -> None:
    guest = make_guest("turin", ALL_FEATURES)
    with pytest.raises(GeneralProtection, match="reserved bits"):
        guest.wrmsr(number, value)
    assert guest.rdmsr(number) == 0


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1 << 64, ValueError), (1.0, TypeError)])
def test_values_that_no_register_holds(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="value = "):
        make("milan").wrmsr(Msr.HWCR, value)
    with pytest.raises(error, match="value = "):
        make_guest("milan", 1).wrmsr(Msr.GHCB, value)


def test_page_flush() -> None:
    board = Board()
    msrs = make("rome", board)
    msrs.wrmsr(Msr.VMPAGE_FLUSH, 0x12345_001)
    assert board.flushed == [(0x12345000, 1)]
    for bad in (0x12345_000, 1 << 40 | 1):  # ASID 0; unmapped
        with pytest.raises(GeneralProtection, match="VMPAGE_FLUSH"):
            msrs.wrmsr(Msr.VMPAGE_FLUSH, bad)
    assert len(board.flushed) == 1


def test_save_area_is_the_hypervisors_once_snp_is_on() -> None:
    board = Board()
    board.owned = False
    msrs = make("milan", board)
    msrs.wrmsr(Msr.VM_HSAVE_PA, 0x3000 | 1 << 51)
    msrs.wrmsr(Msr.SYSCFG, SNP_ON)
    with pytest.raises(GeneralProtection, match="page of the hypervisor"):
        msrs.wrmsr(Msr.VM_HSAVE_PA, 0x4000)
    assert msrs.rdmsr(Msr.VM_HSAVE_PA) == 0x3000 | 1 << 51


def test_ownership_is_asked_without_the_c_bit() -> None:
    asked: list[int] = []
    msrs = Msrs(
        product("milan"), {}, hypervisor_owns=lambda spa: asked.append(spa) or True, flush_guest_page=lambda *_: True
    )
    msrs.wrmsr(Msr.SYSCFG, SNP_ON)
    msrs.wrmsr(Msr.VM_HSAVE_PA, 0x3000 | 1 << 51)
    assert asked == [0x3000]


def test_smm_lock_stays() -> None:
    msrs = make("milan")
    msrs.wrmsr(Msr.HWCR, 0x10)
    assert msrs.rdmsr(Msr.HWCR) == 0x11
    msrs.set_by_bios({Msr.HWCR: 0})
    assert msrs.rdmsr(Msr.HWCR) == 0


def test_smm_key_cannot_be_read() -> None:
    msrs = make("milan")
    msrs.wrmsr(Msr.SMM_KEY, 0x1234)
    assert msrs.rdmsr(Msr.SMM_KEY) == 0


def test_debug_status_shows_where_the_threads_are() -> None:
    msrs = make("genoa")
    assert msrs.rdmsr(Msr.DEBUG_STATUS) == 0
    msrs.in_guest = True
    assert msrs.rdmsr(Msr.DEBUG_STATUS) == 1 << 2
    msrs.in_smm, msrs.in_guest = True, False
    assert msrs.rdmsr(Msr.DEBUG_STATUS) == 1 << 7


def test_bios_settings() -> None:
    msrs = make("milan")
    found = {msr.name: msrs.rdmsr(msr) for msr in (Msr.SYSCFG, Msr.HWCR, Msr.RMP_BASE, Msr.RMP_END, Msr.TOP_MEM)}
    assert found == {
        "SYSCFG": 0xF40000, "HWCR": 1, "RMP_BASE": 0x7E00000, "RMP_END": 0x7EFFFFF, "TOP_MEM": 0x8000000,
    }  # fmt: skip
    assert msrs.rdmsr(Msr.TOP_MEM2) == 0
    base, mask = msrs.rdmsr(Msr.TSEG_BASE), msrs.rdmsr(Msr.TSEG_MASK)
    inside = [address & mask & ~0xFFF == base for address in (0x7EFFFFF, 0x7F00000, 0x7FFFFFF, 0x8000000)]
    assert inside == [False, True, True, False]
    large = bios_settings(product("rome"), 0x80000000, 0x180000000, (0x7F000000, 0x80000000), RMP)
    assert large[Msr.TOP_MEM2] == 0x180000000
    assert Msr.RMP_BASE not in large


def test_bios_cannot_set_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"EPYC 7002 \(Rome\) has no RMP_BASE"):
        make("rome").set_by_bios({Msr.RMP_BASE: 0})


@pytest.mark.parametrize("msr", SAME_ON_ALL_CORES, ids=lambda msr: msr.name)
def test_each_compared_register_can_disagree(msr: Msr) -> None:
    cores = [make("genoa") for _ in range(8)]  # two sockets of four
    assert first_disagreement(cores) is None
    if msr is Msr.DEBUG_STATUS:
        cores[5].in_guest = True
    else:
        cores[5].set_by_bios({msr: cores[5].rdmsr(msr) ^ 0x100000})
    found = first_disagreement(cores)
    assert found is not None
    assert found[0] is msr
    assert [i for i, value in enumerate(found[1]) if value != found[1][0]] == [5]


def test_other_registers_may_disagree_or_are_named() -> None:
    cores = [make("genoa"), make("genoa")]
    cores[1].set_by_bios({Msr.RMP_BASE: 0x7D00000})
    assert first_disagreement(cores) is None
    assert first_disagreement(cores, (Msr.RMP_BASE,)) == (Msr.RMP_BASE, [0x7E00000, 0x7D00000])


@pytest.mark.parametrize(
    ("sev", "sev_es", "features", "status"),
    [(False, False, 0, 0), (True, False, 1, 1), (True, True, 0, 3), (True, True, 1, 7), (True, True, 0x201, 0x807)],
)
def test_status_of_a_guest(sev: bool, sev_es: bool, features: int, status: int) -> None:
    assert make_guest("genoa", features, sev=sev, sev_es=sev_es).rdmsr(Msr.SEV_STATUS) == status


def test_a_guest_without_encrypted_registers_has_no_ghcb() -> None:
    guest = make_guest("genoa", 0, sev_es=False)
    with pytest.raises(GeneralProtection, match="GHCB in a guest"):
        guest.wrmsr(Msr.GHCB, 0x1000)


@pytest.mark.parametrize(("sev", "sev_es"), [(False, True), (True, False)])
def test_features_need_encrypted_registers(sev: bool, sev_es: bool) -> None:
    guest = make_guest("genoa", 1 | VTOM_FEATURE, sev=sev, sev_es=sev_es)
    with pytest.raises(GeneralProtection, match="VIRTUAL_TOM on"):
        guest.rdmsr(Msr.VIRTUAL_TOM)


def test_ghcb_keeps_what_is_written() -> None:
    guest = make_guest("milan", 1)
    guest.wrmsr(Msr.GHCB, 0x2000)
    assert guest.ghcb == guest.rdmsr(Msr.GHCB) == 0x2000


def test_clock_of_a_guest() -> None:
    guest = make_guest("genoa", 1 | TSC_FEATURE)
    guest.registers["guest_tsc_scale"] = 3 << 31  # 1.5 in 8.32 fixed point
    assert guest.rdmsr(Msr.GUEST_TSC_FREQ) == 3600


def test_virtual_tom_lives_in_the_vmsa_and_flushes() -> None:
    flushes: list[None] = []
    guest = make_guest("genoa", 1 | VTOM_FEATURE)
    guest.flush_tlb = lambda: flushes.append(None)
    guest.wrmsr(Msr.VIRTUAL_TOM, 0x40000000)
    assert guest.registers["virtual_tom"] == guest.rdmsr(Msr.VIRTUAL_TOM) == 0x40000000
    assert len(flushes) == 1


def test_secure_avic_lives_in_the_vmsa() -> None:
    guest = make_guest("turin", 1 | AVIC_FEATURE)
    guest.wrmsr(Msr.SECURE_AVIC_CONTROL, 0x7003)
    assert guest.registers["secure_avic_control"] == 0x7003


def test_refusals_explain_themselves() -> None:
    with pytest.raises(GeneralProtection) as refused:
        make("milan").rdmsr(Msr.GHCB)
    assert refused.value.explain() == (
        "RDMSR GHCB on the host (expected a register of the host on EPYC 7003 (Milan), found GHCB) "
        "[APM2 15.34.10, 15.36.2]"
    )
    with pytest.raises(GeneralProtection, match=r"WRMSR SEV_STATUS on the host \(expected writable, found read-only\)"):
        make("milan").wrmsr(Msr.SEV_STATUS, 0)
    with pytest.raises(GeneralProtection, match="0xc0010199"):
        make("milan").rdmsr(0xC0010199)
