"""Layouts and numbers against the headers of Linux 6.12, compiled and read back (`abi_linux_6.12.json`)."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from snpbook.spec import commands, ghcb, launch, messages, msr, report, rmp, vmcb, vmsa
from snpbook.spec.commands import Command
from snpbook.spec.layout import Layout
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.status import Status

SOURCE = Path(__file__).resolve().parents[2].parent / "shared" / "vectors" / "abi_linux_6.12.json"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason=f"{SOURCE.name} is not at hand")


def abi() -> Any:
    return json.loads(SOURCE.read_text())


SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")

PAIRS: list[tuple[Layout, str, dict[str, str]]] = [
    (vmsa.VMSA, "sev_es_save_area", {
        **{name: name for name in SEGMENTS},
        **{name: name for name in [
            "vmpl", "cpl", "efer", "xss", "cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip", "dr0", "dr1",
            "dr2", "dr3", "rsp", "s_cet", "ssp", "isst_addr", "rax", "star", "lstar", "cstar", "sfmask",
            "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "cr2", "g_pat", "dbgctl",
            "br_from", "br_to", "last_excp_from", "last_excp_to", "pkru", "tsc_aux", "rcx", "rdx", "rbx", "rbp",
            "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "sev_features", "vintr_ctrl",
            "guest_exit_info_1", "guest_exit_info_2", "guest_exit_int_info", "guest_nrip", "guest_exit_code",
            "virtual_tom", "tlb_id", "pcpu_id", "xcr0", "x87_dp", "mxcsr", "x87_ftw", "x87_fsw", "x87_fcw",
            "x87_fop", "x87_ds", "x87_cs", "x87_rip",
        ]},
    }),
    (vmcb.VMCB, "vmcb_control_area", {
        name: name for name in ("asid", "exit_info_1", "exit_info_2", "ghcb_gpa", "nested_cr3", "vmsa_pa")
    }),
    (launch.SECRETS_PAGE, "snp_secrets_page", {
        "version": "version", "fms": "fms", "gosvw": "gosvw", "vmpck0": "vmpck0", "vmpck1": "vmpck1",
        "vmpck2": "vmpck2", "vmpck3": "vmpck3", "vmsa_tweak_bitmap": "vmsa_tweak_bitmap", "svsm_base": "svsm_base",
        "svsm_size": "svsm_size", "svsm_caa": "svsm_caa", "svsm_max_version": "svsm_max_version",
        "svsm_guest_vmpl": "svsm_guest_vmpl",
    }),
    (launch.CPUID_ENTRY, "snp_cpuid_fn", {
        name: name for name in ("eax_in", "ecx_in", "xcr0_in", "xss_in", "eax", "ebx", "ecx", "edx")
    }),
    (launch.CPUID_PAGE, "snp_cpuid_table", {"count": "count"}),
    (messages.MESSAGE_HEADER, "snp_guest_msg_hdr", {
        "authtag": "authtag", "msg_seqno": "msg_seqno", "algo": "algo", "hdr_version": "hdr_version",
        "hdr_size": "hdr_sz", "msg_type": "msg_type", "msg_version": "msg_version", "msg_size": "msg_sz",
        "msg_vmpck": "msg_vmpck",
    }),
    (messages.REPORT_REQUEST, "snp_report_req", {"report_data": "user_data", "vmpl": "vmpl"}),
    (ghcb.PSC_HEADER, "psc_hdr", {"cur_entry": "cur_entry", "end_entry": "end_entry"}),
    (commands.SNP_ACTIVATE, "sev_data_snp_activate", {"gctx_paddr": "gctx_paddr", "asid": "asid"}),
    (commands.SNP_GCTX_CREATE, "sev_data_snp_addr", {"gctx_paddr": "address"}),
    (commands.SNP_DECOMMISSION, "sev_data_snp_addr", {"gctx_paddr": "address"}),
    (commands.SNP_PLATFORM_STATUS, "sev_data_snp_addr", {"status_paddr": "address"}),
    (commands.SNP_LAUNCH_START, "sev_data_snp_launch_start", {
        "gctx_paddr": "gctx_paddr", "policy": "policy", "ma_gctx_paddr": "ma_gctx_paddr", "ma_en": "ma_en",
        "imi_en": "imi_en", "desired_tsc_khz": "desired_tsc_khz", "gosvw": "gosvw",
    }),
    (commands.SNP_LAUNCH_UPDATE, "sev_data_snp_launch_update", {
        "gctx_paddr": "gctx_paddr", "page_size": "page_size", "page_type": "page_type", "imi_page": "imi_page",
        "page_paddr": "address", "vmpl1_perms": "vmpl1_perms", "vmpl2_perms": "vmpl2_perms",
        "vmpl3_perms": "vmpl3_perms",
    }),
    (commands.SNP_LAUNCH_FINISH, "sev_data_snp_launch_finish", {
        "gctx_paddr": "gctx_paddr", "id_block_paddr": "id_block_paddr", "id_auth_paddr": "id_auth_paddr",
        "id_block_en": "id_block_en", "auth_key_en": "auth_key_en", "vcek_dis": "vcek_disabled",
        "host_data": "host_data",
    }),
    (commands.SNP_GUEST_REQUEST, "sev_data_snp_guest_request", {
        "gctx_paddr": "gctx_paddr", "request_paddr": "req_paddr", "response_paddr": "res_paddr",
    }),
    (commands.SNP_INIT_EX, "sev_data_snp_init_ex", {
        "init_rmp": "init_rmp", "list_paddr_en": "list_paddr_en", "list_paddr": "list_paddr",
    }),
    (commands.RANGE_ENTRY, "sev_data_range", {"base": "base", "page_count": "page_count"}),
    (commands.PLATFORM_STATUS, "sev_user_data_snp_status", {
        "api_major": "api_major", "api_minor": "api_minor", "state": "state", "is_rmp_init": "is_rmp_initialized",
        "build": "build_id", "mask_chip_id": "mask_chip_id", "mask_chip_key": "mask_chip_key", "vlek_en": "vlek_en",
        "guest_count": "guest_count", "current_tcb": "current_tcb_version", "reported_tcb": "reported_tcb_version",
    }),
    (ghcb.GHCB, "ghcb_save_area", {
        name: name for name in (
            "cpl", "xss", "dr7", "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r15", "sw_exit_code",
            "sw_exit_info_1", "sw_exit_info_2", "sw_scratch", "xcr0", "valid_bitmap", "x87_state_gpa",
        )
    }),
]  # fmt: skip
RENAMED = {
    "guest_exit_info_1": "guest_exitinfo1", "guest_exit_info_2": "guest_exitinfo2",
    "guest_exit_int_info": "guest_exitintinfo", "guest_exit_code": "guest_exitcode",
}  # fmt: skip


def place(theirs: list[Any], word: int | None = None) -> tuple[int, int]:
    """First bit and width of a field of the header."""
    if len(theirs) == 4:
        byte, _, first, width = theirs
        return byte * 8 + first, width
    return theirs[0] * 8, theirs[1] * 8


@pytest.mark.parametrize(("layout", "struct", "names"), PAIRS, ids=lambda x: x if isinstance(x, str) else "")
def test_fields_lie_where_the_kernel_has_them(layout: Layout, struct: str, names: dict[str, str]) -> None:
    theirs = abi()["structs"][struct]
    missing = [name for name in names.values() if name not in theirs["fields"]]
    assert not missing
    for ours, name in names.items():
        field = layout.fields[RENAMED.get(ours, ours)]
        assert (field.first_bit, field.width) == place(theirs["fields"][name]), name


WHOLE = {
    "snp_guest_msg_hdr": messages.MESSAGE_HEADER.size,
    "snp_secrets_page": PAGE_SIZE,
    "ghcb": ghcb.GHCB.size,
    "snp_cpuid_fn": launch.CPUID_ENTRY.size,
    "sev_data_snp_launch_start": commands.SNP_LAUNCH_START.size,
    "sev_data_snp_launch_update": commands.SNP_LAUNCH_UPDATE.size,
    "sev_data_snp_launch_finish": commands.SNP_LAUNCH_FINISH.size,
    "sev_data_snp_guest_request": commands.SNP_GUEST_REQUEST.size,
    "sev_data_snp_init_ex": commands.SNP_INIT_EX.size,
    "sev_data_snp_activate": commands.SNP_ACTIVATE.size,
    "sev_user_data_snp_status": commands.PLATFORM_STATUS.size,
    "snp_report_req": messages.REPORT_REQUEST.size,
    "rmpentry": rmp.RMP_ENTRY.size,
}


@pytest.mark.parametrize("struct", WHOLE)
def test_sizes(struct: str) -> None:
    assert abi()["structs"][struct]["size"] == WHOLE[struct]


def constants() -> dict[str, int]:
    """All constants of the header, by name."""
    return {name: value for group in abi()["constants"].values() for name, value in group.items()}


def test_command_ids() -> None:
    theirs = {
        name.removeprefix("SEV_CMD_"): value for name, value in constants().items() if name.startswith("SEV_CMD_")
    }
    ours = {command.name: int(command) for command in Command}
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 40
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_status_codes() -> None:
    theirs = {value for name, value in constants().items() if name.startswith("SEV_RET_") and value >= 0}
    assert {int(status) for status in Status if status <= Status.INVALID_KEY} >= theirs - {0xFFFFFFFF} - {
        value for name, value in constants().items() if name in ("SEV_RET_MAX", "SEV_RET_NO_FW_CALL")
    }
    assert [int(status) for status in Status] == [*range(0x1E), *range(0x1F, 0x29)]


NUMBERS: list[tuple[Enum, str]] = [
    (vmcb.ExitCode.CPUID, "SVM_EXIT_CPUID"),
    (vmcb.ExitCode.HLT, "SVM_EXIT_HLT"),
    (vmcb.ExitCode.IOIO, "SVM_EXIT_IOIO"),
    (vmcb.ExitCode.MSR, "SVM_EXIT_MSR"),
    (vmcb.ExitCode.SHUTDOWN, "SVM_EXIT_SHUTDOWN"),
    (vmcb.ExitCode.NPF, "SVM_EXIT_NPF"),
    (vmcb.ExitCode.VMGEXIT, "SVM_EXIT_VMGEXIT"),
    (ghcb.Nae.PAGE_STATE_CHANGE, "SVM_VMGEXIT_PSC"),
    (ghcb.Nae.GUEST_REQUEST, "SVM_VMGEXIT_GUEST_REQUEST"),
    (ghcb.Nae.FEATURES, "SVM_VMGEXIT_HV_FEATURES"),
    (ghcb.MsrCode.SEV_INFO, "GHCB_MSR_SEV_INFO_RESP"),
    (ghcb.MsrCode.SEV_INFO_REQUEST, "GHCB_MSR_SEV_INFO_REQ"),
    (ghcb.MsrCode.REGISTER_GPA_REQUEST, "GHCB_MSR_REG_GPA_REQ"),
    (ghcb.MsrCode.REGISTER_GPA, "GHCB_MSR_REG_GPA_RESP"),
    (ghcb.MsrCode.PAGE_STATE_REQUEST, "GHCB_MSR_PSC_REQ"),
    (ghcb.MsrCode.PAGE_STATE, "GHCB_MSR_PSC_RESP"),
    (ghcb.MsrCode.FEATURES_REQUEST, "GHCB_MSR_HV_FT_REQ"),
    (ghcb.MsrCode.FEATURES, "GHCB_MSR_HV_FT_RESP"),
    (ghcb.MsrCode.TERMINATE, "GHCB_MSR_TERM_REQ"),
    (vmcb.FaultError.WRITE, "PFERR_WRITE_MASK"),
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
    (rmp.RmpCode.FAIL_OVERLAP, "RMPUPDATE_FAIL_OVERLAP"),
    (rmp.RmpCode.FAIL_SIZEMISMATCH, "PVALIDATE_FAIL_SIZEMISMATCH"),
]


@pytest.mark.parametrize(("ours", "name"), NUMBERS, ids=lambda x: x if isinstance(x, str) else "")
def test_numbers(ours: Enum, name: str) -> None:
    theirs = constants()
    assert name in theirs
    assert int(ours.value) == theirs[name]


def test_report_size() -> None:
    assert report.ATTESTATION_REPORT.size == report.REPORT_SIZE == 0x4A0
