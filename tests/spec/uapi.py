"""The kernel ABI under its own names: what `snpbook.spec.uapi_*` says, as the headers spell it."""

from __future__ import annotations

import re
from enum import IntEnum, IntFlag

from snpbook.spec import uapi_kvm, uapi_kvm_structs, uapi_psp, uapi_sev
from snpbook.spec.layout import Layout

LAYOUTS = [
    value
    for module in (uapi_kvm_structs, uapi_sev, uapi_psp)
    for value in vars(module).values()
    if isinstance(value, Layout)
]
_ENUMS: list[tuple[type[IntEnum | IntFlag], str]] = [
    (uapi_kvm.Ioctl, "KVM_"),
    (uapi_kvm.Cap, "KVM_CAP_"),
    (uapi_kvm.Exit, "KVM_EXIT_"),
    (uapi_kvm.VmType, "KVM_X86_"),
    (uapi_kvm.MemFlag, "KVM_MEM_"),
    (uapi_kvm.MemoryAttribute, "KVM_MEMORY_ATTRIBUTE_"),
    (uapi_kvm.IoDirection, "KVM_EXIT_IO_"),
    (uapi_kvm.InternalError, "KVM_INTERNAL_ERROR_"),
    (uapi_kvm.SystemEvent, "KVM_SYSTEM_EVENT_"),
    (uapi_kvm.MsrExitReason, "KVM_MSR_EXIT_REASON_"),
    (uapi_kvm.MpState, "KVM_MP_STATE_"),
    (uapi_kvm.CpuidFlag, "KVM_CPUID_FLAG_"),
    (uapi_kvm.MapGpaRange, "KVM_MAP_GPA_RANGE_"),
]
NUMBERS: dict[str, int] = {
    "KVM_API_VERSION": uapi_kvm.API_VERSION,
    "KVM_PIO_PAGE_OFFSET": uapi_kvm.PIO_PAGE,
    "KVM_MEMORY_EXIT_FLAG_PRIVATE": uapi_kvm.MEMORY_FAULT_PRIVATE,
    "KVM_HC_MAP_GPA_RANGE": uapi_kvm.HC_MAP_GPA_RANGE,
    "KVM_X86_QUIRK_SLOT_ZAP_ALL": uapi_kvm.QUIRK_SLOT_ZAP_ALL,
    "KVM_X86_GRP_SEV": uapi_sev.GRP_SEV,
    "KVM_X86_SEV_VMSA_FEATURES": uapi_sev.SEV_VMSA_FEATURES,
    "SNP_POLICY_MASK_VALID": uapi_sev.SNP_POLICY_VALID,
    "SEV_ISSUE_CMD": uapi_psp.ISSUE_CMD,
    "SEV_RET_NO_FW_CALL": uapi_psp.NO_FW_CALL - (1 << 32),
    "SEV_FW_BLOB_MAX_SIZE": uapi_psp.BLOB_LIMIT,
    "SEV_STATUS_FLAGS_CONFIG_ES": uapi_psp.STATUS_FLAG_ES,
    **{prefix + name: int(member) for enum, prefix in _ENUMS for name, member in enum.__members__.items()},
    **{
        f"KVM_SEV_{op.name}": number
        for number, op in {**uapi_sev.LEGACY_OPS, **uapi_sev.REQ_CERTS_OPS}.items()
    },
    **{f"KVM_SEV_SNP_PAGE_TYPE_{kind.name}": int(kind) for kind in uapi_sev.LAUNCH_PAGES},
    **{
        command.name if command.name.startswith("SNP_") else f"SEV_{command.name}": number
        for number, command in {**uapi_psp.COMMANDS, **uapi_psp.MAINLINE_COMMANDS}.items()
    },
}  # fmt: skip

BEYOND_6_12 = {
    "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES_V10", "KVM_SET_MEMORY_ATTRIBUTES_V10", "KVM_CAP_MEMORY_ATTRIBUTES_V10",
    "KVM_CAP_UNMAPPED_PRIVATE_MEM", "KVM_EXIT_MEMORY_FAULT_V10", "KVM_EXIT_SNP_REQ_CERTS", "KVM_EXIT_VMGEXIT",
    "KVM_MEMORY_ATTRIBUTE_READ", "KVM_MEMORY_ATTRIBUTE_WRITE", "KVM_MEMORY_ATTRIBUTE_EXECUTE",
    "KVM_SEV_SNP_ENABLE_REQ_CERTS",
}  # fmt: skip
"""Numbers of v10, of v7 or of 2026, which no header of 6.12 has."""

_ARRAYS = {"arg": "args", "data": "data", "debugreg": "arch.debugreg", "db": "db"}


def member(layout: Layout, field: str) -> tuple[str, int | None]:
    """The kernel's name for a field, and its index where it is an element of an array."""
    if layout is uapi_kvm_structs.RUN and field == "exit":
        return "padding", None
    match = re.fullmatch(r"([a-z]+)(\d+)", field)
    if match and match[1] in _ARRAYS:
        return _ARRAYS[match[1]], int(match[2])
    return field, None
