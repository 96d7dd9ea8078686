"""What a launch is made of: PAGE_INFO, the ID block, the CPUID and secrets pages, kernel hashes.

Sources: SNP ABI (SNP_LAUNCH_UPDATE, SNP_LAUNCH_FINISH, CPUID and secrets page), QEMU for the hash table.
"""

from __future__ import annotations

from hashlib import sha256

from snpbook.spec import guid
from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, sub, uint
from snpbook.spec.pages import PAGE_SIZE, LaunchPage

DIGEST_SIZE = 48

PAGE_INFO = Layout(
    "PageInfo",
    0x70,
    Cite("SNP", "PAGE_INFO"),
    [
        raw("digest_cur", 0x00, DIGEST_SIZE),
        raw("contents", 0x30, DIGEST_SIZE),
        uint("length", 0x60, 2),
        uint("page_type", 0x62, 1, enum=LaunchPage),
        bits("imi_page", 0x63, 1, 0),
        uint("vmpl1_perms", 0x65, 1),
        uint("vmpl2_perms", 0x66, 1),
        uint("vmpl3_perms", 0x67, 1),
        uint("gpa", 0x68, 8),
    ],
)

PUBLIC_KEY = Layout(
    "EcPublicKey",
    0x404,
    Cite("SNP", "ECDSA public key format"),
    [uint("curve", 0, 4), raw("qx", 0x004, 72), raw("qy", 0x04C, 72)],
)
CURVE_SECP256K1, CURVE_P384 = 1, 2
"""Other documents call the first P-256; firmware 1.55.25 has the parameters of secp256k1."""

SIGNATURE = Layout("EcSignature", 0x200, Cite("SNP", "ECDSA signature format"), [raw("r", 0, 72), raw("s", 72, 72)])

OWNER_ID_SIZE = 16
"""Family and image are the owner's own numbers."""

ID_BLOCK = Layout(
    "IdBlock",
    0x60,
    Cite("SNP", "ID block"),
    [
        raw("launch_digest", 0x00, DIGEST_SIZE),
        raw("family_id", 0x30, OWNER_ID_SIZE),
        raw("image_id", 0x40, OWNER_ID_SIZE),
        uint("version", 0x50, 4),
        uint("guest_svn", 0x54, 4),
        uint("policy", 0x58, 8),
    ],
)
ID_BLOCK_VERSION = 1

ID_AUTH = Layout(
    "IdAuthentication",
    PAGE_SIZE,
    Cite("SNP", "ID authentication information"),
    [
        uint("id_key_algo", 0x000, 4),
        uint("author_key_algo", 0x004, 4),
        raw("id_block_signature", 0x040, 0x200),
        raw("id_key", 0x240, 0x404),
        raw("id_key_signature", 0x680, 0x200),
        raw("author_key", 0x880, 0x404),
    ],
)
ALGO_ECDSA_P384_SHA384 = 1

CPUID_ENTRY = Layout(
    "CpuidEntry",
    0x30,
    Cite("SNP", "CPUID page"),
    [
        uint("eax_in", 0x00, 4),
        uint("ecx_in", 0x04, 4),
        uint("xcr0_in", 0x08, 8),
        uint("xss_in", 0x10, 8),
        uint("eax", 0x18, 4),
        uint("ebx", 0x1C, 4),
        uint("ecx", 0x20, 4),
        uint("edx", 0x24, 4),
    ],
)
CPUID_ENTRIES = 64

CPUID_PAGE = Layout(
    "CpuidPage",
    PAGE_SIZE,
    Cite("SNP", "CPUID page"),
    [uint("count", 0, 4), sub("entries", 0x10, CPUID_ENTRY, count=CPUID_ENTRIES)],
)

VMPCK_SIZE = 32

