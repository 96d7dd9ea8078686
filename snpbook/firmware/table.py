"""The command table: which function answers which mailbox command, and the layout of its buffer.

A command that is not here answers INVALID_COMMAND; LIMITATIONS.md names those that real firmware has.
"""

from __future__ import annotations

from snpbook.firmware import (
    configuration,
    debug,
    guests,
    initialisation,
    launch,
    launch_update,
    legacy_guests,
    legacy_keys,
    legacy_launch,
    legacy_platform,
    legacy_swap,
    legacy_transport,
    page_move,
    page_states,
    platform,
    requests,
    shutdown,
    swap,
    updates,
)
from snpbook.firmware.keys import Chip
from snpbook.firmware.processor import Commands, Rng, SecureProcessor
from snpbook.hardware.machine import Machine
from snpbook.spec import legacy_buffers as legacy
from snpbook.spec import snp_buffers as buffers
from snpbook.spec.commands import Command

COMMANDS: Commands = {
    Command.INIT: (legacy.INIT, legacy_platform.init, None),
    Command.SHUTDOWN: (None, legacy_platform.shutdown, None),
    Command.PLATFORM_RESET: (None, legacy_platform.platform_reset, None),
    Command.PLATFORM_STATUS: (legacy.PLATFORM_STATUS, legacy_platform.platform_status, None),
    Command.PEK_GEN: (None, legacy_keys.pek_gen, None),
    Command.PEK_CSR: (legacy.PEK_CSR, legacy_keys.pek_csr, None),
    Command.PEK_CERT_IMPORT: (legacy.PEK_CERT_IMPORT, legacy_keys.pek_cert_import, None),
    Command.PDH_CERT_EXPORT: (legacy.PDH_CERT_EXPORT, legacy_keys.pdh_cert_export, None),
    Command.PDH_GEN: (None, legacy_keys.pdh_gen, None),
    Command.DF_FLUSH: (None, legacy_platform.df_flush, None),
    Command.DOWNLOAD_FIRMWARE: (legacy.DOWNLOAD_FIRMWARE, legacy_platform.download_firmware, None),
    Command.GET_ID: (legacy.GET_ID, legacy_platform.get_id, None),
    Command.INIT_EX: (legacy.INIT_EX, legacy_platform.init_ex, None),
    Command.NOP: (None, legacy_platform.nop, None),
    Command.DECOMMISSION: (legacy.DECOMMISSION, legacy_guests.decommission, None),
    Command.ACTIVATE: (legacy.ACTIVATE, legacy_guests.activate, None),
    Command.DEACTIVATE: (legacy.DEACTIVATE, legacy_guests.deactivate, None),
    Command.GUEST_STATUS: (legacy.GUEST_STATUS, legacy_guests.guest_status, None),
    Command.COPY: (legacy.COPY, legacy_guests.copy, None),
    Command.ACTIVATE_EX: (legacy.ACTIVATE_EX, legacy_guests.activate_ex, None),
    Command.LAUNCH_START: (legacy.LAUNCH_START, legacy_launch.launch_start, None),
    Command.LAUNCH_UPDATE_DATA: (legacy.LAUNCH_UPDATE_DATA, legacy_launch.launch_update_data, None),
    Command.LAUNCH_UPDATE_VMSA: (legacy.LAUNCH_UPDATE_VMSA, legacy_launch.launch_update_vmsa, None),
    Command.LAUNCH_MEASURE: (legacy.LAUNCH_MEASURE, legacy_launch.launch_measure, None),
    Command.LAUNCH_SECRET: (legacy.LAUNCH_SECRET, legacy_launch.launch_secret, None),
    Command.LAUNCH_FINISH: (legacy.LAUNCH_FINISH, legacy_launch.launch_finish, None),
    Command.ATTESTATION: (legacy.ATTESTATION, legacy_launch.attestation, None),
    Command.SEND_START: (legacy.SEND_START, legacy_transport.send_start, None),
    Command.SEND_UPDATE_DATA: (legacy.SEND_UPDATE_DATA, legacy_transport.send_update_data, None),
    Command.SEND_UPDATE_VMSA: (legacy.SEND_UPDATE_VMSA, legacy_transport.send_update_vmsa, None),
    Command.SEND_FINISH: (legacy.SEND_FINISH, legacy_transport.send_finish, None),
    Command.SEND_CANCEL: (legacy.SEND_CANCEL, legacy_transport.send_cancel, None),
    Command.RECEIVE_START: (legacy.RECEIVE_START, legacy_transport.receive_start, None),
    Command.RECEIVE_UPDATE_DATA: (legacy.RECEIVE_UPDATE_DATA, legacy_transport.receive_update_data, None),
    Command.RECEIVE_UPDATE_VMSA: (legacy.RECEIVE_UPDATE_VMSA, legacy_transport.receive_update_vmsa, None),
    Command.RECEIVE_FINISH: (legacy.RECEIVE_FINISH, legacy_transport.receive_finish, None),
    Command.DBG_DECRYPT: (legacy.DBG_DECRYPT, legacy_guests.dbg_decrypt, None),
    Command.DBG_ENCRYPT: (legacy.DBG_ENCRYPT, legacy_guests.dbg_encrypt, None),
    Command.SWAP_OUT: (legacy.SWAP_OUT, legacy_swap.swap_out, None),
    Command.SWAP_IN: (legacy.SWAP_IN, legacy_swap.swap_in, None),
    Command.SNP_INIT: (None, initialisation.snp_init, None),
    Command.SNP_INIT_EX: (buffers.SNP_INIT_EX, initialisation.snp_init_ex, None),
    Command.SNP_SHUTDOWN: (None, shutdown.snp_shutdown, None),
    Command.SNP_SHUTDOWN_EX: (buffers.SNP_SHUTDOWN_EX, shutdown.snp_shutdown_ex, None),
    Command.SNP_PLATFORM_STATUS: (buffers.SNP_PLATFORM_STATUS, platform.snp_platform_status, None),
    Command.SNP_DF_FLUSH: (None, platform.snp_df_flush, None),
    Command.SNP_FEATURE_INFO: (buffers.SNP_FEATURE_INFO, platform.snp_feature_info, None),
    Command.SNP_VERIFY_MITIGATION: (buffers.SNP_VERIFY_MITIGATION, platform.snp_verify_mitigation, None),
    Command.SNP_CONFIG: (buffers.SNP_CONFIG, configuration.snp_config, None),
    Command.SNP_COMMIT: (buffers.SNP_COMMIT, configuration.snp_commit, None),
    Command.SNP_VLEK_LOAD: (buffers.SNP_VLEK_LOAD, configuration.snp_vlek_load, None),
    Command.SNP_DOWNLOAD_FIRMWARE_EX: (buffers.SNP_DOWNLOAD_FIRMWARE_EX, updates.snp_download_firmware_ex, None),
    Command.SNP_PAGE_RECLAIM: (buffers.SNP_PAGE_RECLAIM, page_states.snp_page_reclaim, page_states.reclaim_run),
    Command.SNP_PAGE_SET_STATE: (buffers.SNP_PAGE_SET_STATE, page_states.snp_page_set_state, None),
    Command.SNP_PAGE_UNSMASH: (buffers.SNP_PAGE_UNSMASH, page_states.snp_page_unsmash, None),
    Command.SNP_GCTX_CREATE: (buffers.SNP_GCTX_CREATE, guests.snp_gctx_create, None),
    Command.SNP_ACTIVATE: (buffers.SNP_ACTIVATE, guests.snp_activate, None),
    Command.SNP_ACTIVATE_EX: (buffers.SNP_ACTIVATE_EX, guests.snp_activate_ex, None),
    Command.SNP_GUEST_STATUS: (buffers.SNP_GUEST_STATUS, guests.snp_guest_status, None),
    Command.SNP_DECOMMISSION: (buffers.SNP_DECOMMISSION, guests.snp_decommission, None),
    Command.SNP_LAUNCH_START: (buffers.SNP_LAUNCH_START, launch.snp_launch_start, None),
    Command.SNP_LAUNCH_UPDATE: (
        buffers.SNP_LAUNCH_UPDATE,
        launch_update.snp_launch_update,
        launch_update.launch_update_run,
    ),
    Command.SNP_LAUNCH_FINISH: (buffers.SNP_LAUNCH_FINISH, launch.snp_launch_finish, None),
    Command.SNP_GUEST_REQUEST: (buffers.SNP_GUEST_REQUEST, requests.snp_guest_request, None),
    Command.SNP_DBG_DECRYPT: (buffers.SNP_DBG_DECRYPT, debug.snp_dbg_decrypt, None),
    Command.SNP_DBG_ENCRYPT: (buffers.SNP_DBG_ENCRYPT, debug.snp_dbg_encrypt, None),
    Command.SNP_PAGE_SWAP_OUT: (buffers.SNP_PAGE_SWAP_OUT, swap.snp_page_swap_out, None),
    Command.SNP_PAGE_SWAP_IN: (buffers.SNP_PAGE_SWAP_IN, swap.snp_page_swap_in, None),
    Command.SNP_PAGE_MOVE: (buffers.SNP_PAGE_MOVE, page_move.snp_page_move, None),
    Command.SNP_PAGE_MD_INIT: (buffers.SNP_PAGE_MD_INIT, swap.snp_page_md_init, None),
}


def power_on(machine: Machine, chip: Chip, rng: Rng) -> SecureProcessor:
    """The secure processor of a machine, its firmware running and the mailbox connected."""
    return SecureProcessor(machine, chip, rng, COMMANDS)
