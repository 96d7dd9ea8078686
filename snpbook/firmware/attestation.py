"""MSG_REPORT_REQ: the attestation report on a guest, and which key signs it.

Source: SNP ABI (MSG_REPORT_REQ, ATTESTATION_REPORT), firmware 1.55.25; versions 3 and 5 of the report as virtee/sev
and go-sev-guest read them.
"""

from __future__ import annotations

from snpbook.firmware.keys import attestation_key, sign_report
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.launch import ID_BLOCK
from snpbook.spec.layout import Record
from snpbook.spec.payloads import REPORT_REQUEST, REPORT_RESPONSE, KeySelect
from snpbook.spec.report import (
    ATTESTATION_REPORT,
    ECDSA_P384_SHA384,
    REPORT_SIZE,
    SIGNATURE_COMPONENT,
    SIGNED_SIZE,
    SigningKey,
)
from snpbook.spec.status import FirmwareRefusal, Status, require

_CPUID_SINCE, _MITIGATIONS_SINCE = 3, 5
"""Report versions."""


def report_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_REPORT_REQ: an attestation report, or STATUS and a report of zeros."""
    data = message.ljust(REPORT_REQUEST.size, b"\0")[: REPORT_REQUEST.size]
    request = REPORT_REQUEST.unpack(data)
    try:
        # CHECKS
        stray = REPORT_REQUEST.reserved_set(data)
        require(not stray, Status.INVALID_PARAM, "reserved bytes of the request are zero", 0, stray)
        provider = selects_vlek(psp, sender.context, request.key_sel)
        sender.check_vmpl(request.vmpl)
    except FirmwareRefusal as refusal:
        return REPORT_RESPONSE.pack(status=refusal.status, report_size=REPORT_SIZE)

    # ANSWER
    key = SigningKey.VLEK if provider else SigningKey.NONE if psp.mask_chip_key else SigningKey.VCEK
    report = attestation_report(psp, sender.context, request, key)
    return REPORT_RESPONSE.pack(status=Status.SUCCESS, report_size=REPORT_SIZE, report=report)


def selects_vlek(psp: SecureProcessor, context: Record, key_sel: int) -> bool:
    """Whether KEY_SEL means the provider's key and not the chip's; INVALID_KEY where that key is not to be had."""
    provider = key_sel == KeySelect.VLEK or (key_sel == KeySelect.VLEK_OR_VCEK and psp.vlek is not None)
    known = key_sel in (KeySelect.VLEK_OR_VCEK, KeySelect.VCEK, KeySelect.VLEK)
    there = psp.vlek is not None if provider else not context.vcek_dis
    require(known and there, Status.INVALID_KEY, "the selected key is there", "a VCEK or a VLEK", key_sel)
    return provider


def attestation_report(psp: SecureProcessor, context: Record, request: Record, key: SigningKey) -> bytes:
    """The report on a guest, signed by a key of the reported TCB, or not at all."""
    release, committed, identity = psp.release, psp.committed, ID_BLOCK.unpack(context.id_block)
    signature = psp.machine.product.signature
    newer: dict[str, int] = {}
    if release.report_version >= _CPUID_SINCE:
        newer |= {
            "cpuid_family": signature.family,
            "cpuid_model": signature.model,
            "cpuid_stepping": signature.stepping,
        }
    if release.report_version >= _MITIGATIONS_SINCE:
        newer |= {"launch_mit_vector": context.launch_mit_vector, "current_mit_vector": psp.mitigations}
    report = ATTESTATION_REPORT.record(
        version=release.report_version,
        guest_svn=identity.guest_svn,
        policy=context.policy,
        family_id=identity.family_id,
        image_id=identity.image_id,
        vmpl=request.vmpl,
        signature_algo=ECDSA_P384_SHA384,
        current_tcb=int(psp.current_tcb),
        platform_info=psp.platform_info,
        author_key_en=context.author_key_en,
        mask_chip_key=int(psp.mask_chip_key),
        signing_key=key,
        report_data=request.report_data,
        measurement=context.launch_digest,
        host_data=context.host_data,
        id_key_digest=context.id_key_digest,
        author_key_digest=context.author_key_digest,
        report_id=context.report_id,
        report_id_ma=context.report_id_ma,
        reported_tcb=int(psp.reported_tcb),
        chip_id=bytes(len(psp.chip.chip_id)) if psp.mask_chip_id else psp.chip.chip_id,
        committed_tcb=int(psp.committed_tcb),
        current_build=release.build,
        current_minor=release.abi.minor,
        current_major=release.abi.major,
        committed_build=committed.build,
        committed_minor=committed.abi.minor,
        committed_major=committed.abi.major,
        launch_tcb=context.launch_tcb,
        **newer,
    )
    r, s = _sign(psp, key, bytes(report)[:SIGNED_SIZE])
    return bytes(report.replace(signature_r=r, signature_s=s))


def _sign(psp: SecureProcessor, key: SigningKey, signed: bytes) -> tuple[bytes, bytes]:
    if key is SigningKey.NONE:
        return bytes(SIGNATURE_COMPONENT), bytes(SIGNATURE_COMPONENT)
    if key is SigningKey.VLEK and psp.vlek is not None:
        return sign_report(attestation_key(psp.vlek, VLEK_LABEL), signed)
    return sign_report(psp.vcek, signed)
