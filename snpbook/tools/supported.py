"""`python -m snpbook.tools.supported`: write `SUPPORTED.md`, how the model answers each part of the interface.

Commands, guest messages, structures, policy bits and releases come from the specification and the command table,
so that none can be forgotten; told here is where the model does less than the real firmware, or something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from snpbook.firmware.requests import MESSAGES
from snpbook.firmware.table import COMMANDS
from snpbook.spec import (
    context,
    firmware_image,
    key_derivation,
    launch,
    legacy_buffers,
    legacy_launch,
    messages,
    payloads,
    platform,
    policy,
    report,
    sev_certificates,
    snp_buffers,
    swap,
)
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS, NOT_MODELLED
from snpbook.spec.layout import Field, Layout
from snpbook.spec.messages import MessageType
from snpbook.spec.policy import LEGACY_POLICY, POLICY
from snpbook.spec.releases import COMMANDS_SINCE, MESSAGE_VERSIONS, POLICY_SINCE, RELEASES, SNP_SINCE, Release, Revision

PAGE = Path(__file__).resolve().parents[2] / "SUPPORTED.md"

_C, _T = Command, MessageType
_TMR = "Nothing is kept in the trusted memory region, and the host can go on reading and writing it."
_CORES = "APIC ids are the numbers of cores."
_IMAGE = (
    "The image's format is the model's own, signed with a toy key; an image holds no code, but names a release of the "
    "ABI. AMD's images are refused (INVALID_LENGTH, BAD_SIGNATURE)."
)
_IOMMU = "The IOMMU has no log pages: none becomes Firmware at initialisation and Reclaim at shutdown."
_PARTS = "Faults of the part that no register shows are there only where somebody asks for them."
_CPUID = (
    "The host's own CPUID is the model's. Rules are Genoa's on every product; how a value is corrected that no source "
    "tells of is inferred."
)
_TIO = "Trusted I/O needs devices that the model does not have: INVALID_COMMAND, with that as the reason."

COMMAND_DIFFERENCES: Mapping[Command, str] = {
    _C.INIT: f"{_TMR} {_PARTS}",
    _C.INIT_EX: f"{_TMR} {_PARTS} How the NV area is sealed is the model's own: an area that real firmware wrote is "
    "SECURE_DATA_INVALID.",
    _C.SHUTDOWN: _PARTS,
    _C.DF_FLUSH: "It does not switch the trusted memory region on, which nothing here protects.",
    _C.DOWNLOAD_FIRMWARE: _IMAGE,
    _C.GET_ID: "The chip of the second socket is made from the first one's secret.",
    _C.ACTIVATE_EX: f"{_CORES} {_PARTS}",
    _C.LAUNCH_UPDATE_VMSA: "The table of checksums has no end: RESOURCE_LIMIT is never answered.",
    _C.LAUNCH_FINISH: _PARTS,
    _C.SEND_START: "AMD's root for SEV is a toy, and its hash is that of the whole certificate: a receiver with AMD's "
    "real chain is INVALID_CERTIFICATE.",
    _C.RECEIVE_UPDATE_VMSA: "The table of checksums has no end: RESOURCE_LIMIT is never answered.",
    _C.RECEIVE_FINISH: _PARTS,
    _C.SWAP_OUT: "A VMSA that was swapped out has no checksum any more, and so does not run (what real firmware does "
    "is not published).",
    _C.SNP_INIT: f"{_IOMMU} {_PARTS}",
    _C.SNP_INIT_EX: f"{_IOMMU} {_PARTS} TIO_EN is UNSUPPORTED.",
    _C.SNP_SHUTDOWN_EX: _IOMMU,
    _C.SNP_ACTIVATE_EX: f"{_CORES} {_PARTS}",
    _C.SNP_LAUNCH_START: "SMT counts as on: a policy that forbids it is POLICY_FAILURE on every machine.",
    _C.SNP_LAUNCH_UPDATE: f"CPUID pages: {_CPUID}",
    _C.SNP_VERIFY_MITIGATION: "There is one mitigation, bit 0, which is verified as soon as the host asks; data from "
    "the host is INVALID_PARAM. The real ones and the order of checks are not published.",
    _C.SNP_CONFIG: "Reserved bytes of a REPORTED_TCB are not kept: reports show zero there.",
    _C.SNP_DOWNLOAD_FIRMWARE_EX: _IMAGE,
    _C.SNP_COMMIT: "Storing the image never fails: the answer is SUCCESS.",
}
"""Simplified commands: what somebody could observe. The others, but for those of `NOT_MODELLED`, are modelled."""

REFUSALS: Mapping[str, str] = {
    "trusted I/O": _TIO,
    "ring buffer mode": "Commands come one at a time through the registers: INVALID_COMMAND, with that as the reason.",
}
"""Why the subjects of `NOT_MODELLED` are refused."""

MESSAGE_DIFFERENCES: Mapping[MessageType, str] = {
    _T.CPUID_REQ: _CPUID,
    _T.KEY_REQ: "Version 2: the launch mitigation vector is mixed in behind the rest (where is not published).",
    _T.REPORT_RSP: "SMT_EN, ECC_EN and ALIAS_CHECK_COMPLETE are the product's, whatever the machine is.",
    _T.TSC_INFO_RSP: "TSC_OFFSET is zero but for an imported guest; Milan's TSC_FACTOR is taken to be Genoa's.",
}

STRUCTURE_DIFFERENCES: Mapping[str, str] = {
    "GuestContext": "The real page is opaque: its fields are known, their places and its memory key are the model's.",
    "LegacyPersistentData": "The real layout is not published.",
    "FirmwareImageHeader": "The model's own: AMD's images are not taken.",
    "FirmwareImageSignature": "The model's own: AMD's images are not taken.",
    "MitigationStatus": "What the bits of the vectors mean is the model's choice.",
    "KeyRequestV2": "Its size is inferred.",
    "AttestationReport": "Versions 2, 3 and 5 are written; what version 4 adds is not published.",
    "GuestPolicy": "Some of its bits have nothing to act on: see below.",
    "SecretsPage": "Milan's TSC_FACTOR is taken to be Genoa's.",
    "PlatformInfo": "TIO_EN is never set; SMT_EN, ECC_EN and ALIAS_CHECK_COMPLETE are the product's.",
    "SnpPlatformStatus": "IS_TIO_EN and TIO_EN are never set; ALIAS_CHECK_COMPLETE is the product's.",
}

POLICY_DIFFERENCES: Mapping[str, str] = {
    "smt": "SMT counts as on, on every machine.",
    "cxl_allow": "There is no CXL memory: the bit is accepted and shown in reports.",
    "rapl_dis": "There are no energy counters to read: the switch of SNP_INIT_EX is all that there is.",
}

STRUCTURE_MODULES: Mapping[str, tuple[ModuleType, ...]] = {
    "Buffers of SNP commands": (snp_buffers,),
    "Buffers of SEV and SEV-ES commands": (legacy_buffers,),
    "Guest messages": (messages, payloads, key_derivation),
    "Launch, context and report": (launch, context, report, policy),
    "Platform, swap, updates": (platform, swap, firmware_image),
    "SEV and SEV-ES": (sev_certificates, legacy_launch),
}
"""Where structures of the firmware's interface are declared."""
_FIRMWARE_DOCUMENTS = ("SNP", "SEV", "MODEL")
_UNREAD = {BUFFERS[command]: subject for command, subject in NOT_MODELLED.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing: what tells it apart, how it is supported, and why."""

    cells: tuple[str, ...]
    support: str
    why: str

    def __str__(self) -> str:
        return "| " + " | ".join((*self.cells, self.support, self.why)) + " |"


def structures(modules: tuple[ModuleType, ...]) -> list[Layout]:
    """The layouts that modules declare or list, each once, by the firmware's documents."""
    found: dict[str, Layout] = {}
    for module in modules:
        for value in vars(module).values():
            listed = value.values() if isinstance(value, Mapping) else (value,)
            found |= {each.name: each for each in listed if isinstance(each, Layout)}
    return [layout for layout in found.values() if layout.cite.document in _FIRMWARE_DOCUMENTS]


def command_rows() -> list[Row]:
    """Every command."""
    rows = []
    for command in Command:
        since = COMMANDS_SINCE.get(command, SNP_SINCE if command.name.startswith("SNP_") else None)
        cells = f"`{command:02X}`", command.name, _revision(since)
        if command in NOT_MODELLED:
            rows.append(Row(cells, "refused", REFUSALS[NOT_MODELLED[command]]))
        else:
            rows.append(_row(cells, _says(COMMANDS[command][1]), COMMAND_DIFFERENCES.get(command, "")))
    return rows


def message_rows() -> list[Row]:
    """Every type of guest message."""
    rows = []
    for kind in MessageType:
        newer = MESSAGE_VERSIONS.get(kind, {}).values()
        cells = str(int(kind)), kind.name, _revision(min(newer)) if newer else ""
        says = _says(MESSAGES[kind]) if kind in MESSAGES else f"Answers MSG_{MessageType(kind - 1).name}."
        rows.append(_row(cells, says, MESSAGE_DIFFERENCES.get(kind, "")))
    return rows


def structure_rows(modules: tuple[ModuleType, ...], seen: set[str]) -> list[Row]:
    """The structures of some modules that no earlier section has."""
    rows = []
    for layout in structures(modules):
        if layout.name not in seen:
            seen.add(layout.name)
            cells = layout.name, f"{layout.size:#x}"
            if layout in _UNREAD:
                rows.append(Row(cells, "refused", f"Never read: {_UNREAD[layout]} is refused."))
            else:
                rows.append(_row(cells, f"{layout.cite}.", STRUCTURE_DIFFERENCES.get(layout.name, "")))
    return rows


def policy_rows(layout: Layout) -> list[Row]:
    """The fields of a guest policy."""
    return [
        _row(
            (_bits(field), name.upper(), _revision(POLICY_SINCE.get(name))),
            f"{field.note[:1].upper()}{field.note[1:]}.",
            POLICY_DIFFERENCES.get(name, "") if layout is POLICY else "",
        )
        for name, field in layout.fields.items()
    ]


def release_rows() -> list[Row]:
    """The releases of the interface."""
    return [
        _row((str(each), f"{each.major}.{each.minor}"), _release(each), _unconfirmed(each))
        for each in RELEASES.values()
    ]


def _row(cells: tuple[str, ...], says: str, difference: str) -> Row:
    return Row(cells, "simplified" if difference else "modelled", f"{says} **{difference}**" if difference else says)


def _says(function: Callable[..., Any]) -> str:
    """The first sentence of a function's documentation."""
    return " ".join((function.__doc__ or "").split("\n\n")[0].split())


def _bits(field: Field) -> str:
    return str(field.first_bit) if field.first_bit == field.last_bit else f"{field.last_bit}:{field.first_bit}"


def _revision(since: Revision | None) -> str:
    return "" if since is None else "{}.{}".format(*since)


def _release(each: Release) -> str:
    if not each.snp:
        return "SEV and SEV-ES alone."
    return f"Report version {each.report_version}, secrets page version {each.secrets_version}."


def _unconfirmed(each: Release) -> str:
    return f"Unconfirmed: {'; '.join(each.unconfirmed)}." if each.unconfirmed else ""


def _table(heads: str, rows: list[Row]) -> list[str]:
    names = [*heads.split("|"), "Support", "What, and **what is different**"]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *map(str, rows), ""]


