"""The legacy platform's identity: CEK, OCA, PEK and PDH, where they are kept, and the commands on them.

The CEK is the chip's for ever; the others outlive a reset in flash, or sealed in memory that the host keeps on disk.
Whoever owns the platform signs its PEK. Source: SEV API (PEK_GEN to PDH_GEN, INIT_EX).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.buffers import read_input
from snpbook.firmware.keys import random_key
from snpbook.firmware.legacy_buffers import ShortBuffer, check_output
from snpbook.firmware.legacy_certificates import (
    certificate,
    check_signed,
    checked,
    signed,
    unsigned,
    with_signature,
)
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import NV_SIZE
from snpbook.spec.sev_certificates import (
    CERT_SIGNED_SIZE,
    PERSISTENT_DATA,
    SCALAR_SIZE,
    SEV_CERTIFICATE,
    CertUsage,
)
from snpbook.spec.status import FirmwareRefusal, Status, require

CHAIN_SIZE = 3 * SEV_CERTIFICATE.size
_ERASED = b"\xff" * NV_SIZE
_NONCE_SIZE, _TAG_SIZE = 12, 16


# The identity.


def new_identity(psp: SecureProcessor) -> Record:
    """New OCA, PEK and PDH; the platform is its own owner."""
    oca, pek = random_key(psp.rng), random_key(psp.rng)
    abi = psp.release.abi
    oca_cert = signed(certificate(CertUsage.OCA, oca.public_key(), abi), CertUsage.OCA, oca)
    pek_cert = signed(certificate(CertUsage.PEK, pek.public_key(), abi), CertUsage.OCA, oca)
    pek_cert = signed(pek_cert, CertUsage.CEK, psp.chip.cek)
    return with_new_pdh(
        psp,
        PERSISTENT_DATA.record(oca_key=_scalar(oca), pek_key=_scalar(pek), oca=bytes(oca_cert), pek=bytes(pek_cert)),
    )


def with_new_pdh(psp: SecureProcessor, identity: Record) -> Record:
    """The identity with a new key for channels."""
    pdh = random_key(psp.rng)
    cert = signed(certificate(CertUsage.PDH, pdh.public_key(), psp.release.abi), CertUsage.PEK, key_of(identity, "pek"))
    return identity.replace(pdh_key=_scalar(pdh), pdh=bytes(cert))


def key_of(identity: Record, name: str) -> ec.EllipticCurvePrivateKey:
    """The private key of "pek" or "pdh"."""
    return ec.derive_private_key(int.from_bytes(getattr(identity, f"{name}_key"), "big"), ec.SECP384R1())


def is_owned(identity: Record | None) -> bool:
    """Whether somebody else than the platform owns it."""
    return identity is not None and not any(identity.oca_key)


def _scalar(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_numbers().private_value.to_bytes(SCALAR_SIZE, "big")


# Where it is kept.


def load_identity(psp: SecureProcessor, nv_area: int | None) -> Record | None:
    """What flash or the host's area holds, None where it is empty.

    SECURE_DATA_INVALID where the area holds anything else than this chip put there; it is erased then.
    """
    if nv_area is None:
        return psp.legacy.flash
    memory = psp.machine.memory
    data = memory.read(KeyId.UNENCRYPTED, nv_area, NV_SIZE)
    if data == _ERASED:
        return None
    nonce, sealed = data[:_NONCE_SIZE], data[_NONCE_SIZE:][: PERSISTENT_DATA.size + _TAG_SIZE]
    try:
        return PERSISTENT_DATA.unpack(AESGCM(psp.chip.nv_key).decrypt(nonce, sealed, None))
    except InvalidTag:
        memory.write(KeyId.UNENCRYPTED, nv_area, _ERASED)
        raise FirmwareRefusal(
            Status.SECURE_DATA_INVALID, "the NV area is this chip's", "sealed or erased", "neither", "SEV"
        ) from None


def keep_identity(psp: SecureProcessor, identity: Record) -> None:
    """Make it the platform's and store it; where that is refused the platform keeps the identity that it has."""
    if psp.legacy.nv_area is None:
        psp.legacy.flash = identity
    else:
        spa = check_output(psp, psp.legacy.nv_area, NV_SIZE, "the NV area")
        nonce = psp.rng(_NONCE_SIZE)
        sealed = nonce + AESGCM(psp.chip.nv_key).encrypt(nonce, bytes(identity), None)
        psp.machine.memory.write(KeyId.UNENCRYPTED, spa, sealed.ljust(NV_SIZE, b"\0"))
    psp.legacy.identity = identity


