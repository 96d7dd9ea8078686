"""Certificates of SEV: ours checked by other arithmetic, the real Naples chain by ours; owners come and go."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from snpbook.firmware.legacy_certificates import check_amd_chain, check_signed, checked
from snpbook.spec.commands import Command
from snpbook.spec.releases import release
from snpbook.spec.sev_certificates import CertUsage
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.vendor.sev_ca import SevCa
from tests.firmware import legacy_owner as other
from tests.firmware.legacy_board import CERT, NV, A, B, C, LegacyBoard

NAPLES = Path(__file__).parents[3] / "shared" / "vectors" / "legacy"
needs_vectors = pytest.mark.skipif(not NAPLES.is_dir(), reason=f"{NAPLES} is not there")
PRODUCTS = ["naples", "rome", "milan", "genoa"]
SPOILT = {
    0x06: Status.BAD_SIGNATURE, 0x08: Status.INVALID_CERTIFICATE, 0x20: Status.INVALID_CERTIFICATE,
    0x300: Status.BAD_SIGNATURE, 0x420: Status.BAD_SIGNATURE,
}  # fmt: skip
"""What a flipped bit of a certificate is, by its place: one of the key at 0x20 takes the point off its curve."""
CERTIFICATES = [CertUsage.PDH, CertUsage.PEK, CertUsage.OCA, CertUsage.CEK]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def chain_status(certs: list[bytes], amd: bytes, root: bytes) -> Status:
    """What the firmware's code says of PDH, PEK, OCA, CEK and AMD's two."""
    try:
        ask = check_amd_chain(amd, root)
        pdh, pek, oca, cek = (checked(data, usage) for data, usage in zip(certs, CERTIFICATES, strict=True))
        for cert, signer in ((cek, ask), (pek, cek), (pek, oca), (oca, oca), (pdh, pek)):
            check_signed(cert, signer)
    except FirmwareRefusal as refusal:
        return refusal.status
    return Status.SUCCESS


@needs_vectors
def test_the_real_naples_chain() -> None:
    names = ("pdh", "pek", "oca", "cek", "ask", "ark")
    pdh, pek, oca, cek, ask, ark = ((NAPLES / f"naples_{name}.cert").read_bytes() for name in names)
    root = sha256(ark).digest()
    assert chain_status([pdh, pek, oca, cek], ask + ark, root) is Status.SUCCESS
    certs = [pdh, pek, oca, cek]
    for number in range(4):
        for at, status in SPOILT.items():
            spoilt = [*certs[:number], flipped(certs[number], at), *certs[number + 1 :]]
            assert chain_status(spoilt, ask + ark, root) is status, (number, at)
    for at in (0x28, 0x240):
        assert chain_status(certs, flipped(ask, at) + ark, root) is Status.BAD_SIGNATURE
    assert chain_status(certs, ask + flipped(ark, 0x240), root) is Status.INVALID_CERTIFICATE
    assert chain_status(certs, ask + ask, root) is Status.INVALID_CERTIFICATE
    assert chain_status(certs, ask, root) is Status.INVALID_CERTIFICATE
    toy = SevCa("naples")
    assert chain_status(certs, toy.chain, root) is Status.INVALID_CERTIFICATE


@pytest.mark.parametrize("name", PRODUCTS)
def test_our_chain(name: str) -> None:
    """Each signature holds in arithmetic of the tests' own, and the code that takes the real chain takes it."""
    board, ca = LegacyBoard(name).start(), SevCa(name)
    pdh, pek, oca, cek = board.certificates()
    for cert, usage in zip((pdh, pek, oca, cek), CERTIFICATES, strict=True):
        assert len(cert) == CERT
        assert cert[:0x10] == other.body(usage, other.public_of(cert), board.api[:2])[:0x10]
    other.verify(pdh, other.PEK, other.public_of(pek))
    other.verify(pek, other.OCA, other.public_of(oca))
    other.verify(pek, other.CEK, other.public_of(cek))
    other.verify(oca, other.OCA, other.public_of(oca))
    assert cek[0x414:] == other.UNUSED * 2, "AMD's service signs it"
    signed = ca.sign_cek(cek)
    assert chain_status([pdh, pek, oca, signed], ca.chain, board.psp.chip.sev_root) is Status.SUCCESS
    assert chain_status([pdh, pek, oca, cek], ca.chain, board.psp.chip.sev_root) is Status.INVALID_CERTIFICATE
    assert chain_status([pdh, pek, oca, signed], ca.chain, bytes(32)) is Status.INVALID_CERTIFICATE
    build = board.psp.release
    assert ca.issue_cek(board.psp.chip, build.abi) == signed, "AMD needs no export"


