"""A server that holds a key in private memory, proves that it has it, and talks under session keys made with it.

The shape is that of TLS 1.3 without its formats: an ephemeral X25519 share, an Ed25519 signature over all that was
said, HKDF, AES-GCM with a number for each record. An owner who finds the digest of the public key in an attestation
report knows who speaks. The page does not know how old it is: one that is replayed brings numbers back, and with them
AES-GCM nonces. Sources: RFC 8446 (shape), RFC 7748, RFC 8032, RFC 5869.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snpbook.guest.workloads import guarded
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure

SIGNED = b"snpbook key holder"
SESSION = b"snpbook session"
"""What stands before the transcript that is signed, and the HKDF info under which the session keys are made."""
KEY_SIZE = 32
NONCE_SIZE = 12
_WORD = 8
_VERSION = 1


class RecordRefused(ProgramFailure):
    """A record that the client has not sealed, or that comes a second time or out of its order."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the page holds: the key, the two session keys (zeros before the first), the records of either direction."""

    key: bytes
    to_client: bytes = bytes(KEY_SIZE)
    to_server: bytes = bytes(KEY_SIZE)
    sent: int = 0
    received: int = 0

    def __bytes__(self) -> bytes:
        numbers = (number.to_bytes(_WORD, "little") for number in (self.sent, self.received))
        return b"".join([self.key, self.to_client, self.to_server, *numbers])

    @classmethod
    def read(cls, content: bytes) -> _State:
        key, to_client, to_server = (content[i : i + KEY_SIZE] for i in range(0, 3 * KEY_SIZE, KEY_SIZE))
        at = 3 * KEY_SIZE
        sent, received = (int.from_bytes(content[i : i + _WORD], "little") for i in (at, at + _WORD))
        return cls(key, to_client, to_server, sent, received)


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """The server, with one private page at guest address `page`. Every method but `create` may raise `Corrupted`."""

    cpu: GuestCpu
    page: int

    async def create(self) -> bytes:
        """Make the key from the processor's random source: the public half (32 bytes), which the world may know."""
        key = await self._random()
        await self._keep(_State(key))
        return await self.public()

    async def public(self) -> bytes:
        return _signing(await self._state()).public_key().public_bytes_raw()

    async def accept(self, hello: bytes) -> bytes:
        """Open a session with a client's hello, which ends with its X25519 share: own share, then the signature.

        `ValueError` for a hello without a share. Signed is `transcript`; `session_keys` tells what both sides get.
        """
        state, own = await self._state(), X25519PrivateKey.from_private_bytes(await self._random())
        if len(hello) < KEY_SIZE:
            raise ValueError(f"hello of {len(hello)} bytes: it ends with a share of {KEY_SIZE}")
        share, shared = (
            own.public_key().public_bytes_raw(),
            own.exchange(X25519PublicKey.from_public_bytes(hello[-KEY_SIZE:])),
        )
        signed = transcript(hello, share, _signing(state).public_key().public_bytes_raw())
        await self._keep(_State(state.key, *session_keys(shared, signed)))
        return share + _signing(state).sign(signed)

    async def send(self, text: bytes) -> bytes:
        """Seal the next record for the client; `ValueError` before a session."""
        state = await self._session()
        await self._keep(replace(state, sent=state.sent + 1))
        return AESGCM(state.to_client).encrypt(nonce(state.sent), text, None)

    async def receive(self, record: bytes) -> bytes:
        """Open the client's next record; `RecordRefused` for any other, which leaves the session as it was."""
        state = await self._session()
        try:
            text = AESGCM(state.to_server).decrypt(nonce(state.received), record, None)
        except InvalidTag:
            raise RecordRefused(f"the record is not number {state.received} of the client") from None
        await self._keep(replace(state, received=state.received + 1))
        return text

    async def _session(self) -> _State:
        state = await self._state()
        if not any(state.to_client):
            raise ValueError("no session: a client says hello first")
        return state

    async def _random(self) -> bytes:
        words = [await self.cpu.rdrand() for _ in range(KEY_SIZE // _WORD)]
        return b"".join(word.to_bytes(_WORD, "little") for word in words)

    async def _state(self) -> _State:
        return _State.read(await guarded.read(self.cpu, self.page, _VERSION))

    async def _keep(self, state: _State) -> None:
        await guarded.write(self.cpu, self.page, _VERSION, bytes(state))


def transcript(hello: bytes, share: bytes, public: bytes) -> bytes:
    """What the server signs: all that was said, under a name that no other protocol signs."""
    return SIGNED + sha256(hello + share + public).digest()


def session_keys(shared: bytes, signed: bytes) -> tuple[bytes, bytes]:
    """The keys of both directions, to the client and to the server."""
    made = HKDF(SHA256(), 2 * KEY_SIZE, salt=signed, info=SESSION).derive(shared)
    return made[:KEY_SIZE], made[KEY_SIZE:]


def nonce(number: int) -> bytes:
    """The AES-GCM nonce of a direction's record `number`, from 0 on."""
    return number.to_bytes(NONCE_SIZE, "big")


def _signing(state: _State) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(state.key)
