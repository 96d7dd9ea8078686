"""The vTPM: a small TPM 2.0 with an endorsement key, random numbers and one bank of PCRs.

Its state is bytes of the SVSM's own memory. What it does not do, such as further keys, quotes and policies, it answers
with TPM_RC_COMMAND_CODE. Source: TCG TPM 2.0 Library parts 2 and 3, from memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from struct import Struct

from snpbook.guest.svsm import endorsement_key
from snpbook.guest.svsm.places import PCR_SIZE, SEED_SIZE, Places
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import tpm as spec
from snpbook.spec.tpm import TpmCode, TpmCommand, about

_HEADER = Struct(">HII")
_ACKNOWLEDGED = bytes(5)
"""The answer of a password session: no nonce, no attributes, no HMAC."""


class _Failed(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class _Reader:
    """The rest of a command."""

    data: bytes
    at: int = field(default=0)

    def take(self, size: int, parameter: int = 1) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) < size:
            raise _Failed(about(TpmCode.INSUFFICIENT, parameter=parameter))
        self.at += size
        return found

    def number(self, size: int, parameter: int = 1) -> int:
        return int.from_bytes(self.take(size, parameter), "big")

    def end(self) -> None:
        """Nothing is left."""
        if self.at != len(self.data):
            raise _Failed(TpmCode.COMMAND_SIZE)


@dataclass(frozen=True, slots=True)
class Tpm:
    """The vTPM of an SVSM, as a processor reaches it."""

    cpu: GuestCpu
    places: Places

    async def execute(self, command: bytes) -> bytes:
        """The answer to a command, which is one in any case."""
        if len(command) < _HEADER.size:
            return _answer(TpmCode.COMMAND_SIZE)
        tag, size, number = _HEADER.unpack_from(command)
        if tag not in (spec.TAG_NO_SESSIONS, spec.TAG_SESSIONS):
            return _answer(TpmCode.BAD_TAG, tag=spec.TAG_BAD)
        if size != len(command):
            return _answer(TpmCode.COMMAND_SIZE)
        if number not in _COMMANDS:
            return _answer(TpmCode.COMMAND_CODE)
        started = any(await self.cpu.read(*self.places.field("tpm_started")))
        if started == (number == TpmCommand.STARTUP):
            return _answer(TpmCode.INITIALIZE)
        rest, handles = _Reader(command[_HEADER.size :]), _HANDLES.get(number, 0)
        try:
            given = [rest.number(4) for _ in range(handles)]
            _session(rest, wanted=number in _AUTHORIZED, given=tag == spec.TAG_SESSIONS)
            body = await _COMMANDS[number](self, given, rest)
        except _Failed as failed:
            return _answer(failed.code)
        if tag == spec.TAG_SESSIONS:
            return _answer(TpmCode.SUCCESS, len(body).to_bytes(4, "big") + body + _ACKNOWLEDGED, tag)
        return _answer(TpmCode.SUCCESS, body)

    async def public(self) -> bytes:
        """The endorsement key's public area (TPMT_PUBLIC)."""
        seed = await self.cpu.read(*self.places.field("tpm_seed"))
        return spec.ek_public(endorsement_key.modulus(seed))

    async def manufacture(self) -> None:
        """A new seed: another TPM. The processor's random source draws it."""
        words = [await self.cpu.rdrand() for _ in range(SEED_SIZE // 8)]
        seed, _ = self.places.field("tpm_seed")
        await self.cpu.write(seed, b"".join(word.to_bytes(8, "little") for word in words))


def _answer(code: int, body: bytes = b"", tag: int = spec.TAG_NO_SESSIONS) -> bytes:
    return _HEADER.pack(tag, _HEADER.size + len(body), code) + body


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _session(rest: _Reader, *, wanted: bool, given: bool) -> None:
    """The authorization: one password, which is empty, where the command needs one."""
    if not given:
        if wanted:
            raise _Failed(TpmCode.AUTH_MISSING)
        return
    session = _Reader(rest.take(rest.number(4)))
    handle, nonce, _, password = session.number(4), session.take(session.number(2)), session.take(1), session.number(2)
    if handle != spec.HANDLE_PASSWORD or nonce or session.at + password != len(session.data):
        raise _Failed(TpmCode.AUTHSIZE)
    if password:
        raise _Failed(about(TpmCode.AUTH_FAIL, session=1))


async def _startup(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_Startup: from the beginning, which is all there is."""
    if rest.number(2) != spec.STARTUP_CLEAR:
        raise _Failed(about(TpmCode.VALUE, parameter=1))
    rest.end()
    pcrs = b"".join((b"\xff" if i in spec.DYNAMIC_PCRS else b"\0") * PCR_SIZE for i in range(spec.PCRS))
    await tpm.cpu.write(tpm.places.pcrs, pcrs)
    await tpm.cpu.write(tpm.places.field("tpm_started")[0], b"\1")
    return b""


async def _capability(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_GetCapability: commands and persistent handles, from a number on."""
    kind, first, limit = rest.number(4), rest.number(4, 2), rest.number(4, 3)
    rest.end()
    match kind:
        case spec.CAP_HANDLES if first & spec.HANDLE_TYPE == spec.HANDLE_EK & spec.HANDLE_TYPE:
            found = [spec.HANDLE_EK] if first <= spec.HANDLE_EK else []
        case spec.CAP_HANDLES:
            found = []
        case spec.CAP_COMMANDS:
            numbers = [number for number in sorted(_COMMANDS) if number >= first]
            found = [number | _HANDLES.get(TpmCommand(number), 0) << spec.COMMAND_HANDLES_SHIFT for number in numbers]
        case _:
            raise _Failed(about(TpmCode.VALUE, parameter=1))
    told = found[:limit]
    more = int(len(told) < len(found)).to_bytes(1, "big")
    return more + b"".join(value.to_bytes(4, "big") for value in (kind, len(told), *told))


async def _random(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_GetRandom: as many bytes as asked for, up to a digest."""
    size = min(rest.number(2), PCR_SIZE)
    rest.end()
    words = [await tpm.cpu.rdrand() for _ in range(-(-size // 8))]
    return _sized(b"".join(word.to_bytes(8, "little") for word in words)[:size])


async def _read_public(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_ReadPublic of the endorsement key: public area, name, and name below its hierarchy."""
    rest.end()
    if handles[0] != spec.HANDLE_EK:
        raise _Failed(about(TpmCode.HANDLE, handle=1))
    public, algorithm = await tpm.public(), spec.ALG_SHA256.to_bytes(2, "big")
    name = algorithm + sha256(public).digest()
    qualified = algorithm + sha256(spec.HANDLE_ENDORSEMENT.to_bytes(4, "big") + name).digest()
    return _sized(public) + _sized(name) + _sized(qualified)


async def _pcr_read(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_PCR_Read: the first eight of the selected registers, and which they are."""
    selections = []
    for _ in range(rest.number(4)):
        algorithm, size = rest.number(2), rest.number(1)
        selections.append((algorithm, rest.take(size)))
    rest.end()
    updates = await tpm.cpu.read(*tpm.places.field("pcr_updates"))
    answered, digests = b"", list[bytes]()
    for algorithm, chosen in selections:
        told = bytearray(len(chosen))
        mask = int.from_bytes(chosen, "little")
        for number in range(spec.PCRS):
            if algorithm == spec.ALG_SHA256 and mask >> number & 1 and len(digests) < spec.DIGESTS:
                told[number // 8] |= 1 << number % 8
                digests.append(await tpm.cpu.read(tpm.places.pcrs + number * PCR_SIZE, PCR_SIZE))
        answered += algorithm.to_bytes(2, "big") + len(chosen).to_bytes(1, "big") + told
    head: bytes = updates[::-1] + len(selections).to_bytes(4, "big") + answered
    return head + len(digests).to_bytes(4, "big") + b"".join(map(_sized, digests))


async def _pcr_extend(tpm: Tpm, handles: list[int], rest: _Reader) -> bytes:
    """TPM2_PCR_Extend: the register becomes the hash of itself and the digest."""
    (number,) = handles
    if number >= spec.PCRS:
        raise _Failed(about(TpmCode.VALUE, handle=1))
    digests = []
    for _ in range(rest.number(4)):
        if rest.number(2) != spec.ALG_SHA256:
            raise _Failed(about(TpmCode.HASH, parameter=1))
        digests.append(rest.take(PCR_SIZE))
    rest.end()
    if number in spec.DYNAMIC_PCRS:
        raise _Failed(TpmCode.LOCALITY)
    place = tpm.places.pcrs + number * PCR_SIZE
    for digest in digests:
        await tpm.cpu.write(place, sha256(await tpm.cpu.read(place, PCR_SIZE) + digest).digest())
    address, size = tpm.places.field("pcr_updates")
    updates = int.from_bytes(await tpm.cpu.read(address, size), "little") + len(digests)
    await tpm.cpu.write(address, updates.to_bytes(size, "little"))
    return b""


_COMMANDS: Mapping[int, Callable[[Tpm, list[int], _Reader], Awaitable[bytes]]] = {
    TpmCommand.STARTUP: _startup,
    TpmCommand.READ_PUBLIC: _read_public,
    TpmCommand.GET_CAPABILITY: _capability,
    TpmCommand.GET_RANDOM: _random,
    TpmCommand.PCR_READ: _pcr_read,
    TpmCommand.PCR_EXTEND: _pcr_extend,
}
_HANDLES = {TpmCommand.READ_PUBLIC: 1, TpmCommand.PCR_EXTEND: 1}
_AUTHORIZED = (TpmCommand.PCR_EXTEND,)
