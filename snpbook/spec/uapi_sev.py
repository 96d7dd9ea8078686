"""KVM_MEMORY_ENCRYPT_OP: the sub-commands of both eras and the structure that each takes.

The names are one set, the numbers differ by era (`snpbook.spec.eras` chooses). Layouts carry the kernel's names; what
they do not name is padding. Sources: Linux 6.12 uapi asm/kvm.h, RFC v7 patches 37 to 40, 62 and 63.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, raw, uint
from snpbook.spec.pages import LaunchPage

_LINUX = Cite("LINUX", "KVM_MEMORY_ENCRYPT_OP")


class SevOp(Enum):
    """What a VMM asks of an encrypted VM, KVM_SEV_* by name."""

    INIT = auto()
    ES_INIT = auto()
    LAUNCH_START = auto()
    LAUNCH_UPDATE_DATA = auto()
    LAUNCH_UPDATE_VMSA = auto()
    LAUNCH_SECRET = auto()
    LAUNCH_MEASURE = auto()
    LAUNCH_FINISH = auto()
    SEND_START = auto()
    SEND_UPDATE_DATA = auto()
    SEND_UPDATE_VMSA = auto()
    SEND_FINISH = auto()
    RECEIVE_START = auto()
    RECEIVE_UPDATE_DATA = auto()
    RECEIVE_UPDATE_VMSA = auto()
    RECEIVE_FINISH = auto()
    GUEST_STATUS = auto()
    DBG_DECRYPT = auto()
    DBG_ENCRYPT = auto()
    CERT_EXPORT = auto()
    GET_ATTESTATION_REPORT = auto()
    SEND_CANCEL = auto()
    INIT2 = auto()
    SNP_INIT = auto()
    SNP_LAUNCH_START = auto()
    SNP_LAUNCH_UPDATE = auto()
    SNP_LAUNCH_FINISH = auto()
    SNP_GET_CERTS = auto()
    SNP_SET_CERTS = auto()
    SNP_ENABLE_REQ_CERTS = auto()

    def __repr__(self) -> str:
        return self.name


LEGACY_OPS: Mapping[int, SevOp] = {
    0: SevOp.INIT,
    1: SevOp.ES_INIT,
    2: SevOp.LAUNCH_START,
    3: SevOp.LAUNCH_UPDATE_DATA,
    4: SevOp.LAUNCH_UPDATE_VMSA,
    5: SevOp.LAUNCH_SECRET,
    6: SevOp.LAUNCH_MEASURE,
    7: SevOp.LAUNCH_FINISH,
    8: SevOp.SEND_START,
    9: SevOp.SEND_UPDATE_DATA,
    10: SevOp.SEND_UPDATE_VMSA,
    11: SevOp.SEND_FINISH,
    12: SevOp.RECEIVE_START,
    13: SevOp.RECEIVE_UPDATE_DATA,
    14: SevOp.RECEIVE_UPDATE_VMSA,
    15: SevOp.RECEIVE_FINISH,
    16: SevOp.GUEST_STATUS,
    17: SevOp.DBG_DECRYPT,
    18: SevOp.DBG_ENCRYPT,
    19: SevOp.CERT_EXPORT,
    20: SevOp.GET_ATTESTATION_REPORT,
    21: SevOp.SEND_CANCEL,
}
"""The same in every era."""
UNIMPLEMENTED = frozenset({SevOp.SEND_UPDATE_VMSA, SevOp.RECEIVE_UPDATE_VMSA, SevOp.CERT_EXPORT})
"""Numbers without code behind them."""
MIRROR_OPS = frozenset({SevOp.LAUNCH_UPDATE_VMSA, SevOp.GUEST_STATUS, SevOp.DBG_DECRYPT, SevOp.DBG_ENCRYPT})
"""All that a mirror VM takes."""

CMD = Layout(
    "kvm_sev_cmd",
    0x18,
    _LINUX,
    [
        uint("id", 0x00, 4),
        uint("data", 0x08, 8, note="address of the sub-command's structure"),
        uint("error", 0x10, 4, note="out: the firmware's status"),
        uint("sev_fd", 0x14, 4, note="an open /dev/sev"),
    ],
)


def _struct(name: str, size: int, *fields: Field) -> Layout:
    return Layout(f"kvm_sev_{name}", size, _LINUX, fields)


_PACKET = [
    uint("hdr_uaddr", 0x00, 8),
    uint("hdr_len", 0x08, 4),
    uint("guest_uaddr", 0x10, 8),
    uint("guest_len", 0x18, 4),
    uint("trans_uaddr", 0x20, 8),
    uint("trans_len", 0x28, 4),
]
_MEMORY = [uint("uaddr", 0x00, 8), uint("len", 0x08, 4)]

LAUNCH_START = _struct(
    "launch_start",
    0x28,
    uint("handle", 0x00, 4, note="in/out; 0: a new key"),
    uint("policy", 0x04, 4),
    uint("dh_uaddr", 0x08, 8),
    uint("dh_len", 0x10, 4),
    uint("session_uaddr", 0x18, 8),
    uint("session_len", 0x20, 4),
)
LAUNCH_UPDATE_DATA = _struct("launch_update_data", 0x10, *_MEMORY)
LAUNCH_SECRET = _struct("launch_secret", 0x30, *_PACKET)
LAUNCH_MEASURE = _struct("launch_measure", 0x10, *_MEMORY)
GUEST_STATUS = _struct("guest_status", 0x0C, uint("handle", 0x00, 4), uint("policy", 0x04, 4), uint("state", 0x08, 4))
DBG = _struct("dbg", 0x18, uint("src_uaddr", 0x00, 8), uint("dst_uaddr", 0x08, 8), uint("len", 0x10, 4))
ATTESTATION_REPORT = _struct(
    "attestation_report", 0x20, raw("mnonce", 0x00, 16), uint("uaddr", 0x10, 8), uint("len", 0x18, 4)
)
SEND_START = _struct(
    "send_start",
    0x48,
    uint("policy", 0x00, 4, note="out"),
    uint("pdh_cert_uaddr", 0x08, 8),
    uint("pdh_cert_len", 0x10, 4),
    uint("plat_certs_uaddr", 0x18, 8),
    uint("plat_certs_len", 0x20, 4),
    uint("amd_certs_uaddr", 0x28, 8),
    uint("amd_certs_len", 0x30, 4),
    uint("session_uaddr", 0x38, 8),
    uint("session_len", 0x40, 4),
)
SEND_UPDATE_DATA = _struct("send_update_data", 0x30, *_PACKET)
RECEIVE_START = _struct(
    "receive_start",
    0x28,
    uint("handle", 0x00, 4),
    uint("policy", 0x04, 4),
    uint("pdh_uaddr", 0x08, 8),
    uint("pdh_len", 0x10, 4),
    uint("session_uaddr", 0x18, 8),
    uint("session_len", 0x20, 4),
)
RECEIVE_UPDATE_DATA = _struct("receive_update_data", 0x30, *_PACKET)
LEGACY_PAYLOADS: Mapping[SevOp, Layout] = {
    SevOp.LAUNCH_START: LAUNCH_START,
    SevOp.LAUNCH_UPDATE_DATA: LAUNCH_UPDATE_DATA,
    SevOp.LAUNCH_SECRET: LAUNCH_SECRET,
    SevOp.LAUNCH_MEASURE: LAUNCH_MEASURE,
    SevOp.SEND_START: SEND_START,
    SevOp.SEND_UPDATE_DATA: SEND_UPDATE_DATA,
    SevOp.RECEIVE_START: RECEIVE_START,
    SevOp.RECEIVE_UPDATE_DATA: RECEIVE_UPDATE_DATA,
    SevOp.GUEST_STATUS: GUEST_STATUS,
    SevOp.DBG_DECRYPT: DBG,
    SevOp.DBG_ENCRYPT: DBG,
    SevOp.GET_ATTESTATION_REPORT: ATTESTATION_REPORT,
}
"""The others take no structure."""

# Linux 6.12.

MAINLINE_OPS: Mapping[int, SevOp] = {
    22: SevOp.INIT2,
    100: SevOp.SNP_LAUNCH_START,
    101: SevOp.SNP_LAUNCH_UPDATE,
    102: SevOp.SNP_LAUNCH_FINISH,
}
REQ_CERTS_OPS: Mapping[int, SevOp] = {**MAINLINE_OPS, 103: SevOp.SNP_ENABLE_REQ_CERTS}
"""Those of the kernels of 2026 that ask userspace for certificates."""
INIT2 = _struct(
    "init",
    0x30,
    uint("vmsa_features", 0x00, 8),
    uint("flags", 0x08, 4, note="0"),
    uint("ghcb_version", 0x0C, 2, note="0: KVM's newest"),
)
SNP_LAUNCH_START = _struct(
    "snp_launch_start", 0x40, uint("policy", 0x00, 8), raw("gosvw", 0x08, 16), uint("flags", 0x18, 2, note="0")
)
SNP_LAUNCH_UPDATE = _struct(
    "snp_launch_update",
    0x40,
    uint("gfn_start", 0x00, 8, note="in/out"),
    uint("uaddr", 0x08, 8, note="in/out, unless the pages are ZERO"),
    uint("len", 0x10, 8, note="in/out: what is left to do"),
    uint("type", 0x18, 1, enum=LaunchPage),
    uint("flags", 0x1A, 2, note="0"),
)
SNP_LAUNCH_FINISH = _struct(
    "snp_launch_finish",
    0x58,
    uint("id_block_uaddr", 0x00, 8),
    uint("id_auth_uaddr", 0x08, 8),
    uint("id_block_en", 0x10, 1),
    uint("auth_key_en", 0x11, 1),
    uint("vcek_disabled", 0x12, 1),
    raw("host_data", 0x13, 32),
    uint("flags", 0x36, 2, note="0"),
)
MAINLINE_PAYLOADS: Mapping[SevOp, Layout] = {
    SevOp.INIT2: INIT2,
    SevOp.SNP_LAUNCH_START: SNP_LAUNCH_START,
    SevOp.SNP_LAUNCH_UPDATE: SNP_LAUNCH_UPDATE,
    SevOp.SNP_LAUNCH_FINISH: SNP_LAUNCH_FINISH,
}
LAUNCH_PAGES = frozenset(LaunchPage) - {LaunchPage.VMSA}
"""Page types that userspace may add; VMSA is in the v7 header alone, where nothing checks the type."""
SNP_POLICY_VALID = 0x1BFFFF
"""Bits of a guest policy that Linux 6.12 lets through: 0 to 17, 19 and 20."""
GRP_SEV = 1
SEV_VMSA_FEATURES = 0
"""Group and attribute of GET_DEVICE_ATTR on /dev/kvm that tell which `vmsa_features` INIT2 takes."""

# RFC v7.

V7_OPS: Mapping[int, SevOp] = {
    22: SevOp.SNP_INIT,
    23: SevOp.SNP_LAUNCH_START,
    24: SevOp.SNP_LAUNCH_UPDATE,
    25: SevOp.SNP_LAUNCH_FINISH,
    26: SevOp.SNP_GET_CERTS,
    27: SevOp.SNP_SET_CERTS,
}


def _v7(name: str, size: int, patch: int, *fields: Field) -> Layout:
    return Layout(f"{name}.v7", size, Cite("V7", f"patch {patch}"), fields)


SNP_INIT_V7 = _v7("kvm_snp_init", 0x08, 37, uint("flags", 0x00, 8, note="in/out: the flags that KVM supports"))
SNP_LAUNCH_START_V7 = _v7(
    "kvm_sev_snp_launch_start",
    0x28,
    38,
    uint("policy", 0x00, 8),
    uint("ma_uaddr", 0x08, 8),
    uint("ma_en", 0x10, 1),
    uint("imi_en", 0x11, 1),
    raw("gosvw", 0x12, 16),
)
SNP_LAUNCH_UPDATE_V7 = _v7(
    "kvm_sev_snp_launch_update",
    0x20,
    39,
    uint("start_gfn", 0x00, 8, note="unused"),
    uint("uaddr", 0x08, 8, note="of the guest's own memory: the pages follow from it"),
    uint("len", 0x10, 4),
    uint("imi_page", 0x14, 1, note="unused"),
    uint("page_type", 0x15, 1, enum=LaunchPage, note="unchecked"),
    uint("vmpl3_perms", 0x16, 1),
    uint("vmpl2_perms", 0x17, 1),
    uint("vmpl1_perms", 0x18, 1),
)
SNP_LAUNCH_FINISH_V7 = _v7(
    "kvm_sev_snp_launch_finish",
    0x38,
    40,
    uint("id_block_uaddr", 0x00, 8),
    uint("id_auth_uaddr", 0x08, 8),
    uint("id_block_en", 0x10, 1),
    uint("auth_key_en", 0x11, 1),
    raw("host_data", 0x12, 32),
)
SNP_CERTS_V7 = _v7("kvm_sev_snp_certs", 0x10, 62, uint("certs_uaddr", 0x00, 8), uint("certs_len", 0x08, 8))
V7_PAYLOADS: Mapping[SevOp, Layout] = {
    SevOp.SNP_INIT: SNP_INIT_V7,
    SevOp.SNP_LAUNCH_START: SNP_LAUNCH_START_V7,
    SevOp.SNP_LAUNCH_UPDATE: SNP_LAUNCH_UPDATE_V7,
    SevOp.SNP_LAUNCH_FINISH: SNP_LAUNCH_FINISH_V7,
    SevOp.SNP_GET_CERTS: SNP_CERTS_V7,
    SevOp.SNP_SET_CERTS: SNP_CERTS_V7,
}
CERTS_LIMIT_V7 = 0x5000
"""The largest certificate blob of one VM; longer ones are EINVAL."""
