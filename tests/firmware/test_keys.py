"""Keys of the chip: the printed vectors, RFC 6979 in plain arithmetic, and what separates one chip from another."""

import hmac
import struct
import subprocess
import sys
from hashlib import sha384

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from snpbook.firmware.keys import Chip, attestation_key, hashsticks, kdf, lower_stick, memory_key, sign_report
from snpbook.spec.key_derivation import VCEK_LABEL, VLEK_LABEL
from snpbook.spec.policy import Tcb

TCB = Tcb(bootloader=3, tee=0, snp=8, microcode=0x73)
STICK_7 = "02b57a10e67ca3d4e2ace13036bfcb6e45fb988ff441d31cdca077842d2b9bc113eb91da806d9f18a870be1ee1ce37e1"
VCEK_X = 0x1A64DEA30A1F5697AE2909C88E26625B739F54541B26C60C743EF6B971A8058DC48CDB69F3C48D5932940A945AD462B3

CHIP_A_MILAN = (
    "819bee54599d6eb37e966532063bd52b6bb5999d3ee8d5d40ed3f1d8772230d4"
    "46c8e194433dd4fb202f848e40768597346627c30da241fc41d85944afc6358f"
)


@pytest.mark.parametrize(
    ("key", "label", "context", "size", "expected"),
    [
        (bytes(16), "sev-master-secret", bytes(16), 16, "ab4d269fcc62bedb4511d56c386ce706"),
        (bytes.fromhex("ab4d269fcc62bedb4511d56c386ce706"), "sev-kek", b"", 16, "b6abfbfb75ea1ea74ed8750b8afdb973"),
        (bytes.fromhex("ab4d269fcc62bedb4511d56c386ce706"), "sev-kik", b"", 16, "53b524bf5669a363f365c864acba8572"),
        (
            bytes(range(32)),
            "gmsg-keyreq",
            b"\x01" + bytes(0xA7),
            32,
            "6993a6a3e44681e220ed2d38af1d846b5b6a644e2755062c0566a597378cac9b",
        ),
        (
            bytes(range(32)),
            "gmsg-keyreq",
            struct.pack("<QQIIQQ32s32s", 1, 0x39, 1, 0, 0, 0x30000, b"", sha384(b"x").digest()[:32]).ljust(0xA8, b"\0"),
            32,
            "0818a6d09a8a989604c3c45604e541dac23d1658598a7f462ef43b6011e6e20e",
        ),
    ],
)
def test_kdf_vectors(key: bytes, label: str, context: bytes, size: int, expected: str) -> None:
    assert kdf(key, label, context, size).hex() == expected


def test_kdf_binds_the_length() -> None:
    assert kdf(b"k", "l", b"c", 48)[:32] != kdf(b"k", "l", b"c", 32)
    assert [len(kdf(b"k", "l", b"c", n)) for n in (1, 32, 33, 64, 65)] == [1, 32, 33, 64, 65]


def test_hashstick_and_vcek_vector() -> None:
    stick = hashsticks(bytes(48), TCB)[-1]
    assert stick.hex() == STICK_7
    assert attestation_key(stick, VCEK_LABEL).public_key().public_numbers().x == VCEK_X
    assert attestation_key(stick, VLEK_LABEL).public_key().public_numbers().x != VCEK_X


def test_a_stick_hashes_down_to_older_microcode() -> None:
    stick = bytes.fromhex(STICK_7)
    for microcode in range(TCB.microcode - 1, TCB.microcode - 4, -1):
        stick = sha384(stick).digest()
        assert stick == hashsticks(bytes(48), Tcb(3, 0, 8, microcode))[-1]


@pytest.mark.parametrize("other", [Tcb(4, 0, 8, 0x73), Tcb(3, 1, 8, 0x73), Tcb(3, 0, 7, 0x73), Tcb(3, 0, 8, 255)])
def test_every_component_changes_the_stick(other: Tcb) -> None:
    assert hashsticks(bytes(48), other)[-1].hex() != STICK_7


def rfc6979(d: int, message: bytes) -> tuple[int, int]:
    """ECDSA P-384 / SHA-384 by RFC 6979 section 3.2, with Python integers."""
    n = ec.SECP384R1.group_order
    digest = sha384(message).digest()
    seed = d.to_bytes(48, "big") + (int.from_bytes(digest, "big") % n).to_bytes(48, "big")
    v, k = b"\1" * 48, bytes(48)
    for separator in (b"\0", b"\1"):
        k = hmac.digest(k, v + separator + seed, "sha384")
        v = hmac.digest(k, v, "sha384")
    while not 0 < (nonce := int.from_bytes(v := hmac.digest(k, v, "sha384"), "big")) < n:
        k = hmac.digest(k, v + b"\0", "sha384")
        v = hmac.digest(k, v, "sha384")
    r = ec.derive_private_key(nonce, ec.SECP384R1()).public_key().public_numbers().x % n
    return r, pow(nonce, -1, n) * (int.from_bytes(digest, "big") + r * d) % n


