"""Fields with which commands have a chance on the boards of `fuzzing`: for each field some values to choose from.

Fields that are not named are zero; handles, contexts and lengths of buffers are the same for all commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snpbook.spec.commands import Command
from tests.firmware.legacy_board import NV, A, B, C, D
from tests.machines import FREE, GCTX, MIB, PAGE

AGENT, TARGET = GCTX + PAGE, GCTX + 2 * PAGE
NORMAL, SECRETS, PRE_GUEST, PRE_SWAP, METADATA, FREE_METADATA = (FREE + number * PAGE for number in range(6))
BLANK = [FREE + number * PAGE for number in range(8, 14)]
"""Firmware pages."""
MESSAGE, IMAGE, SEALED, LIST = INPUT = [20 * MIB + number * PAGE for number in range(4)]
"""Pages of the hypervisor for what commands read beside their buffers."""
LARGE, LARGE_FIRMWARE, TMR = 22 * MIB, 24 * MIB, 40 * MIB

_C = Command
Choices = Mapping[str, Sequence[int]]
_CERT, _PACKET = 2084, {"hdr_len": [0x34], "guest_len": [16, PAGE], "trans_len": [16, PAGE]}
_OUT = [A + PAGE, B + PAGE, *BLANK]
_ENTRIES = [METADATA, METADATA + 64]
_SWAP: Choices = {"mdata_paddr": _ENTRIES, "root_mdata_en": [0, 0, 1], "page_type": [0, 0, 1, 2]}
_LEGACY_SWAP: Choices = {"page_type": [0, 0, 2], "mdata_paddr": [LIST, BLANK[0]]}
_PEER: Choices = {"pdh_cert_paddr": [A], "pdh_cert_len": [_CERT], "session_paddr": [B], "session_len": [0x80]}

COMMON: Choices = {"handle": [1, 1, 2, 3], "gctx_paddr": [GCTX, GCTX, AGENT, TARGET]}
TYPICAL: Mapping[Command, Choices] = {
    _C.INIT: {"es": [0, 1], "tmr_paddr": [TMR], "tmr_len": [MIB, 2 * MIB]},
    _C.INIT_EX: {"es": [0, 1], "tmr_paddr": [TMR], "tmr_len": [MIB], "nv_paddr": [0, NV], "nv_len": [0x8000]},
    _C.PEK_CSR: {"paddr": _OUT, "len": [_CERT, 0]},
    _C.PEK_CERT_IMPORT: {"pek_cert_paddr": [A], "pek_cert_len": [_CERT], "oca_cert_paddr": [B],
                         "oca_cert_len": [_CERT]},
    _C.PDH_CERT_EXPORT: {"pdh_cert_paddr": _OUT, "pdh_cert_len": [_CERT], "cert_chain_paddr": _OUT,
                         "cert_chain_len": [3 * _CERT]},
    _C.DOWNLOAD_FIRMWARE: {"paddr": [IMAGE], "len": [PAGE]},
    _C.GET_ID: {"paddr": _OUT, "len": [64, 128]},
    _C.ACTIVATE: {"asid": [2, 3, 110, 111]},
    _C.COPY: {"len": [PAGE], "src_paddr": [A, NV], "dst_paddr": _OUT},
    _C.ACTIVATE_EX: {"asid": [2, 3, 110, 111], "numids": [1, 2], "ids_paddr": [LIST]},
    _C.LAUNCH_START: {"policy": [0, 4], "handle": [0, 0, 1]},
    _C.LAUNCH_UPDATE_DATA: {"paddr": [NV, *_OUT], "len": [16, PAGE, 0x6000]},
    _C.LAUNCH_UPDATE_VMSA: {"paddr": [NV, *_OUT], "len": [PAGE]},
    _C.LAUNCH_MEASURE: {"paddr": _OUT, "len": [0x30, 0]},
    _C.LAUNCH_SECRET: {"hdr_paddr": [C], "trans_paddr": [D], "guest_paddr": [NV], **_PACKET},
    _C.ATTESTATION: {"paddr": _OUT, "len": [0xD0, 0]},
    _C.SEND_START: {**_PEER, "session_paddr": _OUT},
    _C.SEND_UPDATE_DATA: {"hdr_paddr": _OUT, "trans_paddr": _OUT, "guest_paddr": [NV], **_PACKET},
    _C.SEND_UPDATE_VMSA: {"hdr_paddr": _OUT, "trans_paddr": _OUT, "guest_paddr": [NV], **_PACKET},
    _C.RECEIVE_START: {**_PEER, "policy": [4], "handle": [0]},
    _C.RECEIVE_UPDATE_DATA: {"hdr_paddr": [C], "trans_paddr": [D], "guest_paddr": _OUT, **_PACKET},
    _C.RECEIVE_UPDATE_VMSA: {"hdr_paddr": [C], "trans_paddr": [D], "guest_paddr": _OUT, **_PACKET},
    _C.DBG_DECRYPT: {"src_paddr": [NV, A], "dst_paddr": _OUT, "len": [16, PAGE]},
    _C.DBG_ENCRYPT: {"src_paddr": [A, D], "dst_paddr": [NV, *_OUT], "len": [16, PAGE]},
    _C.SWAP_OUT: {**_LEGACY_SWAP, "src_paddr": [NV], "dst_paddr": [A, BLANK[1]]},
    _C.SWAP_IN: {**_LEGACY_SWAP, "src_paddr": [A, BLANK[1]], "dst_paddr": [NV]},
    _C.SNP_INIT_EX: {"init_rmp": [0, 1, 1], "list_paddr": [LIST], "list_paddr_en": [0, 1], "rapl_dis": [0, 0, 1],
                     "ciphertext_hiding_en": [0, 0, 1], "max_snp_asid": [0, 0, 50]},
    _C.SNP_SHUTDOWN_EX: {"iommu_snp_shutdown": [0, 1], "x86_snp_shutdown": [0, 1]},
    _C.SNP_PLATFORM_STATUS: {"status_paddr": [*BLANK, GCTX]},
    _C.SNP_ACTIVATE: {"asid": [1, 2, 3, 98]},
    _C.SNP_ACTIVATE_EX: {"asid": [1, 2, 3, 98], "numids": [1, 2], "ids_paddr": [LIST]},
    _C.SNP_GUEST_STATUS: {"status_paddr": BLANK},
    _C.SNP_GCTX_CREATE: {"gctx_paddr": [*BLANK, GCTX, TARGET]},
    _C.SNP_LAUNCH_START: {"gctx_paddr": [TARGET, *BLANK], "policy": [0x30000, 0x70000, 0xF0000], "ma_en": [0, 1],
                          "ma_gctx_paddr": [AGENT], "imi_en": [0, 0, 1], "desired_tsc_khz": [0, 2_000_000, 2**32 - 1]},
    _C.SNP_LAUNCH_UPDATE: {"page_paddr": [PRE_GUEST, PRE_GUEST, LARGE], "page_type": range(8), "page_size": [0, 0, 1],
                           "imi_page": [0, 0, 1], "vmpl1_perms": [0, 15]},
    _C.SNP_LAUNCH_FINISH: {"vcek_dis": [0, 0, 1], "auth_key_en": [0, 1]},
    _C.SNP_DBG_DECRYPT: {"src_paddr": [NORMAL, SECRETS, PRE_SWAP, LARGE + PAGE], "dst_paddr": BLANK},
    _C.SNP_DBG_ENCRYPT: {"src_paddr": INPUT, "dst_paddr": [PRE_GUEST, PRE_SWAP, LARGE]},
    _C.SNP_VERIFY_MITIGATION: {"subcommand": [0, 1], "vector": [0, 1, 3], "dst_paddr_en": [0, 1], "dst_paddr": BLANK},
    _C.SNP_PAGE_SWAP_OUT: {**_SWAP, "src_paddr": [PRE_SWAP, PRE_GUEST, METADATA], "dst_paddr": BLANK[:2]},
    _C.SNP_PAGE_SWAP_IN: {**_SWAP, "src_paddr": BLANK[:2], "dst_paddr": [PRE_SWAP, PRE_GUEST, FREE_METADATA]},
    _C.SNP_PAGE_MOVE: {"src_paddr": [PRE_SWAP, PRE_GUEST, METADATA], "dst_paddr": [PRE_GUEST, PRE_SWAP, FREE_METADATA]},
    _C.SNP_PAGE_MD_INIT: {"page_paddr": [FREE_METADATA, LARGE_FIRMWARE, *BLANK]},
    _C.SNP_PAGE_SET_STATE: {"list_paddr": [LIST]},
    _C.SNP_PAGE_RECLAIM: {"page": [at >> 12 for at in (PRE_GUEST, PRE_SWAP, METADATA, *BLANK, LARGE, LARGE_FIRMWARE)],
                          "page_size": [0, 0, 1]},
    _C.SNP_PAGE_UNSMASH: {"page_paddr": [LARGE, LARGE_FIRMWARE, 26 * MIB]},
    _C.SNP_CONFIG: {"mask_chip_id": [0, 1], "mask_chip_key": [0, 0, 1]},
    _C.SNP_DOWNLOAD_FIRMWARE_EX: {"fw_paddr": [IMAGE], "fw_len": [PAGE], "commit": [0, 0, 1]},
    _C.SNP_VLEK_LOAD: {"vlek_wrapped_paddr": [SEALED]},
    _C.SNP_FEATURE_INFO: {"ecx_in": [0, 1], "feature_info_paddr": BLANK},
}  # fmt: skip
