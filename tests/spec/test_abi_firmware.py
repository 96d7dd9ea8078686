"""The firmware's command buffers, messages and numbers against the headers of Linux 6.12."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.spec import legacy_buffers as legacy
from snpbook.spec import payloads, platform, policy, states
from snpbook.spec import snp_buffers as snp
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS, TIO_COMMANDS
from snpbook.spec.layout import Layout
from snpbook.spec.legacy_launch import CHIP_ID_SIZE
from snpbook.spec.status import Status
from tests.spec.abi import Pair, constants, headers, needs_headers

pytestmark = needs_headers


def legacy_pair(layout: Layout, struct: str, **names: str | None) -> Pair:
    """The kernel writes `address` where the documents write PADDR."""
    spelt = {name: name.replace("paddr", "address") for name in layout.fields if "paddr" in name}
    return Pair(layout, f"sev_data_{struct}", **{**spelt, **names})


DEBUG = {"src_paddr": "src_addr", "dst_paddr": "dst_addr"}
LEGACY = [
    legacy_pair(legacy.INIT, "init", es=None),
    legacy_pair(legacy.INIT_EX, "init_ex", es=None),
    legacy_pair(legacy.PEK_CSR, "pek_csr"),
    legacy_pair(legacy.PEK_CERT_IMPORT, "pek_cert_import"),
    legacy_pair(legacy.PDH_CERT_EXPORT, "pdh_cert_export"),
    legacy_pair(legacy.DOWNLOAD_FIRMWARE, "download_firmware"),
    legacy_pair(legacy.GET_ID, "get_id"),
    legacy_pair(legacy.DECOMMISSION, "decommission"),
    legacy_pair(legacy.ACTIVATE, "activate"),
    legacy_pair(legacy.DEACTIVATE, "deactivate"),
    legacy_pair(legacy.GUEST_STATUS, "guest_status"),
    legacy_pair(legacy.LAUNCH_START, "launch_start"),
    legacy_pair(legacy.LAUNCH_UPDATE_DATA, "launch_update_data"),
    legacy_pair(legacy.LAUNCH_UPDATE_VMSA, "launch_update_vmsa"),
    legacy_pair(legacy.LAUNCH_MEASURE, "launch_measure"),
    legacy_pair(legacy.LAUNCH_SECRET, "launch_secret"),
    legacy_pair(legacy.LAUNCH_FINISH, "launch_finish"),
    legacy_pair(legacy.ATTESTATION, "attestation_report"),
    legacy_pair(legacy.SEND_START, "send_start"),
    legacy_pair(legacy.SEND_UPDATE_DATA, "send_update_data"),
    legacy_pair(legacy.SEND_UPDATE_VMSA, "send_update_data"),  # its own struct lacks the padding
    legacy_pair(legacy.SEND_FINISH, "send_finish"),
    legacy_pair(legacy.SEND_CANCEL, "send_cancel"),
    legacy_pair(legacy.RECEIVE_START, "receive_start"),
    legacy_pair(legacy.RECEIVE_UPDATE_DATA, "receive_update_data"),
    legacy_pair(legacy.RECEIVE_UPDATE_VMSA, "receive_update_vmsa"),
    legacy_pair(legacy.RECEIVE_FINISH, "receive_finish"),
    legacy_pair(legacy.DBG_DECRYPT, "dbg", **DEBUG),
    legacy_pair(legacy.DBG_ENCRYPT, "dbg", **DEBUG),
    Pair(legacy.PLATFORM_STATUS, "sev_user_data_status", owner=None, es=None),
]
NEWER = dict.fromkeys(["rapl_dis", "ciphertext_hiding_en", "tio_en", "max_snp_asid"])
SNP = [
    Pair(snp.SNP_PLATFORM_STATUS, "sev_data_snp_addr", status_paddr="address"),
    Pair(snp.SNP_INIT_EX, "sev_data_snp_init_ex", **NEWER),
    Pair(snp.SNP_SHUTDOWN_EX, "sev_data_snp_shutdown_ex", length="len", x86_snp_shutdown=None),
    Pair(snp.SNP_DECOMMISSION, "sev_data_snp_addr", gctx_paddr="address"),
    Pair(snp.SNP_ACTIVATE, "sev_data_snp_activate"),
    Pair(snp.SNP_GUEST_STATUS, "sev_data_snp_guest_status", status_paddr="address"),
    Pair(snp.SNP_GCTX_CREATE, "sev_data_snp_addr", gctx_paddr="address"),
    Pair(snp.SNP_GUEST_REQUEST, "sev_data_snp_guest_request", request_paddr="req_paddr", response_paddr="res_paddr"),
    Pair(snp.SNP_LAUNCH_START, "sev_data_snp_launch_start"),
    Pair(snp.SNP_LAUNCH_UPDATE, "sev_data_snp_launch_update", page_paddr="address"),
    Pair(snp.SNP_LAUNCH_FINISH, "sev_data_snp_launch_finish", vcek_dis="vcek_disabled"),
    Pair(snp.SNP_DBG_DECRYPT, "sev_data_snp_dbg", **DEBUG),
    Pair(snp.SNP_DBG_ENCRYPT, "sev_data_snp_dbg", **DEBUG),
    Pair(snp.SNP_PAGE_RECLAIM, "sev_data_snp_page_reclaim", page_size=None, page=None),
    Pair(snp.SNP_PAGE_UNSMASH, "sev_data_snp_page_unsmash", page_paddr="paddr"),
    Pair(snp.SNP_CONFIG, "sev_user_data_snp_config"),
    Pair(snp.SNP_COMMIT, "sev_data_snp_commit", length="len"),
    Pair(snp.SNP_VLEK_LOAD, "sev_user_data_snp_vlek_load", length="len", vlek_wrapped_paddr="vlek_wrapped_address"),
    Pair(platform.RANGE_ENTRY, "sev_data_range"),
    Pair(platform.RANGE_LIST_HEADER, "sev_data_range_list", count="num_elements"),
    Pair(
        platform.PLATFORM_STATUS, "sev_user_data_snp_status", is_rmp_init="is_rmp_initialized", build="build_id",
        current_tcb="current_tcb_version", reported_tcb="reported_tcb_version",
        **dict.fromkeys(["alias_check_complete", "is_tio_en", "feature_info", "rapl_dis", "ciphertext_hiding_cap",
                         "ciphertext_hiding_en", "tio_en"]),
    ),
    Pair(payloads.REPORT_REQUEST, "snp_report_req", report_data="user_data", key_sel=None),
    Pair(payloads.KEY_REQUEST, "snp_derived_key_req", root_key_select=None, key_sel=None),
]  # fmt: skip


@pytest.mark.parametrize("pair", [*LEGACY, *SNP], ids=str)
def test_fields_lie_where_the_kernel_has_them(pair: Pair) -> None:
    pair.compare()


def test_every_buffer_that_the_kernel_knows_is_compared() -> None:
    """What is left are the commands that Linux 6.12 has no struct for."""
    compared = {pair.layout for pair in (*LEGACY, *SNP)}
    assert {command.name for command, layout in BUFFERS.items() if layout and layout not in compared} == {
        "RING_BUFFER", "COPY", "ACTIVATE_EX", "SWAP_OUT", "SWAP_IN", "SNP_ACTIVATE_EX", "SNP_VERIFY_MITIGATION",
        "SNP_PAGE_SWAP_OUT", "SNP_PAGE_SWAP_IN", "SNP_PAGE_MOVE", "SNP_PAGE_MD_INIT", "SNP_PAGE_SET_STATE",
        "SNP_DOWNLOAD_FIRMWARE_EX", "SNP_FEATURE_INFO",
    }  # fmt: skip


def test_sizes_that_the_kernel_has_without_fields() -> None:
    structs = headers()["structs"]
    assert platform.WRAPPED_VLEK.size == structs["sev_user_data_snp_wrapped_vlek_hashstick"]["size"]
    assert payloads.KEY_RESPONSE.size == structs["snp_derived_key_resp"]["size"]
    assert payloads.EXPORT_RESPONSE.size == structs["snp_report_resp"]["size"] == 4096 - 0x60
    assert structs["sev_user_data_get_id"]["fields"]["socket1"][1] == CHIP_ID_SIZE


def test_legacy_flags_are_where_the_kernel_has_them() -> None:
    known = constants()
    assert legacy.INIT.pack(es=1)[:4] == known["SEV_INIT_FLAGS_SEV_ES"].to_bytes(4, "little")
    assert legacy.INIT_EX.pack(es=1)[4:8] == known["SEV_INIT_FLAGS_SEV_ES"].to_bytes(4, "little")
    flags = headers()["structs"]["sev_user_data_status"]["fields"]["flags"][0]
    status = legacy.PLATFORM_STATUS.pack(es=1)[flags : flags + 4]
    assert status == known["SEV_STATUS_FLAGS_CONFIG_ES"].to_bytes(4, "little")


def test_command_ids() -> None:
    renamed = {"FACTORY_RESET": "PLATFORM_RESET", "LAUNCH_UPDATE_SECRET": "LAUNCH_SECRET"}
    renamed["ATTESTATION_REPORT"] = "ATTESTATION"
    theirs = {name.removeprefix("SEV_CMD_"): value for name, value in headers()["constants"]["psp_cmd"].items()}
    del theirs["MAX"]
    ours = {command.name: int(command) for command in Command}
    assert {renamed.get(name, name): value for name, value in theirs.items()}.items() <= ours.items()
    assert ours.keys() - {renamed.get(name, name) for name in theirs} == {
        "NOP", "RING_BUFFER", "COPY", "ACTIVATE_EX", "SWAP_OUT", "SWAP_IN", "SNP_VERIFY_MITIGATION",
        "SNP_FEATURE_INFO", *(command.name for command in TIO_COMMANDS),
    }  # fmt: skip


def test_status_codes() -> None:
    renamed = {
        "INVALID_LEN": "INVALID_LENGTH", "DFFLUSH_REQUIRED": "DF_FLUSH_REQUIRED",
        "EXIT_RING_BUFFER": "RING_BUFFER_EXIT",
        "HWSEV_RET_PLATFORM": "HWERROR_PLATFORM", "HWSEV_RET_UNSAFE": "HWERROR_UNSAFE",
    }  # fmt: skip
    theirs = {name.removeprefix("SEV_RET_"): value for name, value in headers()["constants"]["sev_ret"].items()}
    for name in ("NO_FW_CALL", "MAX", "INAVLID_CONFIG"):
        del theirs[name]
    ours = {status.name: int(status) for status in Status if status < Status.SHUTDOWN_INCOMPLETE}
    assert ours == {renamed.get(name, name): value for name, value in theirs.items()}
    codes = [*range(0x1E), *range(0x1F, 0x29), *range(0x30, 0x34), *range(0x35, 0x40), 0x1A + 64]
    assert [int(status) for status in Status] == codes


@pytest.mark.parametrize("state", list(states.LegacyPlatformState), ids=lambda state: state.name)
def test_platform_states(state: Any) -> None:
    assert constants()[f"SEV_STATE_{state.name}"] == state


@pytest.mark.parametrize("bit", ["smt", "debug", "single_socket"])
def test_policy_bits(bit: str) -> None:
    known = constants()
    assert int.from_bytes(policy.POLICY.pack(**{bit: 1}), "little") == known[f"SNP_POLICY_MASK_{bit.upper()}"]
    assert int.from_bytes(policy.POLICY.pack(one=1), "little") == known["SNP_POLICY_MASK_RSVD_MBO"]
