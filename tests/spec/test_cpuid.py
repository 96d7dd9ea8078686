"""Register vectors read off real machines, and what their fields say."""

import pytest

from snpbook.spec.cpuid import ENCRYPTED_MEMORY, SEGMENTED_RMP, Registers, SevCapability

# (EAX, EBX, ECX, EDX): C-bit, reduction, VMPLs, ASIDs, lowest ASID without ES.
VECTORS = {
    "rome host": ((0x0001000F, 0x0000016F, 0x000001FD, 0x00000001), (47, 5, 0, 509, 1)),
    "milan host": ((0x0101FD3F, 0x00004173, 0x000001FD, 0x00000080), (51, 5, 4, 509, 128)),
    "milan host, all ASIDs for ES": ((0x0101FD3F, 0x00004173, 0x000001FD, 0x000001FE), (51, 5, 4, 509, 510)),
    "genoa host": ((0x030FFFFB, 0x000041B3, 0x000003EE, 0x00000001), (51, 6, 4, 1006, 1)),
    "snp guest": ((0x0000001A, 0x00000073, 0, 0), (51, 1, 0, 0, 0)),
}
FIELDS = ("c_bit", "address_reduction", "vmpls", "asid_limit", "min_sev_asid")
BITS = [
    "SME",
    "SEV",
    "PAGE_FLUSH_MSR",
    "SEV_ES",
    "SEV_SNP",
    "VMPL",
    "RMPQUERY",
    "VMPL_SSS",
    "SECURE_TSC",
    "TSC_AUX_VIRTUALIZATION",
    "HW_ENF_CACHE_COH",
    "HOST_64BIT",
    "RESTRICTED_INJECTION",
    "ALTERNATE_INJECTION",
    "DEBUG_VIRTUALIZATION",
    "PREVENT_HOST_IBS",
    "VTE",
    "VMGEXIT_PARAMETER",
    "VIRTUAL_TOM_MSR",
    "IBS_VIRTUALIZATION",
    "PMC_VIRTUALIZATION",
    "RMPREAD",
    "GUEST_INTERCEPT_CTL",
    "SEGMENTED_RMP",
    "VMSA_REG_PROT",
    "SMT_PROTECTION",
    "SECURE_AVIC",
    "ALLOWED_SEV_FEATURES",
    "SVSM_COMM_PAGE_MSR",
    "NESTED_VIRT_SNP_MSR",
    "HV_IN_USE_WR_ALLOWED",
    "IBPB_ON_ENTRY",
]


@pytest.mark.parametrize("name", VECTORS)
def test_vector_decodes_and_encodes(name: str) -> None:
    registers, fields = VECTORS[name]
    record = Registers(*registers).decode(ENCRYPTED_MEMORY)
    assert tuple(dict(record)[field] for field in FIELDS) == fields
    assert record.capabilities == registers[0]
    assert Registers.of(record) == registers


def test_bits_are_where_the_manual_has_them() -> None:
    assert [(bit.name, bit.bit_length() - 1) for bit in SevCapability] == [(n, i) for i, n in enumerate(BITS)]


def test_capabilities_of_the_vectors() -> None:
    rome, milan, guest = (SevCapability(VECTORS[name][0][0]) for name in ("rome host", "milan host", "snp guest"))
    assert [bit.name for bit in rome] == ["SME", "SEV", "PAGE_FLUSH_MSR", "SEV_ES", "VTE"]
    assert [bit.name for bit in guest] == ["SEV", "SEV_ES", "SEV_SNP"]
    absent = {"RMPQUERY", "VMPL_SSS", "TSC_AUX_VIRTUALIZATION", "SMT_PROTECTION", *BITS[17:24], *BITS[26:]}
    assert set(BITS) - {bit.name for bit in milan} == absent


def test_software_coherency_bit() -> None:
    assert Registers(ebx=1 << 31).decode(ENCRYPTED_MEMORY).coherency_sfw_no == 1


def test_segmented_rmp_of_a_turin_host() -> None:
    record = Registers(0x00000AA4, 0x00000410).decode(SEGMENTED_RMP)
    assert dict(record) == {"min_segment_size": 36, "max_segment_size": 42, "cached_segments": 16, "cached_only": 1}


def test_registers_show_themselves_in_hexadecimal() -> None:
    assert repr(Registers(0x1000F, 0x16F, 0x1FD, 1)) == "0001000F 0000016F 000001FD 00000001"
