"""The command table: which function answers which mailbox command, and the layout of its buffer.

A command that is not here answers INVALID_COMMAND; LIMITATIONS.md names those that real firmware has.
"""

from __future__ import annotations

from snpbook.firmware import guests, launch, launch_update, platform, requests
from snpbook.firmware.keys import Chip
from snpbook.firmware.processor import Commands, Rng, SecureProcessor
from snpbook.hardware.machine import Machine
from snpbook.spec import snp_buffers as buffers
from snpbook.spec.commands import Command

COMMANDS: Commands = {
    Command.SNP_INIT_EX: (buffers.SNP_INIT_EX, platform.snp_init_ex, None),
    Command.SNP_PLATFORM_STATUS: (buffers.SNP_PLATFORM_STATUS, platform.snp_platform_status, None),
    Command.SNP_DF_FLUSH: (None, platform.snp_df_flush, None),
    Command.SNP_PAGE_RECLAIM: (buffers.SNP_PAGE_RECLAIM, platform.snp_page_reclaim, platform.reclaim_run),
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
}


def power_on(machine: Machine, chip: Chip, rng: Rng) -> SecureProcessor:
    """The secure processor of a machine, its firmware running and the mailbox connected."""
    return SecureProcessor(machine, chip, rng, COMMANDS)
