"""What a host asks a platform: SNP_PLATFORM_STATUS, SNP_FEATURE_INFO, SNP_VERIFY_MITIGATION, and SNP_DF_FLUSH.

One function for each command: checks in the order of the specification, then the action. Sources: SNP ABI; Linux
(SNP_VERIFY_MITIGATION, whose checks and mitigations are the model's: MODEL).
"""

from __future__ import annotations

from snpbook.firmware.pages import check_address, require_output, writable
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.platform import (
    FEATURE_INFO,
    FEATURE_INFO_ALIGNMENT,
    MITIGATION_STATUS,
    PLATFORM_STATUS,
    SUPPORTED_MITIGATIONS,
    FeatureEcx,
    FeatureIndex,
    FeatureMessage,
    MitigationSubcommand,
)
from snpbook.spec.policy import PLATFORM_INFO
from snpbook.spec.snp_buffers import SNP_FEATURE_INFO, SNP_VERIFY_MITIGATION
from snpbook.spec.status import Status, require

_ALL_MESSAGES = sum(FeatureMessage)


def snp_platform_status(psp: SecureProcessor, buffer: Record) -> None:
    """Tell the host what the platform is: versions, state, switches, TCBs."""
    # CHECKS
    spa = writable(psp, buffer.status_paddr, PLATFORM_STATUS.size, "status_paddr")

    # ANSWER
    release = psp.release
    info = PLATFORM_INFO.unpack(psp.platform_info.to_bytes(PLATFORM_INFO.size, "little"))
    status = PLATFORM_STATUS.pack(
        api_major=release.abi.major,
        api_minor=release.abi.minor,
        state=psp.state,
        is_rmp_init=psp.rmp_built,
        alias_check_complete=info.alias_check_complete,
        build=release.build,
        mask_chip_id=psp.mask_chip_id,
        mask_chip_key=psp.mask_chip_key,
        vlek_en=psp.vlek is not None,
        feature_info=Command.SNP_FEATURE_INFO in release.abi.commands,
        rapl_dis=info.rapl_dis,
        ciphertext_hiding_cap=FeatureEcx.CIPHERTEXT_HIDING in release.abi.features,
        ciphertext_hiding_en=info.ciphertext_hiding_en,
        guest_count=psp.guest_count,
        current_tcb=int(psp.current_tcb),
        reported_tcb=int(psp.reported_tcb),
    )
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, status)


def snp_df_flush(psp: SecureProcessor, buffer: Record) -> None:
    """Write the data fabric's buffers out, so that dirty ASIDs can be used again. No state check."""
    psp.asids.df_flush()


def snp_feature_info(psp: SecureProcessor, buffer: Record) -> None:
    """Tell the host what the firmware can do, as CPUID does: features by index 0, guest messages by index 1."""
    # CHECKS
    size, address = SNP_FEATURE_INFO.size, buffer.feature_info_paddr
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)
    misaligned, end = address % FEATURE_INFO_ALIGNMENT, address % PAGE_SIZE + FEATURE_INFO.size
    require(not misaligned, Status.INVALID_ADDRESS, "alignment of feature_info_paddr", 0, misaligned)
    require(end <= PAGE_SIZE, Status.INVALID_ADDRESS, "feature_info_paddr stays in one page", PAGE_SIZE, end)
    spa = check_address(psp, address, FEATURE_INFO.size, "feature_info_paddr")
    require_output(psp, spa, "feature_info_paddr")
    known, index = list(FeatureIndex), buffer.ecx_in
    require(index in known, Status.INVALID_PARAM, "ECX_IN is a known index", f"0..{max(known)}", index)

    # ANSWER
    if index == FeatureIndex.FEATURES:
        abi = psp.release.abi
        answer = FEATURE_INFO.pack(eax=max(known), ebx=abi.feature_ebx, ecx=abi.features)
    else:
        answer = FEATURE_INFO.pack(eax=_ALL_MESSAGES)
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, answer)


def snp_verify_mitigation(psp: SecureProcessor, buffer: Record) -> None:
    """Tell which vulnerabilities this platform is safe from, or verify it for those that the host names."""
    # CHECKS
    size, command = SNP_VERIFY_MITIGATION.size, buffer.subcommand
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)
    known = list(MitigationSubcommand)
    require(command in known, Status.INVALID_PARAM, "the subcommand is a known one", f"0..{max(known)}", command)
    source = buffer.src_paddr_en
    require(not source, Status.INVALID_PARAM, "no mitigation takes data from the host", 0, source, "MODEL")
    spa = writable(psp, buffer.dst_paddr, MITIGATION_STATUS.size, "dst_paddr") if buffer.dst_paddr_en else None

    # ACTION
    unknown = 0
    if command == MitigationSubcommand.VERIFY:
        unknown = buffer.vector & ~SUPPORTED_MITIGATIONS
        psp.mitigations |= buffer.vector & SUPPORTED_MITIGATIONS

    # ANSWER
    if spa is not None:
        answer = {"verified": psp.mitigations, "supported": SUPPORTED_MITIGATIONS, "failure": int(unknown != 0)}
        psp.machine.memory.write(KeyId.UNENCRYPTED, spa, MITIGATION_STATUS.pack(**answer))
