"""What a host sets of a platform's identity: SNP_CONFIG, SNP_COMMIT, SNP_VLEK_LOAD. No SNP state refuses them.

Sources: SNP ABI, TCB versions; the comparison and the quirks are those of firmware 1.55.25.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag

from snpbook.firmware.keys import unwrap_vlek
from snpbook.firmware.pages import check_address
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.encryption import KeyId
from snpbook.spec.key_derivation import HASHSTICK_SIZE
from snpbook.spec.layout import Record
from snpbook.spec.platform import WRAPPED_VLEK, WRAPPED_VLEK_AAD
from snpbook.spec.policy import Tcb
from snpbook.spec.snp_buffers import SNP_COMMIT, SNP_VLEK_LOAD
from snpbook.spec.status import FirmwareRefusal, Status, require


def snp_config(psp: SecureProcessor, buffer: Record) -> None:
    """Choose the TCB that reports name, and whether they show the chip's id and carry its signature.

    Reserved bytes of a TCB below the committed one are unchecked; the model does not keep them (MODEL).
    """
    # CHECKS
    committed = psp.committed_tcb
    asked = Tcb.from_int(buffer.reported_tcb, turin=committed.fmc is not None)
    above, rule = _rank(asked) > _rank(committed), "REPORTED_TCB is not above the committed TCB"
    require(not above, Status.INVALID_PARAM, rule, committed, asked)
    stray = _rank(asked) == _rank(committed) and buffer.reported_tcb != int(committed)
    rule = "reserved bytes of the committed TCB are as they are"
    require(not stray, Status.INVALID_PARAM, rule, int(committed), buffer.reported_tcb)

    # ACTION
    psp.configured_tcb = asked if buffer.reported_tcb else None
    psp.vcek_tcb = psp.reported_tcb
    psp.mask_chip_id, psp.mask_chip_key = bool(buffer.mask_chip_id), bool(buffer.mask_chip_key)


def _rank(tcb: Tcb) -> tuple[int, ...]:
    """A TCB as the one big-endian number that the firmware compares: a lower bootloader outweighs all behind it.

    That Turin begins with its FMC is inferred.
    """
    return tcb.fmc or 0, tcb.bootloader, tcb.tee, tcb.snp, tcb.microcode


def snp_commit(psp: SecureProcessor, buffer: Record) -> None:
    """Make the running firmware the one below which no update may go."""
    # CHECKS
    size = SNP_COMMIT.size
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)

    # ACTION
    commit(psp)


def commit(psp: SecureProcessor) -> None:
    """Committed := current; what SNP_CONFIG asked for is forgotten, its masks are not."""
    psp.committed, psp.committed_tcb = psp.release, psp.current_tcb
    psp.configured_tcb = None
    psp.vcek_tcb = psp.reported_tcb


def snp_vlek_load(psp: SecureProcessor, buffer: Record) -> None:
    """Load a provider's hashsticks, sealed for this chip at its reported TCB; they replace older ones.

    That the key that opens them is that of the hashstick in use is inferred.
    """
    # CHECKS
    size, version = SNP_VLEK_LOAD.size, buffer.vlek_wrapped_version
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)
    require(version == 0, Status.INVALID_PARAM, "version of the wrapped hashsticks", 0, version)
    spa = check_address(psp, buffer.vlek_wrapped_paddr, WRAPPED_VLEK.size, "vlek_wrapped_paddr", lookup=False)
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, WRAPPED_VLEK.size)
    blob, reported = WRAPPED_VLEK.unpack(data), int(psp.reported_tcb)
    require(blob.tcb == reported, Status.BAD_SVN, "the hashsticks are for the reported TCB", reported, blob.tcb)
    try:
        aad = data[slice(*WRAPPED_VLEK_AAD)]
        sticks = unwrap_vlek(psp.hashstick(psp.vcek_tcb), blob.wrapped, blob.tag, blob.iv, aad)
    except InvalidTag:
        raise FirmwareRefusal(Status.BAD_MEASUREMENT, "the hashsticks are sealed for this chip", "", "") from None

    # ACTION
    psp.vlek = sticks[-HASHSTICK_SIZE:]