def identity_of(psp: SecureProcessor) -> Record:
    """The identity of a platform that is initialised."""
    identity = psp.legacy.identity
    assert identity is not None, "INIT made it"
    return identity


# The commands.


def pek_gen(psp: SecureProcessor, buffer: Record) -> None:
    """Take the platform back from its owner: new OCA, PEK and PDH."""
    # CHECKS
    psp.legacy.after(Command.PEK_GEN)

    # ACTION
    keep_identity(psp, new_identity(psp))


def pdh_gen(psp: SecureProcessor, buffer: Record) -> None:
    """A new key for channels; what was sent to the old one is lost."""
    # CHECKS
    psp.legacy.after(Command.PDH_GEN)

    # ACTION
    keep_identity(psp, with_new_pdh(psp, identity_of(psp)))


def pek_csr(psp: SecureProcessor, buffer: Record) -> Record:
    """The PEK's certificate without signatures, for an owner to sign."""
    # CHECKS
    psp.legacy.after(Command.PEK_CSR)
    size = SEV_CERTIFICATE.size
    if buffer.len < size:
        raise ShortBuffer(buffer.replace(len=size), "the certificate fits", size, buffer.len)
    spa = check_output(psp, buffer.paddr, size, "paddr")

    # ANSWER
    pek = SEV_CERTIFICATE.unpack(identity_of(psp).pek)
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, bytes(unsigned(pek)))
    return buffer.replace(len=size)


def pek_cert_import(psp: SecureProcessor, buffer: Record) -> None:
    """Give the platform an owner: the PEK as he signed it, and his certificate."""
    # CHECKS
    psp.legacy.after(Command.PEK_CERT_IMPORT)
    identity = identity_of(psp)
    require(not is_owned(identity), Status.ALREADY_OWNED, "nobody owns the platform", "itself", "an owner", "SEV")
    lengths, size = (buffer.pek_cert_len, buffer.oca_cert_len), SEV_CERTIFICATE.size
    require(lengths == (size, size), Status.INVALID_LENGTH, "lengths of the certificates", (size, size), lengths, "SEV")
    pek_data = read_input(psp, buffer.pek_cert_paddr, size, "pek_cert_paddr")
    oca_data = read_input(psp, buffer.oca_cert_paddr, size, "oca_cert_paddr")
    oca = checked(oca_data, CertUsage.OCA)
    check_signed(oca, oca)
    pek = checked(pek_data, CertUsage.PEK)
    check_signed(pek, oca)
    current = SEV_CERTIFICATE.unpack(identity.pek)
    same = pek_data[:CERT_SIGNED_SIZE] == identity.pek[:CERT_SIGNED_SIZE]
    require(same, Status.INVALID_CERTIFICATE, "the PEK is this platform's", "its own", "another", "SEV")

    # ACTION
    by_oca = pek.sig1 if pek.sig1_usage is CertUsage.OCA else pek.sig2
    signed_pek = with_signature(unsigned(pek), CertUsage.OCA, by_oca)
    signed_pek = with_signature(signed_pek, CertUsage.CEK, current.sig2)
    owned = identity.replace(oca_key=bytes(SCALAR_SIZE), oca=oca_data, pek=bytes(signed_pek))
    keep_identity(psp, with_new_pdh(psp, owned))


def pdh_cert_export(psp: SecureProcessor, buffer: Record) -> Record:
    """What an owner or another platform needs to open a channel: the PDH, and PEK, OCA and CEK behind it.

    The CEK's certificate is unsigned: AMD's service signs it.
    """
    # CHECKS
    psp.legacy.after(Command.PDH_CERT_EXPORT)
    size, lengths = SEV_CERTIFICATE.size, (buffer.pdh_cert_len, buffer.cert_chain_len)
    answer = buffer.replace(pdh_cert_len=size, cert_chain_len=CHAIN_SIZE)
    if lengths[0] < size or lengths[1] < CHAIN_SIZE:
        raise ShortBuffer(answer, "the certificates fit", (size, CHAIN_SIZE), lengths)
    pdh = check_output(psp, buffer.pdh_cert_paddr, size, "pdh_cert_paddr")
    chain = check_output(psp, buffer.cert_chain_paddr, CHAIN_SIZE, "cert_chain_paddr")

    # ANSWER
    identity = identity_of(psp)
    cek = bytes(certificate(CertUsage.CEK, psp.chip.cek.public_key(), psp.release.abi))
    psp.machine.memory.write(KeyId.UNENCRYPTED, pdh, identity.pdh)
    psp.machine.memory.write(KeyId.UNENCRYPTED, chain, identity.pek + identity.oca + cek)
    return answer
