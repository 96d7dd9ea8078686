"""The guest context: what the firmware keeps of one guest, in an encrypted page of its own.

The real page is opaque; its fields are known, their places are this model's own (MODEL). Also here:
the states of the platform and of a guest, and the commands that move them. Source: SNP ABI, guest context.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.commands import Command
from snpbook.spec.launch import DIGEST_SIZE, VMPCK_SIZE
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE


class PlatformState(IntEnum):
    """Whether SNP is initialised."""

    UNINIT = 0
    INIT = 1


class GuestState(IntEnum):
    """GSTATE: how far a guest's life has come."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


FIRMWARE_KEY_ID = 1022
"""The memory key of context pages: one of the reserved key ids, the model's own choice (MODEL)."""

GUEST_CONTEXT = Layout(
    "GuestContext",
    PAGE_SIZE,
    Cite("MODEL", "guest context page"),
    [
        uint("state", 0x000, 4, enum=GuestState),
        uint("asid", 0x004, 4),
        uint("policy", 0x008, 8),
        raw("launch_digest", 0x010, DIGEST_SIZE),
        raw("vek_seed", 0x040, 32),
        raw("oek", 0x060, 32),
        raw("vmpck0", 0x080, VMPCK_SIZE),
        raw("vmpck1", 0x0A0, VMPCK_SIZE),
        raw("vmpck2", 0x0C0, VMPCK_SIZE),
        raw("vmpck3", 0x0E0, VMPCK_SIZE),
        uint("msg_count0", 0x100, 8),
        uint("msg_count1", 0x108, 8),
        uint("msg_count2", 0x110, 8),
        uint("msg_count3", 0x118, 8),
        raw("report_id", 0x120, 32),
        raw("report_id_ma", 0x140, 32),
        raw("host_data", 0x160, 32),
        raw("vmrk", 0x180, 32),
        raw("id_key_digest", 0x1A0, DIGEST_SIZE),
        raw("author_key_digest", 0x1D0, DIGEST_SIZE),
        raw("id_block", 0x200, 0x60),
        bits("id_block_en", 0x260, 4, 0),
        bits("author_key_en", 0x260, 4, 1),
        bits("vcek_dis", 0x260, 4, 2),
        bits("imi_en", 0x260, 4, 3),
        uint("desired_tsc_khz", 0x264, 4),
        raw("gosvw", 0x268, 16),
        uint("launch_tcb", 0x278, 8),
    ],
)

GUEST_TRANSITIONS = {
    (GuestState.INIT, Command.SNP_LAUNCH_START): GuestState.LAUNCH,
    (GuestState.LAUNCH, Command.SNP_LAUNCH_UPDATE): GuestState.LAUNCH,
    (GuestState.LAUNCH, Command.SNP_ACTIVATE): GuestState.LAUNCH,
    (GuestState.RUNNING, Command.SNP_ACTIVATE): GuestState.RUNNING,
    (GuestState.LAUNCH, Command.SNP_LAUNCH_FINISH): GuestState.RUNNING,
    (GuestState.RUNNING, Command.SNP_GUEST_REQUEST): GuestState.RUNNING,
}
"""Which commands a guest's state admits and where they lead; every other pair is INVALID_GUEST_STATE.

GCTX_CREATE makes a context in INIT; DECOMMISSION is admitted in every state and ends it.
"""
