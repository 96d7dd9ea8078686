"""The guest context: what the firmware keeps of one guest, in an encrypted page of its own.

The real page is opaque; its fields are known, their places are this model's own (MODEL). What a migration agent
gets of it has a published layout. Source: SNP ABI, guest context and MSG_EXPORT_RSP; firmware 1.55.25.
"""

from snpbook.spec.cite import Cite
from snpbook.spec.launch import DIGEST_SIZE, ID_BLOCK, VMPCK_SIZE
from snpbook.spec.layout import Layout, bits, raw, sub, uint
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.states import GuestState
from snpbook.spec.swap import MDATA_ENTRY

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
        raw("imd", 0x280, DIGEST_SIZE, note="digest of the incoming migration image"),
        uint("oek_iv_count", 0x2B0, 8),
        uint("ma_paddr", 0x2B8, 8, note="the migration agent's context; all ones: none"),
        sub("root_md_entry", 0x2C0, MDATA_ENTRY),
        uint("ccx_mask", 0x300, 8, note="core complexes on which the guest is active"),
        uint("tsc_offset", 0x308, 8),
        uint("launch_mit_vector", 0x310, 8, note="ABI 1.58"),
        uint("firmware_version", 0x318, 4, note="that last touched the page"),
    ],
)

NO_AGENT = 2**64 - 1
"""MA_PADDR of a guest without a migration agent; its REPORT_ID_MA is all ones too."""

GUEST_CONTEXT_EXPORT = Layout(
    "GuestContextExport",
    0x300,
    Cite("SNP", "MSG_EXPORT_RSP"),
    [
        raw("launch_digest", 0x000, DIGEST_SIZE),
        raw("oek", 0x030, 32),
        raw("vmpck0", 0x050, VMPCK_SIZE),
        raw("vmpck1", 0x070, VMPCK_SIZE),
        raw("vmpck2", 0x090, VMPCK_SIZE),
        raw("vmpck3", 0x0B0, VMPCK_SIZE),
        raw("vmrk", 0x0D0, 32),
        raw("host_data", 0x0F0, 32),
        raw("id_key_digest", 0x110, DIGEST_SIZE),
        raw("author_key_digest", 0x140, DIGEST_SIZE),
        raw("report_id", 0x170, 32),
        raw("imd", 0x190, DIGEST_SIZE),
        uint("msg_count0", 0x1C0, 8),
        uint("msg_count1", 0x1C8, 8),
        uint("msg_count2", 0x1D0, 8),
        uint("msg_count3", 0x1D8, 8),
        sub("root_md_entry", 0x1E0, MDATA_ENTRY),
        bits("author_key_en", 0x220, 8, 0),
        bits("id_block_en", 0x220, 8, 1),
        bits("vcek_dis", 0x220, 8, 2, note="exported and not taken over by 1.55.25"),
        uint("policy", 0x228, 8),
        uint("state", 0x230, 8, enum=GuestState),
        uint("oek_iv_count", 0x238, 8),
        raw("id_block", 0x240, ID_BLOCK.size),
        raw("gosvw", 0x2A0, 16),
        uint("desired_tsc_khz", 0x2B0, 4),
        uint("tsc_offset", 0x2B8, 8),
        uint("launch_tcb", 0x2C0, 8),
    ],
)
EXPORT_VERSION = 3
