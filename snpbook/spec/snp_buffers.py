"""Command buffers of the SNP commands, named like the commands; bits that no field names must be zero.

Which fields a firmware release does not know yet, and takes for reserved, is in `snpbook.spec.releases`.
Sources: SNP ABI (commands), Linux include/linux/psp-sev.h; the rest as in firmware 1.55.25.
"""

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, bits, raw, uint
from snpbook.spec.pages import LaunchPage, PageSize
from snpbook.spec.swap import SwapType


def _buffer(command: str, size: int, *fields: Field) -> Layout:
    return Layout(f"{command}_BUFFER", size, Cite("SNP", command), fields)


SNP_PLATFORM_STATUS = _buffer("SNP_PLATFORM_STATUS", 0x08, uint("status_paddr", 0, 8))
SNP_INIT_EX = _buffer(
    "SNP_INIT_EX",
    0x40,
    bits("init_rmp", 0x00, 4, 0),
    bits("list_paddr_en", 0x00, 4, 1),
    bits("rapl_dis", 0x00, 4, 2),
    bits("ciphertext_hiding_en", 0x00, 4, 3),
    bits("tio_en", 0x00, 4, 4),
    uint("list_paddr", 0x08, 8),
    uint("max_snp_asid", 0x10, 2, note="highest ASID of SNP guests with ciphertext hiding"),
)
SNP_SHUTDOWN_EX = _buffer(
    "SNP_SHUTDOWN_EX",
    0x08,
    uint("length", 0x00, 4, note="of this buffer"),
    bits("iommu_snp_shutdown", 0x04, 4, 0),
    bits("x86_snp_shutdown", 0x04, 4, 1),
)
SNP_DECOMMISSION = _buffer("SNP_DECOMMISSION", 0x08, uint("gctx_paddr", 0, 8))
SNP_ACTIVATE = _buffer("SNP_ACTIVATE", 0x0C, uint("gctx_paddr", 0, 8), uint("asid", 8, 4))
SNP_GUEST_STATUS = _buffer("SNP_GUEST_STATUS", 0x10, uint("gctx_paddr", 0, 8), uint("status_paddr", 8, 8))
SNP_GCTX_CREATE = _buffer("SNP_GCTX_CREATE", 0x08, uint("gctx_paddr", 0, 8))
SNP_GUEST_REQUEST = _buffer(
    "SNP_GUEST_REQUEST",
    0x18,
    uint("gctx_paddr", 0x00, 8),
    uint("request_paddr", 0x08, 8),
    uint("response_paddr", 0x10, 8),
)
SNP_ACTIVATE_EX = _buffer(
    "SNP_ACTIVATE_EX",
    0x20,
    uint("length", 0x00, 4, note="of this buffer"),
    uint("gctx_paddr", 0x08, 8),
    uint("asid", 0x10, 4),
    uint("numids", 0x14, 4),
    uint("ids_paddr", 0x18, 8, note="u32 APIC ids"),
)
SNP_LAUNCH_START = _buffer(
    "SNP_LAUNCH_START",
    0x30,
    uint("gctx_paddr", 0x00, 8),
    uint("policy", 0x08, 8),
    uint("ma_gctx_paddr", 0x10, 8),
    bits("ma_en", 0x18, 4, 0),
    bits("imi_en", 0x18, 4, 1),
    uint("desired_tsc_khz", 0x1C, 4),
    raw("gosvw", 0x20, 16),
)
SNP_LAUNCH_UPDATE = _buffer(
    "SNP_LAUNCH_UPDATE",
    0x20,
    uint("gctx_paddr", 0x00, 8),
    bits("page_size", 0x08, 4, 0, enum=PageSize),
    bits("page_type", 0x08, 4, 1, 3, enum=LaunchPage),
    bits("imi_page", 0x08, 4, 4),
    uint("page_paddr", 0x10, 8),
    uint("vmpl1_perms", 0x19, 1),
    uint("vmpl2_perms", 0x1A, 1),
    uint("vmpl3_perms", 0x1B, 1),
)
SNP_LAUNCH_FINISH = _buffer(
    "SNP_LAUNCH_FINISH",
    0x40,
    uint("gctx_paddr", 0x00, 8),
    uint("id_block_paddr", 0x08, 8),
    uint("id_auth_paddr", 0x10, 8),
    bits("id_block_en", 0x18, 8, 0),
    bits("auth_key_en", 0x18, 8, 1),
    bits("vcek_dis", 0x18, 8, 2),
    raw("host_data", 0x20, 32),
)

