"""Every structure of the firmware's interface against the specification's offsets, typed here a second time.

A row is a structure, its size, and `offset field size` (both hexadecimal) or `offset.bit field width` for bits.
"""

from __future__ import annotations

import pytest

from snpbook.spec import (
    context,
    dispatch,
    key_derivation,
    launch,
    legacy_launch,
    payloads,
    platform,
    policy,
    report,
    sev_certificates,
    swap,
)
from snpbook.spec.layout import REGISTRY, Layout

H = "0 handle 4;"
GCTX = "0 gctx_paddr 8;"
PACKET = H + "8 hdr_paddr 8; 10 hdr_len 4; 18 guest_paddr 8; 20 guest_len 4; 28 trans_paddr 8; 30 trans_len 4"
DEBUG = H + "8 src_paddr 8; 10 dst_paddr 8; 18 len 4"
LEGACY_SWAP = (
    H + "4.0 page_size 1; 4.1 page_type 2; 4.3 swap_in_place 1; 8 src_paddr 8; 10 dst_paddr 8; 18 mdata_paddr 8"
)
SWAP = (
    GCTX + "8 src_paddr 8; 10 dst_paddr 8; 18 mdata_paddr 8; 28.0 page_size 1; 28.1 page_type 2; 28.4 root_mdata_en 1;"
)
START = H + "4 policy 4; 8 dh_cert_paddr 8; 10 dh_cert_len 4; 18 session_paddr 8; 20 session_len 4"
EC = "0 curve 4; 4 qx 48; 4c qy 48"
GCTX_IN = "8 gctx_size 4; c gctx_version 4; 20 gctx 300"

