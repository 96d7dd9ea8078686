"""The channel between a platform and a guest's owner or another platform: key agreement, wrapped keys, MACs.

Both ends derive KEK and KIK from their Diffie-Hellman secret; the session carries TEK and TIK under them. Packets are
AES-128-CTR under the TEK with an HMAC under the TIK. Sources: SEV API (session data, packets), firmware 1.55.25.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from snpbook.firmware.keys import kdf
from snpbook.firmware.legacy_state import TransportKeys
from snpbook.spec.key_derivation import KEK_LABEL, KIK_LABEL, MASTER_SECRET_LABEL, SESSION_KEY_SIZE
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import PACKET_HEADER, PACKET_MAC_INPUT, SESSION, MacContext
from snpbook.spec.policy import LEGACY_POLICY
from snpbook.spec.status import Status, require

IV_SIZE = 16


def agree(key: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePublicKey, nonce: bytes) -> tuple[bytes, bytes]:
    """KEK and KIK of a session between two P-384 keys; the secret is the shared point's x, 48 bytes big-endian."""
    return session_keys(key.exchange(ec.ECDH(), other), nonce)


def session_keys(secret: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """KEK and KIK of a shared secret."""
    master = kdf(secret, MASTER_SECRET_LABEL, nonce, SESSION_KEY_SIZE)
    return kdf(master, KEK_LABEL, b"", SESSION_KEY_SIZE), kdf(master, KIK_LABEL, b"", SESSION_KEY_SIZE)


def unwrapped(session: Record, kek: bytes, kik: bytes, policy: int) -> TransportKeys:
    """TEK and TIK of a session, after the two MACs (BAD_MEASUREMENT)."""
    _check_mac(hmac.digest(kik, session.wrap_tk, "sha256"), session.wrap_mac, "MAC of the wrapped keys")
    both = _ctr(kek, session.wrap_iv, session.wrap_tk)
    keys = TransportKeys(both[:SESSION_KEY_SIZE], both[SESSION_KEY_SIZE:])
    _check_mac(_policy_mac(keys, policy), session.policy_mac, "MAC of the policy")
    return keys


def wrapped(keys: TransportKeys, kek: bytes, kik: bytes, nonce: bytes, iv: bytes, policy: int) -> Record:
    """The session that carries TEK and TIK to the other end."""
    wrap_tk = _ctr(kek, iv, keys.encryption + keys.integrity)
    return SESSION.record(
        nonce=nonce,
        wrap_tk=wrap_tk,
        wrap_iv=iv,
        wrap_mac=hmac.digest(kik, wrap_tk, "sha256"),
        policy_mac=_policy_mac(keys, policy),
    )


def seal_packet(keys: TransportKeys, iv: bytes, plain: bytes) -> tuple[bytes, bytes]:
    """A packet's header and body."""
    body = _ctr(keys.encryption, iv, plain)
    header = PACKET_HEADER.pack(iv=iv)
    mac = _packet_mac(keys, MacContext.DATA, header, len(plain), body)
    return PACKET_HEADER.pack(iv=iv, mac=mac), body


def check_packet(
    keys: TransportKeys, context: MacContext, header: bytes, guest_len: int, body: bytes, measure: bytes = b""
) -> None:
    """That a packet's MAC holds (BAD_MEASUREMENT); that of a secret covers MEASURE too."""
    computed = _packet_mac(keys, context, header, guest_len, body, measure)
    _check_mac(computed, PACKET_HEADER.unpack(header).mac, "MAC of the packet")


def check_not_compressed(header: bytes) -> None:
    """Compressed packets are UNSUPPORTED."""
    compressed = PACKET_HEADER.unpack(header).compressed
    require(not compressed, Status.UNSUPPORTED, "the packet is not compressed", 0, compressed, "SEV")


def open_packet(keys: TransportKeys, header: bytes, body: bytes) -> bytes:
    """A packet's plaintext."""
    return _ctr(keys.encryption, PACKET_HEADER.unpack(header).iv, body)


def _policy_mac(keys: TransportKeys, policy: int) -> bytes:
    return hmac.digest(keys.integrity, policy.to_bytes(LEGACY_POLICY.size, "little"), "sha256")


def _packet_mac(
    keys: TransportKeys, context: MacContext, header: bytes, guest_len: int, body: bytes, measure: bytes = b""
) -> bytes:
    flags, iv = int.from_bytes(header[: PACKET_HEADER.offset("iv")], "little"), PACKET_HEADER.unpack(header).iv
    covered = PACKET_MAC_INPUT.pack(context=context, flags=flags, iv=iv, guest_len=guest_len, trans_len=len(body))
    return hmac.digest(keys.integrity, covered + body + measure, "sha256")


def _check_mac(computed: bytes, found: bytes, name: str) -> None:
    require(hmac.compare_digest(computed, found), Status.BAD_MEASUREMENT, name, "valid", "invalid", "SEV")


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    cipher = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return cipher.update(data) + cipher.finalize()