_DEBUG = (uint("gctx_paddr", 0x00, 8), uint("src_paddr", 0x08, 8), uint("dst_paddr", 0x10, 8))
SNP_DBG_DECRYPT = _buffer("SNP_DBG_DECRYPT", 0x18, *_DEBUG)
SNP_DBG_ENCRYPT = _buffer("SNP_DBG_ENCRYPT", 0x18, *_DEBUG)
SNP_VERIFY_MITIGATION = _buffer(
    "SNP_VERIFY_MITIGATION",
    0x40,
    uint("length", 0x00, 4, note="of this buffer"),
    uint("subcommand", 0x04, 2, note="0 status, 1 verify"),
    uint("vector", 0x08, 8),
    bits("dst_paddr_en", 0x10, 4, 0),
    bits("src_paddr_en", 0x10, 4, 1),
    uint("src_paddr", 0x18, 8),
    uint("dst_paddr", 0x20, 8),
)

_SWAP = (
    uint("gctx_paddr", 0x00, 8),
    uint("src_paddr", 0x08, 8),
    uint("dst_paddr", 0x10, 8),
    uint("mdata_paddr", 0x18, 8),
    bits("page_size", 0x28, 8, 0, enum=PageSize),
    bits("page_type", 0x28, 8, 1, 2, enum=SwapType),
    bits("root_mdata_en", 0x28, 8, 4, note="the entry is the one in the guest context"),
)
SNP_PAGE_SWAP_OUT = _buffer("SNP_PAGE_SWAP_OUT", 0x30, *_SWAP, uint("software_data", 0x20, 8))
SNP_PAGE_SWAP_IN = _buffer("SNP_PAGE_SWAP_IN", 0x30, *_SWAP, bits("swap_in_place", 0x28, 8, 3))
SNP_PAGE_MOVE = _buffer(
    "SNP_PAGE_MOVE",
    0x20,
    uint("gctx_paddr", 0x00, 8),
    bits("page_size", 0x08, 4, 0, enum=PageSize),
    uint("src_paddr", 0x10, 8),
    uint("dst_paddr", 0x18, 8),
)
SNP_PAGE_MD_INIT = _buffer("SNP_PAGE_MD_INIT", 0x10, uint("gctx_paddr", 0x00, 8), uint("page_paddr", 0x08, 8))
SNP_PAGE_SET_STATE = _buffer(
    "SNP_PAGE_SET_STATE", 0x10, uint("length", 0x00, 4, note="of this buffer"), uint("list_paddr", 0x08, 8)
)
SNP_PAGE_RECLAIM = _buffer(
    "SNP_PAGE_RECLAIM", 0x08, bits("page_size", 0, 8, 0, enum=PageSize), bits("page", 0, 8, 12, 52)
)
SNP_PAGE_UNSMASH = _buffer("SNP_PAGE_UNSMASH", 0x08, uint("page_paddr", 0, 8, note="of 2 MB"))
SNP_CONFIG = _buffer(
    "SNP_CONFIG",
    0x40,
    uint("reported_tcb", 0x00, 8, note="0: the committed one"),
    bits("mask_chip_id", 0x08, 4, 0),
    bits("mask_chip_key", 0x08, 4, 1),
)
SNP_DOWNLOAD_FIRMWARE_EX = _buffer(
    "SNP_DOWNLOAD_FIRMWARE_EX",
    0x18,
    uint("length", 0x00, 4, note="of this buffer; ignored"),
    uint("fw_paddr", 0x08, 8),
    uint("fw_len", 0x10, 4),
    bits("commit", 0x14, 4, 0),
)
SNP_COMMIT = _buffer("SNP_COMMIT", 0x04, uint("length", 0x00, 4, note="of this buffer"))
SNP_VLEK_LOAD = _buffer(
    "SNP_VLEK_LOAD",
    0x10,
    uint("length", 0x00, 4, note="of this buffer"),
    uint("vlek_wrapped_version", 0x04, 1),
    uint("vlek_wrapped_paddr", 0x08, 8),
)
SNP_FEATURE_INFO = _buffer(
    "SNP_FEATURE_INFO",
    0x10,
    uint("length", 0x00, 4, note="of this buffer"),
    uint("ecx_in", 0x04, 4),
    uint("feature_info_paddr", 0x08, 8),
)
