"""Enumerations and sizes of the firmware's interface against the specification, typed here a second time."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from snpbook.spec import (
    asids,
    context,
    key_derivation,
    launch,
    legacy_launch,
    payloads,
    platform,
    sev_certificates,
    swap,
)
from snpbook.spec.messages import MessageType

# In order; a name that does not follow the one before it carries its number, in hexadecimal.
ENUMS: list[tuple[type[Enum], str]] = [
    (swap.SwapType, "DATA METADATA VMSA"),
    (payloads.KeySelect, "VLEK_OR_VCEK VCEK VLEK"),
    (key_derivation.RootKey, "VEK VMRK"),
    (key_derivation.IdKeySelect, "NONE ID_KEY AUTHOR_KEY"),
    (legacy_launch.MacContext, "SECRET=1 DATA VMSA MEASURE"),
    (platform.FeatureIndex, "FEATURES MESSAGES"),
    (platform.MitigationSubcommand, "STATUS VERIFY"),
    (sev_certificates.CertUsage, "ARK ASK=13 INVALID=1000 OCA PEK PDH CEK"),
    (
        sev_certificates.CertAlgo,
        "INVALID RSA_SHA256 ECDSA_SHA256 ECDH_SHA256 RSA_SHA384=101 ECDSA_SHA384 ECDH_SHA384",
    ),
    (
        MessageType,
        "CPUID_REQ=1 CPUID_RSP KEY_REQ KEY_RSP REPORT_REQ REPORT_RSP EXPORT_REQ EXPORT_RSP IMPORT_REQ IMPORT_RSP "
        "ABSORB_REQ ABSORB_RSP VMRK_REQ VMRK_RSP ABSORB_NOMA_REQ ABSORB_NOMA_RSP TSC_INFO_REQ TSC_INFO_RSP",
    ),
]
FLAGS: list[tuple[type[Enum], str]] = [
    (key_derivation.GuestField, "POLICY IMAGE_ID FAMILY_ID MEASUREMENT GUEST_SVN TCB_VERSION LAUNCH_MIT_VECTOR"),
    (platform.FeatureMessage, "CPUID KEY REPORT EXPORT IMPORT ABSORB VMRK ABSORB_NOMA TSC_INFO"),
    (platform.FeatureEbx, "LEGACY_SEV TIO"),
    (
        platform.FeatureEcx,
        "VLEK X86_SNP_SHUTDOWN RAPL_DISABLE CIPHERTEXT_HIDING AES_256_XTS_POLICY CXL_POLICY VERIFY_MITIGATION=d",
    ),
]


def numbered(text: str) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for word in text.split():
        name, given, number = word.partition("=")
        found.append((name, int(number, 16) if given else found[-1][1] + 1 if found else 0))
    return found


@pytest.mark.parametrize(("enum", "text"), ENUMS, ids=lambda value: getattr(value, "__name__", ""))
def test_enumerations(enum: type[Enum], text: str) -> None:
    assert [(member.name, member.value) for member in enum] == numbered(text)


@pytest.mark.parametrize(("flags", "text"), FLAGS, ids=lambda value: getattr(value, "__name__", ""))
def test_flags(flags: type[Enum], text: str) -> None:
    assert [(member.name, member.value) for member in flags] == [(name, 1 << bit) for name, bit in numbered(text)]


NUMBERS: list[tuple[Any, Any]] = [
    (asids.APIC_ID_LIMIT, 512),
    (asids.APIC_IDS_MAX, 1024),
    (context.EXPORT_VERSION, 3),
    (context.NO_AGENT, 0xFFFFFFFFFFFFFFFF),
    (key_derivation.HASHSTICKS, 8),
    (key_derivation.SESSION_KEY_SIZE, 16),
    (key_derivation.VLEK_WRAPPING_LABEL, "vlek-wrapping-key"),
    (key_derivation.CEK_LABEL, "sev-chip-endorsement-key"),
    (launch.CURVE_SECP256K1, 1),
    (legacy_launch.HANDLES_MAX, 1024),
    (legacy_launch.PACKET_LIMIT, 0x5000),
    (legacy_launch.PACKET_ALIGNMENT, 16),
    (legacy_launch.TMR_SIZE, 0x100000),
    (legacy_launch.TMR_SIZE_SNP, 0x200000),
    (legacy_launch.NV_SIZE, 32 * 1024),
    (legacy_launch.FIRMWARE_ALIGNMENT, 32),
    (legacy_launch.LEGACY_REPORT_SIGNED_SIZE, 0x34),
    (legacy_launch.LEGACY_DIGEST_SIZE, 32),
    (platform.RANGE_LIST_LIMIT, 255),
    (platform.WRAPPED_VLEK_AAD, (0x190, 0x1A0)),
    (platform.FEATURE_INFO_ALIGNMENT, 4),
    (sev_certificates.CERT_SIGNED_SIZE, 0x414),
    (sev_certificates.CERT_VERSION, 1),
    (swap.ENTRIES_PER_PAGE, 64),
    (swap.METADATA_GFN, (1 << 52) - 1),
    (swap.LAST_IV, (1 << 64) - 2),
]


def test_numbers() -> None:
    assert [ours for ours, _ in NUMBERS] == [theirs for _, theirs in NUMBERS]


def test_each_request_has_its_payloads() -> None:
    """By name: a request's layout, and the layout of the response, which four messages share."""
    pairs = {kind.name: (ours.name, theirs.name) for kind, (ours, theirs) in payloads.MESSAGES.items()}
    assert pairs == {
        "CPUID_REQ": ("CpuidRequest", "CpuidResponse"),
        "KEY_REQ": ("KeyRequest", "KeyResponse"),
        "REPORT_REQ": ("ReportRequest", "ReportResponse"),
        "EXPORT_REQ": ("ExportRequest", "ExportResponse"),
        "IMPORT_REQ": ("ImportRequest", "StatusResponse"),
        "ABSORB_REQ": ("AbsorbRequest", "StatusResponse"),
        "VMRK_REQ": ("VmrkRequest", "StatusResponse"),
        "ABSORB_NOMA_REQ": ("AbsorbNomaRequest", "StatusResponse"),
        "TSC_INFO_REQ": ("TscInfoRequest", "TscInfoResponse"),
    }