def page() -> str:
    """The whole page, the same text for the same tables."""
    seen: set[str] = set()
    lines = [
        "# What of the firmware's interface is modelled",
        "",
        "*Modelled*: checks, their order, status codes, changes of state and bytes are those that are known of",
        "firmware 1.55.25. *Simplified*: the same but for the difference that stands in bold. *Refused*: answered with",
        "INVALID_COMMAND and the reason. [LIMITATIONS.md](LIMITATIONS.md) has what is unconfirmed and what the model",
        "had to choose. This page is made by `python -m snpbook.tools.supported`.",
        "",
        "## Commands",
        "",
        "Numbers are hexadecimal. *Since* is the revision of the SNP ABI that has the command first.",
        "",
        *_table("Id|Command|Since", command_rows()),
        "## Guest messages",
        "",
        "*Since* is the revision of a message's second version.",
        "",
        *_table("Type|Message|Since", message_rows()),
        "## Structures",
        "",
    ]
    for title, modules in STRUCTURE_MODULES.items():
        lines += [f"### {title}", "", *_table("Structure|Bytes", structure_rows(modules, seen))]
    lines += ["## Bits of the guest policy", "", *_table("Bits|Name|Since", policy_rows(POLICY))]
    lines += ["## Bits of the SEV and SEV-ES policy", "", *_table("Bits|Name|Since", policy_rows(LEGACY_POLICY))]
    lines += ["## Releases", "", *_table("Revision|Calls itself", release_rows())]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