def test_the_oracle_gives_rfc_6979_appendix_a_2_6() -> None:
    d = 0x6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5
    r = 0x94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46
    s = 0x99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8
    assert rfc6979(d, b"sample") == (r, s)


@pytest.mark.parametrize("fill", [0x00, 0x5A, 0xFF])
def test_a_report_is_signed_deterministically(fill: int) -> None:
    key = Chip.from_seed("signer", "genoa").vcek(TCB)
    signed = bytes([fill]) * 0x2A0
    r, s = sign_report(key, signed)
    assert (len(r), len(s)) == (72, 72)
    numbers = int.from_bytes(r, "little"), int.from_bytes(s, "little")
    assert numbers == rfc6979(key.private_numbers().private_value, signed)
    key.public_key().verify(encode_dss_signature(*numbers), signed, ec.ECDSA(hashes.SHA384()))


@pytest.mark.parametrize("size", [0, 0x29F, 0x2A1, 0x4A0])
def test_only_the_signed_part_is_signed(size: int) -> None:
    with pytest.raises(ValueError, match="signed: "):
        sign_report(Chip.from_seed("signer", "milan").vcek(TCB), bytes(size))


def test_chips_follow_from_seed_and_product() -> None:
    chips = [Chip.from_seed(seed, product) for seed in ("a", "b") for product in ("milan", "genoa", "turin")]
    assert len({chip.chip_id for chip in chips}) == 6
    assert Chip.from_seed("a", "milan") == Chip.from_seed(b"a", "milan") == chips[0]
    # Pinned: evidence that people keep must stay reproducible from its seed.
    assert chips[0].chip_id.hex() == CHIP_A_MILAN


def test_chip_id_is_a_point_of_secp256k1() -> None:
    chip_id = Chip.from_seed("a", "genoa").chip_id
    x, y = int.from_bytes(chip_id[:32], "big"), int.from_bytes(chip_id[32:], "big")
    assert (y * y - x**3 - 7) % (2**256 - 2**32 - 977) == 0


def test_turin_keeps_eight_bytes_of_chip_id() -> None:
    chip_id = Chip.from_seed("a", "turin").chip_id
    assert len(chip_id) == 64
    assert any(chip_id[:8])
    assert not any(chip_id[8:])


def test_repr_keeps_the_secret() -> None:
    chip = Chip.from_seed("a", "milan")
    assert repr(chip) == "Chip(product='milan')"


def test_an_unknown_product_is_named() -> None:
    with pytest.raises(ValueError, match=r"'Milan'.*genoa, milan, naples, rome, turin"):
        Chip.from_seed("a", "Milan")


def test_importing_keys_and_ca_loads_no_x509() -> None:
    code = "import sys, snpbook.firmware.keys, snpbook.vendor.ca; print('cryptography.x509' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_memory_keys_differ_by_guest_and_length_of_key_is_bound() -> None:
    assert memory_key(bytes(32), 16) == kdf(bytes(32), "sev-vm-encryption-key-0", bytes(4), 16)
    assert memory_key(bytes(32), 64)[:16] != memory_key(bytes(32), 16)
    assert memory_key(bytes(32), 64)[:32] != memory_key(bytes(32), 64)[32:]
    assert memory_key(bytes(32), 16) != memory_key(b"\1" * 32, 16)


VERSIONS = st.builds(Tcb, *[st.integers(0, 255)] * 4)


@given(held=VERSIONS, wanted=VERSIONS)
def test_sticks_lead_to_every_lower_tcb_and_to_no_higher_one(held: Tcb, wanted: Tcb) -> None:
    """Lower as the firmware compares: the first component that differs decides."""
    sticks = hashsticks(bytes(48), held)
    if int(held).to_bytes(8, "little") < int(wanted).to_bytes(8, "little"):
        with pytest.raises(ValueError, match="no way leads there"):
            lower_stick(sticks, held, wanted)
    else:
        assert lower_stick(sticks, held, wanted) == hashsticks(bytes(48), wanted)[-1]


def test_sticks_by_hand() -> None:
    """All eight of a TCB, the chain written out."""
    seed, expected = bytes(48), []
    for version in (3, 0, 0, 0, 0, 0, 8, 0x73):
        for _ in range(255 - version):
            seed = sha384(seed).digest()
        expected.append(sha384(seed).digest())
        seed = sha384(b"\0\0\0\0\0\0\0\0" + seed).digest()
    assert hashsticks(bytes(48), TCB) == tuple(expected)
