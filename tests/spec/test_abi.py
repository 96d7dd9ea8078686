"""Layouts and numbers against the headers of Linux 6.12, compiled and read back (`abi_linux_6.12.json`)."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from snpbook.spec import ghcb, launch, messages, msr, pages, report, rmp, vmcb, vmsa
from tests.spec.abi import Pair, constants, headers, needs_headers, place

pytestmark = needs_headers

ABSENT = dict.fromkeys(["spec_ctrl", "guest_tsc_scale", "guest_tsc_offset", "reg_prot_nonce", "secure_avic_control"])
BEHIND = {name: None for name, field in vmsa.VMSA.fields.items() if field.offset >= 0x670 or field.offset == 0x3F0}
IN_WORDS = dict.fromkeys([
    "virtual_interrupt", "interrupt_shadow", "exit_code", "exit_int_info", "nested_paging", "sev", "sev_es",
    "sss_check", "vte", "event_injection", "lbr_virtualization", "instruction_bytes", "vmgexit_rax", "vmgexit_cpl",
    "allowed_sev_features", "allowed_sev_features_enable", "guest_sev_features",
])  # fmt: skip
SEQUENCE = dict.fromkeys([*(f"msg_seqno_{i}" for i in range(4)), "ap_jump_table_pa", "guest_usage"])
BEHIND_SEQUENCE = dict.fromkeys([*(f"msg_seqno_high_{i}" for i in range(4)), "os_area_version"])
PAIRS = [
    Pair(
        vmsa.VMSA, "sev_es_save_area", size=0x670, guest_exitinfo1="guest_exit_info_1",
        guest_exitinfo2="guest_exit_info_2", guest_exitintinfo="guest_exit_int_info", guest_exitcode="guest_exit_code",
        eventinj="event_inj", x87_registers="fpreg_x87", xmm="fpreg_xmm", ymm_hi="fpreg_ymm", **ABSENT, **BEHIND,
    ),
    Pair(vmsa.SAVE_AREA, "vmcb_save_area"),
    Pair(
        vmcb.VMCB, "vmcb_control_area", size=0x400, tlb_control="tlb_ctl", avic_apic_bar="avic_vapic_bar",
        clean_bits="clean", avic_logical_table="avic_logical_id", avic_physical_table="avic_physical_id", **IN_WORDS,
    ),
    Pair(ghcb.GHCB, "ghcb_save_area", size=0x408, shared_buffer=None, protocol_version=None, usage=None),
    Pair(launch.SECRETS_PAGE, "snp_secrets_page", imi_en="imien", tsc_factor=None, launch_mit_vector=None,
         **SEQUENCE, **BEHIND_SEQUENCE),
    Pair(launch.CPUID_ENTRY, "snp_cpuid_fn"),
    Pair(launch.CPUID_PAGE, "snp_cpuid_table", size=0xC10, entries="fn"),
    Pair(rmp.RMP_ENTRY, "rmpentry", page_size="pagesize", gfn="gpa", subpage_count="rsvd1", lock="rsvd2",
         **dict.fromkeys([f"vmpl{i}" for i in range(4)])),
    Pair(rmp.RMPUPDATE_STATE, "rmp_state", assigned=None, page_size=None, region_status=None, immutable=None),
    Pair(ghcb.PSC_HEADER, "psc_hdr"),
    Pair(ghcb.PSC_ENTRY, "psc_entry", page_size="pagesize"),
    Pair(messages.MESSAGE_HEADER, "snp_guest_msg_hdr", hdr_size="hdr_sz", msg_size="msg_sz"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_fields_lie_where_the_kernel_has_them(pair: Pair) -> None:
    pair.compare()


def test_fields_that_the_kernel_has_elsewhere() -> None:
    """Parts of other structs, and bit fields that the kernel keeps as masks of a word."""
    structs = {name: struct["fields"] for name, struct in headers()["structs"].items()}
    whole, area, secrets = structs["ghcb"], structs["secrets_os_area"], launch.SECRETS_PAGE
    for ours, theirs in (("shared_buffer",) * 2, ("protocol_version",) * 2, ("usage", "ghcb_usage")):
        field = ghcb.GHCB.fields[ours]
        assert (field.first_bit, field.width) == place(whole[theirs])
    start = structs["snp_secrets_page"]["os_area"][0]
    for name in SEQUENCE:
        first, width = place(area[name])
        assert (secrets.fields[name].first_bit, secrets.fields[name].width) == (first + 8 * start, width)
    state, operand = structs["rmp_state"], rmp.RMPUPDATE_STATE
    assert [operand.offset(name) for name in ("assigned", "page_size", "immutable")] == [
        state[name][0] for name in ("assigned", "pagesize", "immutable")
    ]
    control, fields = structs["vmcb_control_area"], vmcb.VMCB.fields
    assert fields["exit_code"].offset == control["exit_code"][0] == control["exit_code_hi"][0] - 4
    assert {fields[name].offset for name in ("nested_paging", "sev", "sev_es")} == {control["nested_ctl"][0]}


NUMBERS: list[tuple[Any, str]] = [
    *((code, f"SVM_EXIT_{code.name}") for code in vmcb.ExitCode if code.name in ("CPUID", "HLT", "IOIO", "MSR", "NPF")),
    (vmcb.ExitCode.SHUTDOWN, "SVM_EXIT_SHUTDOWN"),
    (vmcb.ExitCode.VMGEXIT, "SVM_EXIT_VMGEXIT"),
    (vmcb.ExitCode.INVALID - 2**64, "SVM_EXIT_ERR"),
    (vmcb.ExitCode.VC_EXCEPTION - 29, "SVM_EXIT_EXCP_BASE"),
    (ghcb.Nae.IOIO, "SVM_EXIT_IOIO"),
    (ghcb.Nae.PAGE_STATE_CHANGE, "SVM_VMGEXIT_PSC"),
    (ghcb.Nae.GUEST_REQUEST, "SVM_VMGEXIT_GUEST_REQUEST"),
    (ghcb.Nae.FEATURES, "SVM_VMGEXIT_HV_FEATURES"),
    (ghcb.MsrCode.SEV_INFO, "GHCB_MSR_SEV_INFO_RESP"),
    (ghcb.MsrCode.SEV_INFO_REQUEST, "GHCB_MSR_SEV_INFO_REQ"),
    (ghcb.MsrCode.PREFERRED_GPA_REQUEST, "GHCB_MSR_PREF_GPA_REQ"),
    (ghcb.MsrCode.PREFERRED_GPA, "GHCB_MSR_PREF_GPA_RESP"),
    (ghcb.MsrCode.REGISTER_GPA_REQUEST, "GHCB_MSR_REG_GPA_REQ"),
    (ghcb.MsrCode.REGISTER_GPA, "GHCB_MSR_REG_GPA_RESP"),
    (ghcb.MsrCode.PAGE_STATE_REQUEST, "GHCB_MSR_PSC_REQ"),
    (ghcb.MsrCode.PAGE_STATE, "GHCB_MSR_PSC_RESP"),
    (ghcb.MsrCode.FEATURES_REQUEST, "GHCB_MSR_HV_FT_REQ"),
    (ghcb.MsrCode.FEATURES, "GHCB_MSR_HV_FT_RESP"),
    (ghcb.MsrCode.TERMINATE, "GHCB_MSR_TERM_REQ"),
    (ghcb.MSR_CODE_MASK, "GHCB_MSR_INFO_MASK"),
    (ghcb.MSR_DATA_SHIFT, "GHCB_MSR_GPA_VALUE_POS"),
    (ghcb.GFN_NONE, "GHCB_MSR_PREF_GPA_NONE"),
    (ghcb.TERMINATE.fields["reason_set"].lo, "GHCB_MSR_TERM_REASON_SET_POS"),
    (ghcb.TERMINATE.fields["reason"].lo, "GHCB_MSR_TERM_REASON_POS"),
    (ghcb.FEATURE_SNP, "GHCB_HV_FT_SNP"),
    (ghcb.FEATURE_AP_CREATION, "GHCB_HV_FT_SNP_AP_CREATION"),
    (ghcb.SHARED_BUFFER_SIZE, "GHCB_SHARED_BUF_SIZE"),
    (ghcb.PROTOCOL_VERSION, "GHCB_PROTOCOL_MAX"),
    (ghcb.PROTOCOL_MINIMUM, "GHCB_PROTOCOL_MIN"),
    (ghcb.PSC_ENTRIES, "VMGEXIT_PSC_MAX_COUNT"),
    (ghcb.PageOperation.PRIVATE, "VMGEXIT_PSC_OP_PRIVATE"),
    (ghcb.PageOperation.SHARED, "VMGEXIT_PSC_OP_SHARED"),
    (ghcb.PSC_INVALID_HEADER, "VMGEXIT_PSC_ERROR_INVALID_HDR"),
    (ghcb.PSC_INVALID_ENTRY, "VMGEXIT_PSC_ERROR_INVALID_ENTRY"),
    (ghcb.PSC_FAILURE, "VMGEXIT_PSC_ERROR_GENERIC"),
    *((error, f"GHCB_ERR_{error.name}") for error in ghcb.GhcbError if error.name != "INVALID_SCRATCH"),
    (ghcb.GhcbError.INVALID_SCRATCH, "GHCB_ERR_INVALID_SCRATCH_AREA"),
    *((bit, f"PFERR_{bit.name}_MASK") for bit in vmcb.FaultError if bit.name in ("PRESENT", "WRITE", "USER", "FETCH")),
    (vmcb.FaultError.RESERVED, "PFERR_RSVD_MASK"),
    (vmcb.FaultError.RMP, "PFERR_GUEST_RMP_MASK"),
    (vmcb.FaultError.FINAL_GPA, "PFERR_GUEST_FINAL_MASK"),
    (vmcb.FaultError.PAGE_TABLE_WALK, "PFERR_GUEST_PAGE_MASK"),
    (vmcb.FaultError.ENCRYPTED, "PFERR_GUEST_ENC_MASK"),
    (vmcb.FaultError.SIZE_MISMATCH, "PFERR_GUEST_SIZEM_MASK"),
    (vmcb.FaultError.VMPL, "PFERR_GUEST_VMPL_MASK"),
    (msr.Msr.GHCB, "MSR_AMD64_SEV_ES_GHCB"),
    (msr.Msr.SEV_STATUS, "MSR_AMD64_SEV"),
    (msr.Msr.RMP_BASE, "MSR_AMD64_RMP_BASE"),
    (msr.Msr.RMP_END, "MSR_AMD64_RMP_END"),
    (msr.Msr.SYSCFG, "MSR_AMD64_SYSCFG"),
    (msr.Msr.HWCR, "MSR_K7_HWCR"),
    (msr.Msr.VM_HSAVE_PA, "MSR_VM_HSAVE_PA"),
    (msr.SYSCFG_MFDM, "MSR_AMD64_SYSCFG_MFDM"),
    (msr.SYSCFG_MEM_ENCRYPT, "MSR_AMD64_SYSCFG_MEM_ENCRYPT"),
    (msr.SYSCFG_SNP_EN, "MSR_AMD64_SYSCFG_SNP_EN"),
    (msr.SYSCFG_VMPL_EN, "MSR_AMD64_SYSCFG_SNP_VMPL_EN"),
    (msr.HWCR_SMM_LOCK, "MSR_K7_HWCR_SMMLOCK"),
    (msr.RMP_ADDRESS_MASK, "RMP_ADDR_MASK"),
    (rmp.RmpCode.FAIL_OVERLAP, "RMPUPDATE_FAIL_OVERLAP"),
    (rmp.RmpCode.FAIL_INUSE, "PSMASH_FAIL_INUSE"),
    (rmp.RmpCode.FAIL_SIZEMISMATCH, "PVALIDATE_FAIL_SIZEMISMATCH"),
    (rmp.BOOKKEEPING_SIZE, "RMPTABLE_CPU_BOOKKEEPING_SZ"),
    (pages.PageSize.SIZE_4K, "RMP_PG_SIZE_4K"),
    (pages.PageSize.SIZE_2M, "RMP_PG_SIZE_2M"),
    *((kind, f"SNP_PAGE_TYPE_{kind.name}") for kind in pages.LaunchPage if kind.name != "SECRETS"),
    (pages.LaunchPage.SECRETS, "SNP_PAGE_TYPE_SECRET"),
    *((kind, f"SNP_MSG_{kind.name}") for kind in messages.MessageType if kind < messages.MessageType.ABSORB_NOMA_REQ),
    (messages.ALGO_AES_256_GCM, "SNP_AEAD_AES_256_GCM"),
    (messages.MESSAGE_HEADER.fields["authtag"].size, "MAX_AUTHTAG_LEN"),
    (launch.VMPCK_SIZE, "VMPCK_KEY_LEN"),
    (launch.CPUID_ENTRIES, "SNP_CPUID_COUNT_MAX"),
    (launch.ID_BLOCK.size, "KVM_SEV_SNP_ID_BLOCK_SIZE"),
    (launch.ID_AUTH.size, "KVM_SEV_SNP_ID_AUTH_SIZE"),
    (vmsa.SNP_ACTIVE, "SVM_SEV_FEAT_SNP_ACTIVE"),
    (vmsa.INITIAL_VMSA_GPA, "INITIAL_VMSA_GPA"),
]


@pytest.mark.parametrize(("ours", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_numbers(ours: Any, name: str) -> None:
    assert int(ours.value if isinstance(ours, Enum) else ours) == constants()[name]


def test_report_size() -> None:
    assert report.ATTESTATION_REPORT.size == report.REPORT_SIZE == 0x4A0