SECRETS_PAGE = Layout(
    "SecretsPage",
    PAGE_SIZE,
    Cite("SNP", "secrets page"),
    [
        uint("version", 0x000, 4),
        bits("imi_en", 0x004, 4, 0),
        uint("fms", 0x008, 4, note="CPUID Fn1 EAX"),
        raw("gosvw", 0x010, 16),
        raw("vmpck0", 0x020, VMPCK_SIZE),
        raw("vmpck1", 0x040, VMPCK_SIZE),
        raw("vmpck2", 0x060, VMPCK_SIZE),
        raw("vmpck3", 0x080, VMPCK_SIZE),
        uint("msg_seqno_0", 0x0A0, 4, note="guest's own: the last sequence number used"),
        uint("msg_seqno_1", 0x0A4, 4),
        uint("msg_seqno_2", 0x0A8, 4),
        uint("msg_seqno_3", 0x0AC, 4),
        uint("ap_jump_table_pa", 0x0B0, 8),
        uint("msg_seqno_high_0", 0x0B8, 4, note="upper halves, GHCB 2.01"),
        uint("msg_seqno_high_1", 0x0BC, 4),
        uint("msg_seqno_high_2", 0x0C0, 4),
        uint("msg_seqno_high_3", 0x0C4, 4),
        uint("os_area_version", 0x0DE, 2),
        raw("guest_usage", 0x0E0, 32),
        raw("vmsa_tweak_bitmap", 0x100, 64),
        uint("svsm_base", 0x140, 8),
        uint("svsm_size", 0x148, 8),
        uint("svsm_caa", 0x150, 8),
        uint("svsm_max_version", 0x158, 4),
        uint("svsm_guest_vmpl", 0x15C, 1),
        uint("tsc_factor", 0x160, 4),
        uint("launch_mit_vector", 0x168, 8, note="ABI 1.58"),
    ],
)

_TWEAK = {0x05: 0x80, 0x07: 0x88, 0x0C: 0xEE, 0x0D: 0xFF, 0x10: 0xF0, 0x19: 0x3F}
VMSA_TWEAK_BITMAP = bytes(_TWEAK.get(i, 0xFF if 0x11 <= i <= 0x18 or 0x26 <= i <= 0x3E else 0) for i in range(64))
"""Genoa: which quadwords of a VMSA are XORed with the nonce when VmsaRegProt is on."""

HASH_TABLE_SIZE = 168
HASH_ENTRY_SIZE = 50
HASH_TABLE_PADDED = 176


def kernel_hash_table(kernel: bytes, initrd: bytes = b"", cmdline: str = "") -> bytes:
    """The 176-byte table of SHA-256 hashes that measured direct boot places in the guest.

    The command line counts with its trailing NUL. Source: QEMU target/i386/sev.c.
    """
    entries = (
        (guid.HASH_CMDLINE, cmdline.encode() + b"\0"),
        (guid.HASH_INITRD, initrd),
        (guid.HASH_KERNEL, kernel),
    )
    table = guid.HASH_TABLE.bytes_le + HASH_TABLE_SIZE.to_bytes(2, "little")
    for identifier, content in entries:
        table += identifier.bytes_le + HASH_ENTRY_SIZE.to_bytes(2, "little") + sha256(content).digest()
    return table.ljust(HASH_TABLE_PADDED, b"\0")


def kernel_hashes_of(data: bytes) -> dict[str, bytes]:
    """The hashes in a table anywhere in `data`, by what they are of; none where there is no table."""
    start = data.find(guid.HASH_TABLE.bytes_le)
    if start < 0:
        return {}
    names = {guid.HASH_CMDLINE: "command line", guid.HASH_INITRD: "initrd", guid.HASH_KERNEL: "kernel"}
    entries = {name: data.find(identifier.bytes_le, start) for identifier, name in names.items()}
    header, digest_size = HASH_ENTRY_SIZE - sha256().digest_size, sha256().digest_size
    return {name: data[at + header :][:digest_size] for name, at in entries.items() if at >= 0}


def kernel_hash_page(table: bytes, area_base: int) -> bytes:
    """The page of an SNP guest that holds the hash table, at the area's offset in the page.

    `ValueError` where the table would leave the page.
    """
    offset = area_base % PAGE_SIZE
    if offset + len(table) > PAGE_SIZE:
        raise ValueError(f"the hash table of {len(table)} bytes at page offset {offset:#x} leaves its page")
    return (bytes(offset) + table).ljust(PAGE_SIZE, b"\0")