@pytest.mark.parametrize("name", PRODUCTS)
def test_amds_certificates(name: str) -> None:
    """RSASSA-PSS over all that stands before the signature: SHA-256 on Naples, SHA-384 later."""
    ca = SevCa(name)
    bits, digest = (2048, hashes.SHA256()) if name == "naples" else (4096, hashes.SHA384())
    size = bits // 8
    for cert in (ca.ask, ca.ark):
        assert len(cert) == 0x40 + 3 * size
        exponent, modulus = (int.from_bytes(ca.ark[at : at + size], "little") for at in (0x40, 0x40 + size))
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
        key.verify(cert[-size:][::-1], cert[:-size], pss, digest)
        with pytest.raises(InvalidSignature):
            key.verify(cert[-size:][::-1], flipped(cert[:-size], 0x50), pss, digest)


def test_keys_follow_from_chip_and_randomness() -> None:
    first, again, stranger = (LegacyBoard(seed=seed).start().certificates() for seed in ("a", "a", "b"))
    assert first == again
    keys = {other.public_of(cert).public_numbers() for cert in (*first, *stranger)}
    assert len(keys) == 8


def test_a_ca_is_for_one_product() -> None:
    board = LegacyBoard("rome")
    with pytest.raises(ValueError, match="none of milan"):
        SevCa("milan").issue_cek(board.psp.chip, release("0.24"))


# Owners.


def owned(board: LegacyBoard) -> tuple[bytes, bytes]:
    """Give the platform an owner as his tool does: his certificate, and the PEK that he signed."""
    owner = other.key(9)
    board.ok(Command.PEK_CSR, paddr=C, len=CERT)
    request = board.machine.dram.read(C, CERT)
    assert request[0x414:] == other.UNUSED * 2
    oca = other.cert(other.body(other.OCA, owner.public_key()), (other.OCA, owner))
    pek = other.cert(request[:0x414], (other.OCA, owner))
    board.ok(Command.PEK_CERT_IMPORT, pek_cert_paddr=board.write(A, pek), pek_cert_len=CERT,
             oca_cert_paddr=board.write(B, oca), oca_cert_len=CERT)  # fmt: skip
    return oca, pek


def test_an_owner_takes_the_platform() -> None:
    board = LegacyBoard().start()
    before = board.certificates()
    oca, _ = owned(board)
    pdh, pek, new_oca, cek = board.certificates()
    assert board.call(Command.PLATFORM_STATUS).owner == 1
    assert (new_oca, cek, pek[:0x414]) == (oca, before[3], before[1][:0x414])
    other.verify(pek, other.OCA, other.public_of(oca))
    other.verify(pek, other.CEK, other.public_of(cek))
    other.verify(pdh, other.PEK, other.public_of(pek))
    assert pdh != before[0]
    status, _ = board.try_(Command.PEK_CERT_IMPORT, pek_cert_len=CERT, oca_cert_len=CERT)
    assert status is Status.ALREADY_OWNED


def test_pek_gen_takes_the_platform_back() -> None:
    board = LegacyBoard().start()
    owned(board)
    theirs = board.certificates()
    board.ok(Command.PEK_GEN)
    ours = board.certificates()
    assert board.call(Command.PLATFORM_STATUS).owner == 0
    assert all(mine != his for mine, his in zip(ours[:3], theirs[:3], strict=True))
    assert ours[3] == theirs[3], "the CEK is the chip's"