SHEET: dict[str, tuple[int, str]] = {
    # Legacy command buffers.
    "INIT_BUFFER": (0x14, "0.0 es 1; 8 tmr_paddr 8; 10 tmr_len 4"),
    "INIT_EX_BUFFER": (0x24, "0 length 4; 4.0 es 1; 8 tmr_paddr 8; 10 tmr_len 4; 18 nv_paddr 8; 20 nv_len 4"),
    "PLATFORM_STATUS_BUFFER": (
        12, "0 api_major 1; 1 api_minor 1; 2 state 1; 3.0 owner 1; 4.0 es 1; 7 build 1; 8 guest_count 4",
    ),
    "PEK_CSR_BUFFER": (0xC, "0 paddr 8; 8 len 4"),
    "PEK_CERT_IMPORT_BUFFER": (0x1C, "0 pek_cert_paddr 8; 8 pek_cert_len 4; 10 oca_cert_paddr 8; 18 oca_cert_len 4"),
    "PDH_CERT_EXPORT_BUFFER": (
        0x1C, "0 pdh_cert_paddr 8; 8 pdh_cert_len 4; 10 cert_chain_paddr 8; 18 cert_chain_len 4",
    ),
    "DOWNLOAD_FIRMWARE_BUFFER": (0xC, "0 paddr 8; 8 len 4"),
    "GET_ID_BUFFER": (0xC, "0 paddr 8; 8 len 4"),
    "RING_BUFFER_BUFFER": (
        0x28,
        "0 queue_lo_cmd_paddr 8; 8 queue_lo_sts_paddr 8; 10 queue_hi_cmd_paddr 8; 18 queue_hi_sts_paddr 8; "
        "20 queue_lo_size 1; 21 queue_hi_size 1; 22 queue_lo_threshold 2; 24 queue_hi_threshold 2",
    ),
    "DECOMMISSION_BUFFER": (4, H),
    "ACTIVATE_BUFFER": (8, H + "4 asid 4"),
    "DEACTIVATE_BUFFER": (4, H),
    "GUEST_STATUS_BUFFER": (0xD, H + "4 policy 4; 8 asid 4; c state 1"),
    "COPY_BUFFER": (0x18, H + "4 len 4; 8 src_paddr 8; 10 dst_paddr 8"),
    "ACTIVATE_EX_BUFFER": (0x18, "0 length 4; 4 handle 4; 8 asid 4; c numids 4; 10 ids_paddr 8"),
    "LAUNCH_START_BUFFER": (0x24, START),
    "LAUNCH_UPDATE_DATA_BUFFER": (0x14, H + "8 paddr 8; 10 len 4"),
    "LAUNCH_UPDATE_VMSA_BUFFER": (0x14, H + "8 paddr 8; 10 len 4"),
    "LAUNCH_MEASURE_BUFFER": (0x14, H + "8 paddr 8; 10 len 4"),
    "LAUNCH_SECRET_BUFFER": (0x34, PACKET),
    "LAUNCH_FINISH_BUFFER": (4, H),
    "ATTESTATION_BUFFER": (0x24, H + "8 paddr 8; 10 mnonce 10; 20 len 4"),
    "SEND_START_BUFFER": (
        0x44,
        H + "4 policy 4; 8 pdh_cert_paddr 8; 10 pdh_cert_len 4; 18 plat_certs_paddr 8; 20 plat_certs_len 4; "
        "28 amd_certs_paddr 8; 30 amd_certs_len 4; 38 session_paddr 8; 40 session_len 4",
    ),
    "SEND_UPDATE_DATA_BUFFER": (0x34, PACKET),
    "SEND_UPDATE_VMSA_BUFFER": (0x34, PACKET),
    "SEND_FINISH_BUFFER": (4, H),
    "SEND_CANCEL_BUFFER": (4, H),
    "RECEIVE_START_BUFFER": (0x24, START.replace("dh_cert", "pdh_cert")),
    "RECEIVE_UPDATE_DATA_BUFFER": (0x34, PACKET),
    "RECEIVE_UPDATE_VMSA_BUFFER": (0x34, PACKET),
    "RECEIVE_FINISH_BUFFER": (4, H),
    "DBG_DECRYPT_BUFFER": (0x1C, DEBUG),
    "DBG_ENCRYPT_BUFFER": (0x1C, DEBUG),
    "SWAP_OUT_BUFFER": (0x28, LEGACY_SWAP + "; 20 software_data 8"),
    "SWAP_IN_BUFFER": (0x20, LEGACY_SWAP),
    # SNP command buffers.
    "SNP_PLATFORM_STATUS_BUFFER": (8, "0 status_paddr 8"),
    "SNP_INIT_EX_BUFFER": (
        0x40,
        "0.0 init_rmp 1; 0.1 list_paddr_en 1; 0.2 rapl_dis 1; 0.3 ciphertext_hiding_en 1; 0.4 tio_en 1; "
        "8 list_paddr 8; 10 max_snp_asid 2",
    ),
    "SNP_SHUTDOWN_EX_BUFFER": (8, "0 length 4; 4.0 iommu_snp_shutdown 1; 4.1 x86_snp_shutdown 1"),
    "SNP_DECOMMISSION_BUFFER": (8, GCTX),
    "SNP_ACTIVATE_BUFFER": (0xC, GCTX + "8 asid 4"),
    "SNP_GUEST_STATUS_BUFFER": (0x10, GCTX + "8 status_paddr 8"),
    "SNP_GCTX_CREATE_BUFFER": (8, GCTX),
    "SNP_GUEST_REQUEST_BUFFER": (0x18, GCTX + "8 request_paddr 8; 10 response_paddr 8"),
    "SNP_ACTIVATE_EX_BUFFER": (0x20, "0 length 4; 8 gctx_paddr 8; 10 asid 4; 14 numids 4; 18 ids_paddr 8"),
    "SNP_LAUNCH_START_BUFFER": (
        0x30,
        GCTX + "8 policy 8; 10 ma_gctx_paddr 8; 18.0 ma_en 1; 18.1 imi_en 1; 1c desired_tsc_khz 4; 20 gosvw 10",
    ),
    "SNP_LAUNCH_UPDATE_BUFFER": (
        0x20,
        GCTX + "8.0 page_size 1; 8.1 page_type 3; 8.4 imi_page 1; 10 page_paddr 8; 19 vmpl1_perms 1; "
        "1a vmpl2_perms 1; 1b vmpl3_perms 1",
    ),
    "SNP_LAUNCH_FINISH_BUFFER": (
        0x40,
        GCTX + "8 id_block_paddr 8; 10 id_auth_paddr 8; 18.0 id_block_en 1; 18.1 auth_key_en 1; 18.2 vcek_dis 1; "
        "20 host_data 20",
    ),
    "SNP_DBG_DECRYPT_BUFFER": (0x18, GCTX + "8 src_paddr 8; 10 dst_paddr 8"),
    "SNP_DBG_ENCRYPT_BUFFER": (0x18, GCTX + "8 src_paddr 8; 10 dst_paddr 8"),
    "SNP_VERIFY_MITIGATION_BUFFER": (
        0x40,
        "0 length 4; 4 subcommand 2; 8 vector 8; 10.0 dst_paddr_en 1; 10.1 src_paddr_en 1; 18 src_paddr 8; "
        "20 dst_paddr 8",
    ),
    "SNP_PAGE_SWAP_OUT_BUFFER": (0x30, SWAP + "20 software_data 8"),
    "SNP_PAGE_SWAP_IN_BUFFER": (0x30, SWAP + "28.3 swap_in_place 1"),
    "SNP_PAGE_MOVE_BUFFER": (0x20, GCTX + "8.0 page_size 1; 10 src_paddr 8; 18 dst_paddr 8"),
    "SNP_PAGE_MD_INIT_BUFFER": (0x10, GCTX + "8 page_paddr 8"),
    "SNP_PAGE_SET_STATE_BUFFER": (0x10, "0 length 4; 8 list_paddr 8"),
    "SNP_PAGE_RECLAIM_BUFFER": (8, "0.0 page_size 1; 0.12 page 52"),
    "SNP_PAGE_UNSMASH_BUFFER": (8, "0 page_paddr 8"),
    "SNP_CONFIG_BUFFER": (0x40, "0 reported_tcb 8; 8.0 mask_chip_id 1; 8.1 mask_chip_key 1"),
    "SNP_DOWNLOAD_FIRMWARE_EX_BUFFER": (0x18, "0 length 4; 8 fw_paddr 8; 10 fw_len 4; 14.0 commit 1"),
    "SNP_COMMIT_BUFFER": (4, "0 length 4"),
    "SNP_VLEK_LOAD_BUFFER": (0x10, "0 length 4; 4 vlek_wrapped_version 1; 8 vlek_wrapped_paddr 8"),
    "SNP_FEATURE_INFO_BUFFER": (0x10, "0 length 4; 4 ecx_in 4; 8 feature_info_paddr 8"),
    # The platform.
    "SnpPlatformStatus": (
        0x20,
        "0 api_major 1; 1 api_minor 1; 2 state 1; 3.0 is_rmp_init 1; 3.1 alias_check_complete 1; 3.3 is_tio_en 1; "
        "4 build 4; 8.0 mask_chip_id 1; 8.1 mask_chip_key 1; 8.2 vlek_en 1; 8.3 feature_info 1; 8.4 rapl_dis 1; "
        "8.5 ciphertext_hiding_cap 1; 8.6 ciphertext_hiding_en 1; 8.7 tio_en 1; c guest_count 4; 10 current_tcb 8; "
        "18 reported_tcb 8",
    ),
    "SnpGuestStatus": (0x20, "0 policy 8; 8 asid 4; c state 1; 10.0 vcek_dis 1"),
    "FeatureInfo": (0x10, "0 eax 4; 4 ebx 4; 8 ecx 4; c edx 4"),
    "RangeListHeader": (8, "0 count 4"),
    "RangeListEntry": (0x10, "0 base 8; 8 page_count 4"),
    "WrappedVlekHashstick": (432, "0 iv c; 10 wrapped 180; 190 tcb 8; 1a0 tag 10"),
    "MitigationStatus": (0x14, "0 verified 8; 8 supported 8; 10 failure 4"),
    # Launch and context.
    "PageInfo": (
        0x70,
        "0 digest_cur 30; 30 contents 30; 60 length 2; 62 page_type 1; 63.0 imi_page 1; 65 vmpl1_perms 1; "
        "66 vmpl2_perms 1; 67 vmpl3_perms 1; 68 gpa 8",
    ),
    "EcPublicKey": (0x404, EC),
    "EcSignature": (0x200, "0 r 48; 48 s 48"),
    "IdBlock": (0x60, "0 launch_digest 30; 30 family_id 10; 40 image_id 10; 50 version 4; 54 guest_svn 4; 58 policy 8"),
    "IdAuthentication": (
        0x1000,
        "0 id_key_algo 4; 4 author_key_algo 4; 40 id_block_signature 200; 240 id_key 404; 680 id_key_signature 200; "
        "880 author_key 404",
    ),
    "CpuidEntry": (
        0x30, "0 eax_in 4; 4 ecx_in 4; 8 xcr0_in 8; 10 xss_in 8; 18 eax 4; 1c ebx 4; 20 ecx 4; 24 edx 4",
    ),
    "CpuidPage": (0x1000, "0 count 4; 10 entries c00"),
    "SecretsPage": (
        0x1000,
        "0 version 4; 4.0 imi_en 1; 8 fms 4; 10 gosvw 10; 20 vmpck0 20; 40 vmpck1 20; 60 vmpck2 20; 80 vmpck3 20; "
        "a0 msg_seqno_0 4; a4 msg_seqno_1 4; a8 msg_seqno_2 4; ac msg_seqno_3 4; b0 ap_jump_table_pa 8; "
        "b8 msg_seqno_high_0 4; bc msg_seqno_high_1 4; c0 msg_seqno_high_2 4; c4 msg_seqno_high_3 4; "
        "de os_area_version 2; e0 guest_usage 20; 100 vmsa_tweak_bitmap 40; 140 svsm_base 8; 148 svsm_size 8; "
        "150 svsm_caa 8; 158 svsm_max_version 4; 15c svsm_guest_vmpl 1; 160 tsc_factor 4; 168 launch_mit_vector 8",
    ),
    "GuestContextExport": (
        0x300,
        "0 launch_digest 30; 30 oek 20; 50 vmpck0 20; 70 vmpck1 20; 90 vmpck2 20; b0 vmpck3 20; d0 vmrk 20; "
        "f0 host_data 20; 110 id_key_digest 30; 140 author_key_digest 30; 170 report_id 20; 190 imd 30; "
        "1c0 msg_count0 8; 1c8 msg_count1 8; 1d0 msg_count2 8; 1d8 msg_count3 8; 1e0 root_md_entry 40; "
        "220.0 author_key_en 1; 220.1 id_block_en 1; 220.2 vcek_dis 1; 228 policy 8; 230 state 8; 238 oek_iv_count 8; "
        "240 id_block 60; 2a0 gosvw 10; 2b0 desired_tsc_khz 4; 2b8 tsc_offset 8; 2c0 launch_tcb 8",
    ),
    # Messages.
    "GuestMessageHeader": (
        0x60,
        "0 authtag 20; 20 msg_seqno 8; 30 algo 1; 31 hdr_version 1; 32 hdr_size 2; 34 msg_type 1; 35 msg_version 1; "
        "36 msg_size 2; 3c msg_vmpck 1",
    ),
    "CpuidRequest": (0x10, "0 count 4"),
    "CpuidResponse": (0x10, "0 status 4; 4 count 4"),
    "KeyRequest": (
        0x20,
        "0.0 root_key_select 1; 0.1 key_sel 2; 8 guest_field_select 8; 10 vmpl 4; 14 guest_svn 4; 18 tcb_version 8",
    ),
    "KeyRequestV2": (
        0x30,
        "0.0 root_key_select 1; 0.1 key_sel 2; 8 guest_field_select 8; 10 vmpl 4; 14 guest_svn 4; 18 tcb_version 8; "
        "20 launch_mit_vector 8",
    ),
    "KeyResponse": (0x40, "0 status 4; 20 derived_key 20"),
    "ReportRequest": (0x60, "0 report_data 40; 40 vmpl 4; 44.0 key_sel 2"),
    "ReportResponse": (0x4C0, "0 status 4; 4 report_size 4; 20 report 4a0"),
    "ExportRequest": (0x10, "0 gctx_paddr 8; 8.0 imi_en 1"),
    "ExportResponse": (0xFA0, "0 status 4; 4 gctx_size 4; 8 gctx_version 4; 20 gctx 300"),
    "ImportRequest": (0x320, GCTX + GCTX_IN),
    "AbsorbRequest": (0x320, GCTX + GCTX_IN),
    "AbsorbNomaRequest": (0x320, GCTX_IN),
    "VmrkRequest": (0x40, GCTX + "20 vmrk 20"),
    "StatusResponse": (0x10, "0 status 4"),
    "TscInfoRequest": (0x80, "0 zero 80"),
    "TscInfoResponse": (0x80, "0 status 4; 8 tsc_scale 8; 10 tsc_offset 8; 18 tsc_factor 4"),
    "GuestKeyMix": (
        0xA8,
        "0.0 root_key_select 1; 0.1 id_key_select 2; 8 guest_field_select 8; 10 vmpl 4; 14 guest_svn 4; "
        "18 tcb_version 8; 20 policy 8; 28 image_id 10; 38 family_id 10; 48 measurement 20; 68 host_data 20; "
        "88 key_digest 20",
    ),
    "AttestationReport": (
        0x4A0,
        "0 version 4; 4 guest_svn 4; 8 policy 8; 10 family_id 10; 20 image_id 10; 30 vmpl 4; 34 signature_algo 4; "
        "38 current_tcb 8; 40 platform_info 8; 48.0 author_key_en 1; 48.1 mask_chip_key 1; 48.2 signing_key 3; "
        "50 report_data 40; 90 measurement 30; c0 host_data 20; e0 id_key_digest 30; 110 author_key_digest 30; "
        "140 report_id 20; 160 report_id_ma 20; 180 reported_tcb 8; 188 cpuid_family 1; 189 cpuid_model 1; "
        "18a cpuid_stepping 1; 1a0 chip_id 40; 1e0 committed_tcb 8; 1e8 current_build 1; 1e9 current_minor 1; "
        "1ea current_major 1; 1ec committed_build 1; 1ed committed_minor 1; 1ee committed_major 1; 1f0 launch_tcb 8; "
        "1f8 launch_mit_vector 8; 200 current_mit_vector 8; 2a0 signature_r 48; 2e8 signature_s 48",
    ),
    # Swap.
    "MdataEntry": (
        0x40,
        "0 software_data 8; 8 iv 8; 10 auth_tag 10; 20.0 valid 1; 20.1 page_validated 1; 20.2 vmsa 1; 20.3 metadata 1; "
        "20.4 page_size 1; 20.12 gfn 52; 28 vmpl_permissions 8",
    ),
    "LegacyMdata": (0x40, "0 software_data 8; 8 iv 8; 10 auth_tag 10; 3c.0 page_size 1; 3c.1 page_type 2"),
    # Legacy launch and certificates.
    "LaunchSession": (0x80, "0 nonce 10; 10 wrap_tk 20; 30 wrap_iv 10; 40 wrap_mac 20; 60 policy_mac 20"),
    "LaunchMeasurement": (0x30, "0 measure 20; 20 mnonce 10"),
    "PacketHeader": (0x34, "0.0 compressed 1; 4 iv 10; 14 mac 20"),
    "MeasureInput": (
        0x38, "0 context 1; 1 api_major 1; 2 api_minor 1; 3 build 1; 4 policy 4; 8 launch_digest 20; 28 mnonce 10",
    ),
    "PacketMacInput": (1 + 4 + 16 + 4 + 4, "0 context 1; 1 flags 4; 5 iv 10; 15 guest_len 4; 19 trans_len 4"),
    "LegacyAttestationReport": (
        0xD0,
        "0 mnonce 10; 10 launch_digest 20; 30 policy 4; 34 sig_usage 4; 38 sig_algo 4; 40 signature_r 48; "
        "88 signature_s 48",
    ),
    "SevCertificate": (
        2084,
        "0 version 4; 4 api_major 1; 5 api_minor 1; 6 unused 2; 8 pubkey_usage 4; c pubkey_algo 4; 10 pubkey 404; "
        "414 sig1_usage 4; 418 sig1_algo 4; 41c sig1 200; 61c sig2_usage 4; 620 sig2_algo 4; 624 sig2 200",
    ),
    "RsaPublicKey": (0x404, "0 modulus_bits 4; 4 exponent 200; 204 modulus 200"),
    "AmdCertificate2048": (
        832,
        "0 version 4; 4 key_id 10; 14 certifying_id 10; 24 key_usage 4; 28 unused 10; 38 exponent_bits 4; "
        "3c modulus_bits 4; "
        "40 exponent 100; 140 modulus 100; 240 signature 100",
    ),
    "AmdCertificate4096": (
        1600,
        "0 version 4; 4 key_id 10; 14 certifying_id 10; 24 key_usage 4; 28 unused 10; 38 exponent_bits 4; "
        "3c modulus_bits 4; "
        "40 exponent 200; 240 modulus 200; 440 signature 200",
    ),
    # Words.
    "GuestPolicy": (
        8,
        "0 abi_minor 1; 1 abi_major 1; 0.16 smt 1; 0.17 one 1; 0.18 migrate_ma 1; 0.19 debug 1; 0.20 single_socket 1; "
        "0.21 cxl_allow 1; 0.22 mem_aes_256_xts 1; 0.23 rapl_dis 1; 0.24 ciphertext_hiding 1; 0.25 page_swap_disable 1",
    ),
    "LegacyGuestPolicy": (
        4,
        "0.0 nodbg 1; 0.1 noks 1; 0.2 es 1; 0.3 nosend 1; 0.4 domain 1; 0.5 sev 1; 2 api_major 1; 3 api_minor 1",
    ),
    "PlatformInfo": (
        8,
        "0.0 smt_en 1; 0.1 tsme_en 1; 0.2 ecc_en 1; 0.3 rapl_dis 1; 0.4 ciphertext_hiding_en 1; "
        "0.5 alias_check_complete 1; 0.7 tio_en 1",
    ),
    "MailboxCommand": (4, "0.0 interrupt 1; 0.16 command 11; 0.31 response 1"),
    "MailboxResponse": (4, "0.0 status 16; 0.30 recovery 1; 0.31 response 1"),
}  # fmt: skip


