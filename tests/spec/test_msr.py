"""Register numbers and fields of the MSRs, against the numbers that Linux and the firmware print."""

import pytest

from snpbook.spec import msr as spec
from snpbook.spec.msr import MSR_FACTS, SAME_ON_ALL_CORES, Msr
from snpbook.spec.sev_features import REQUIRED_CAPABILITY, SevFeatures, sev_status

# The 22 that firmware 1.55.25 compares.
COMPARED = [
    0xC0010010, 0xC0011006, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
    0xC0010016, 0xC0010017, 0xC0010018, 0xC0010019, 0xC001001A, 0xC001001D, 0xC0010112, 0xC0010113, 0xC0010015,
]  # fmt: skip
STATUS_BITS = {
    "SNP_ACTIVE": 2, "VIRTUAL_TOM": 3, "REFLECT_VC": 4, "RESTRICTED_INJECTION": 5, "ALTERNATE_INJECTION": 6,
    "DEBUG_VIRTUALIZATION": 7, "PREVENT_HOST_IBS": 8, "BTB_ISOLATION": 9, "VMPL_SSS": 10, "SECURE_TSC": 11,
    "VMGEXIT_PARAMETER": 12, "PMC_VIRTUALIZATION": 13, "IBS_VIRTUALIZATION": 14, "GUEST_INTERCEPT_CTL": 15,
    "VMSA_REG_PROT": 16, "SMT_PROTECTION": 17, "SECURE_AVIC": 18, "IBPB_ON_ENTRY": 23,
}  # fmt: skip


def test_every_register_has_facts() -> None:
    assert set(MSR_FACTS) == set(Msr)


def test_the_firmware_compares_22_registers() -> None:
    assert list(SAME_ON_ALL_CORES) == COMPARED
    assert len(set(COMPARED)) == 22


def test_syscfg_of_a_rome_host() -> None:
    fields = dict(spec.SYSCFG.unpack((0xF40000).to_bytes(8, "little")))
    assert spec.SYSCFG_BIOS == 0xF40000
    assert [name for name, on in fields.items() if not on] == ["mtrr_fix_dram_mod_en", "snp_en", "vmpl_en"]


def test_syscfg_bits() -> None:
    masks = spec.SYSCFG_MFDM, spec.SYSCFG_MEM_ENCRYPT, spec.SYSCFG_SNP_EN, spec.SYSCFG_VMPL_EN
    assert masks == (1 << 19, 1 << 23, 1 << 24, 1 << 25)


@pytest.mark.parametrize("name", STATUS_BITS)
def test_status_bit_of_a_feature(name: str) -> None:
    assert sev_status(sev=True, sev_es=True, features=SevFeatures[name]) == 0b11 | 1 << STATUS_BITS[name]


def test_status_bits_are_all_features() -> None:
    assert list(STATUS_BITS) == [feature.name for feature in SevFeatures]
    assert set(REQUIRED_CAPABILITY) == set(SevFeatures)


def test_status_without_sev_or_registers() -> None:
    assert sev_status(sev=False, sev_es=False) == sev_status(sev=False, sev_es=True, features=1) == 0
    assert sev_status(sev=True, sev_es=False, features=1) == 1
    assert sev_status(sev=True, sev_es=True) == 3


def test_reserved_feature_bits_do_not_show() -> None:
    assert sev_status(sev=True, sev_es=True, features=2**64 - 1) == 0x87FFFF