def test_pdh_gen_changes_the_pdh_alone() -> None:
    board = LegacyBoard().start()
    before = board.certificates()
    board.ok(Command.PDH_GEN)
    assert board.certificates()[1:] == before[1:]
    assert board.certificates()[0] != before[0]


def test_flash_outlives_a_shutdown_and_no_factory_reset() -> None:
    board = LegacyBoard().start()
    owned(board)
    before = board.certificates()
    board.ok(Command.SHUTDOWN)
    assert board.call(Command.PLATFORM_STATUS).owner == 0, "nothing is told of a platform that is down"
    assert board.start().certificates() == before
    board.ok(Command.SHUTDOWN)
    board.ok(Command.PLATFORM_RESET)
    after = board.start().certificates()
    assert all(new != old for new, old in zip(after[:3], before[:3], strict=True))
    assert board.call(Command.PLATFORM_STATUS).owner == 0


def test_persistent_data_in_the_hosts_memory() -> None:
    """Erased memory is filled; what is there comes back on this chip only; a factory reset does not reach it."""
    board, erased = LegacyBoard(), b"\xff" * 0x8000
    board.write(NV, erased)
    before = board.start(nv_paddr=NV, nv_len=0x8000).certificates()
    stored = board.machine.dram.read(NV, 0x8000)
    assert before[1][:0x414] not in stored
    identity = board.psp.legacy.identity
    assert identity is not None
    assert not any(key[at : at + 16] in stored for key in (identity.pek_key, identity.oca_key) for at in range(32))
    board.ok(Command.SHUTDOWN)
    board.ok(Command.PLATFORM_RESET)
    assert board.start(nv_paddr=NV, nv_len=0x8000).certificates() == before
    board.ok(Command.SHUTDOWN)
    assert board.start().certificates() != before, "flash is another place"
    stranger = LegacyBoard(seed="another chip")
    stranger.write(NV, stored)
    fields = {"length": 0x24, "es": 1, "tmr_paddr": 40 << 20, "tmr_len": 1 << 20, "nv_paddr": NV, "nv_len": 0x8000}
    assert stranger.command(Command.INIT_EX, **fields) is Status.SECURE_DATA_INVALID
    assert stranger.machine.dram.read(NV, 0x8000) == erased
    assert stranger.command(Command.INIT_EX, **fields) is Status.SUCCESS


def test_lengths_that_are_needed_are_told() -> None:
    board = LegacyBoard().start()
    assert board.try_(Command.PEK_CSR, paddr=A)[1].len == CERT
    _, export = board.try_(Command.PDH_CERT_EXPORT, pdh_cert_len=CERT, cert_chain_len=1)
    assert (export.pdh_cert_len, export.cert_chain_len) == (CERT, 3 * CERT)
    status, identity = board.try_(Command.GET_ID, paddr=A, len=63)
    assert (status, identity.len) == (Status.INVALID_LENGTH, 64)
    assert board.call(Command.GET_ID, paddr=A, len=128).len == 64, "one socket"
    assert board.machine.dram.read(A, 64) == board.psp.chip.chip_id
    assert board.machine.dram.read(A + 64, 64) == bytes(64)


def test_a_second_socket_is_told_where_there_is_exactly_room_for_both() -> None:
    board = LegacyBoard(sockets=2).start()
    first, blank = board.psp.chip.chip_id, bytes(64)
    for length, written in ((64, 64), (127, 64), (129, 64), (128, 128)):
        assert board.machine.dram.read(A + 64, 64) == blank
        assert board.call(Command.GET_ID, paddr=A, len=length).len == written
        assert board.machine.dram.read(A, 64) == first
    second = board.machine.dram.read(A + 64, 64)
    assert second == board.psp.chip.on_socket(1).chip_id
    assert second not in (first, blank)
    assert board.psp.chip.on_socket(0) is board.psp.chip