def typed(text: str) -> dict[str, tuple[int, int]]:
    """First bit and width of each field of a row."""
    found = {}
    for part in filter(str.strip, text.split(";")):
        where, name, extent = part.split()
        offset, dot, bit = where.partition(".")
        first, width = int(offset, 16) * 8 + int(bit or "0"), int(extent) if dot else int(extent, 16) * 8
        found[name] = (first, width)
    return found


@pytest.mark.parametrize("name", SHEET)
def test_fields_lie_where_the_sheet_has_them(name: str) -> None:
    layout, (size, text) = REGISTRY[name], SHEET[name]
    assert layout.size == size
    assert {field.name: (field.first_bit, field.width) for field in layout.fields.values()} == typed(text)


DEFINED_IN = (context, dispatch.legacy, dispatch.snp, key_derivation, launch, legacy_launch, payloads, platform, policy,
              report, sev_certificates, swap)  # fmt: skip
ELSEWHERE = {"GuestContext", "LegacyPersistentData", "CertificateTableEntry"}
"""The model's own, and the hypervisor's."""


def test_no_structure_is_left_out() -> None:
    layouts = {value.name for module in DEFINED_IN for value in vars(module).values() if isinstance(value, Layout)}
    layouts |= {layout.name for layout in dispatch.BUFFERS.values() if layout is not None}
    assert layouts - ELSEWHERE <= SHEET.keys()


def test_fields_of_the_context_that_leave_it_are_all_exported_or_the_hosts_own() -> None:
    """What a guest's context holds beyond its export belongs to this host and this boot."""
    own = set(context.GUEST_CONTEXT.fields) - set(context.GUEST_CONTEXT_EXPORT.fields)
    assert own == {
        "asid", "vek_seed", "report_id_ma", "imi_en", "ma_paddr", "ccx_mask", "launch_mit_vector", "firmware_version",
    }  # fmt: skip
    assert set(context.GUEST_CONTEXT_EXPORT.fields) <= set(context.GUEST_CONTEXT.fields)
