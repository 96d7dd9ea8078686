"""Encrypted messages to the firmware: one at a time, under a key and by numbers that are in the secrets page.

Only this file uses a message key. Its number is written back before a message goes out, because a number used twice
would repeat an AES-GCM nonce; after anything that is not a good answer the key is wiped, so that no further message
can be. Sources: Linux drivers/virt/coco/sev-guest (snp_send_guest_request; there the number is written back
afterwards); SNP ABI, guest messages.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec.ghcb import Nae, VmmError
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.layout import Record
from snpbook.spec.messages import (
    AAD_FROM,
    ALGO_AES_256_GCM,
    HEADER_VERSION,
    MESSAGE_HEADER,
    TAG_SIZE,
    MessageType,
    iv,
)
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.refusal import Refusal
from snpbook.spec.uapi_sev_guest import RETRY_LIMIT_SECONDS, RETRY_SECONDS, SEQUENCE_LIMIT

_TRIES = RETRY_LIMIT_SECONDS // RETRY_SECONDS
_VMM_ERROR = 32
"""Where in SW_EXITINFO2 the hypervisor's own error begins."""


class RequestFailed(Refusal, OSError, ProgramFailure):
    """A request to the firmware that failed, with the errno of the driver.

    `exitinfo2` is what hypervisor and firmware said. `pages` are those that the certificates need, where there were
    too few.
    """

    def __init__(
        self, number: int, rule: str, expected: object = "", found: object = "", *, exitinfo2: int = 0, pages: int = 0
    ) -> None:
        super().__init__(rule, expected, found, "LINUX drivers/virt/coco/sev-guest")
        self.errno, self.exitinfo2, self.pages = number, exitinfo2, pages

    def __str__(self) -> str:
        return f"{errno.errorcode[self.errno or errno.EIO]}: {super().__str__()}"


@dataclass(frozen=True, slots=True)
class Channel:
    """The way to the firmware through `ghcb`, with the message key of VMPL `vmpck`."""

    ghcb: Ghcb
    place: Layout
    vmpck: int = 0

    @property
    def cpu(self) -> GuestCpu:
        return self.ghcb.cpu

    async def usable(self) -> bool:
        """Whether there still is a key."""
        return any(self._key(await self._secrets()))

    async def exchange(
        self, kind: MessageType, body: bytes, *, version: int = 1, limit: int = PAGE_SIZE, certificate_pages: int = -1
    ) -> bytes:
        """Send a message: what the firmware answers, at most `limit` bytes.

        With `certificate_pages` from 0 on it is an extended request, whose certificates come into that many pages.
        `RequestFailed`: ENOTTY without a key, EIO where numbers have run out or somebody refused, ETIMEDOUT after a
        minute of a busy hypervisor, EBADMSG for an answer that is none. All but the first two wipe the key.
        """
        secrets = await self._secrets()
        key, number = self._key(secrets), getattr(secrets, f"msg_seqno_{self.vmpck}") + 1
        if not any(key):
            raise RequestFailed(errno.ENOTTY, f"VMPCK{self.vmpck} is there", "a key", "zeros: it was wiped")
        if number >= SEQUENCE_LIMIT:
            raise RequestFailed(errno.EIO, f"VMPCK{self.vmpck} is used up", f"below {SEQUENCE_LIMIT:#x}", number)
        await self._count(number + 1)
        await self.cpu.write(self.place.request, self._seal(key, number, kind, version, body))
        try:
            await self._send(certificate_pages)
            answer = await self.cpu.read(self.place.response, PAGE_SIZE)
            return self._open(key, answer, number + 1, kind, version, limit)
        except RequestFailed as failure:
            if not failure.pages:
                await self._wipe()
            raise

    async def _send(self, certificate_pages: int) -> None:
        """The request, as often as the hypervisor is busy. Each time stands for two seconds of waiting (MODEL)."""
        extended = certificate_pages >= 0
        for _ in range(_TRIES):
            info2, pages = await self._ask(certificate_pages if extended else None)
            match info2 >> _VMM_ERROR:
                case VmmError.BUSY:
                    await self.cpu.pause()
                case VmmError.INVALID_LEN if extended:
                    again, _ = await self._ask(None)
                    if again:
                        raise RequestFailed(errno.EIO, "the number is used up without certificates", 0, again)
                    what = "pages for the certificates"
                    raise RequestFailed(errno.EIO, what, pages, certificate_pages, exitinfo2=info2, pages=max(pages, 1))
                case _:
                    if info2:
                        rule = "hypervisor and firmware serve the request"
                        raise RequestFailed(errno.EIO, rule, 0, hex(info2), exitinfo2=info2)
                    return
        waited = f"{RETRY_LIMIT_SECONDS} seconds"
        raise RequestFailed(errno.ETIMEDOUT, "the hypervisor finds time", waited, exitinfo2=VmmError.BUSY << _VMM_ERROR)

    async def _ask(self, certificate_pages: int | None) -> tuple[int, int]:
        """One exit: SW_EXITINFO2, and RBX after an extended request."""
        places = self.place.request, self.place.response
        if certificate_pages is None:
            return (await self.ghcb.call(Nae.GUEST_REQUEST, *places)).sw_exit_info_2, 0
        answer = await self.ghcb.call(
            Nae.EXTENDED_GUEST_REQUEST, *places, rax=self.place.certificates, rbx=certificate_pages, needs=("rbx",)
        )
        return answer.sw_exit_info_2, answer.rbx

    def _seal(self, key: bytes, number: int, kind: MessageType, version: int, body: bytes) -> bytes:
        header = MESSAGE_HEADER.record(
            msg_seqno=number,
            algo=ALGO_AES_256_GCM,
            hdr_version=HEADER_VERSION,
            hdr_size=MESSAGE_HEADER.size,
            msg_type=kind,
            msg_version=version,
            msg_size=len(body),
            msg_vmpck=self.vmpck,
        )
        sealed = AESGCM(key).encrypt(iv(number), body, bytes(header)[AAD_FROM:])
        tag = sealed[-TAG_SIZE:].ljust(MESSAGE_HEADER.fields["authtag"].size, b"\0")
        return (bytes(header.replace(authtag=tag)) + sealed[:-TAG_SIZE]).ljust(PAGE_SIZE, b"\0")

    def _open(self, key: bytes, page: bytes, number: int, kind: MessageType, version: int, limit: int) -> bytes:
        """The payload of an answer that is the firmware's to this very request. `page` is the guest's own copy."""
        header = MESSAGE_HEADER.unpack(page)
        expected = f"number {number}, type {kind + 1}, version {version}"
        found = f"number {header.msg_seqno}, type {int(header.msg_type)}, version {header.msg_version}"
        if found != expected:
            raise RequestFailed(errno.EBADMSG, "the answer is to this request", expected, found)
        stop = MESSAGE_HEADER.size + header.msg_size
        if header.msg_size > limit or stop > PAGE_SIZE:
            most = min(limit, PAGE_SIZE - MESSAGE_HEADER.size)
            raise RequestFailed(errno.EBADMSG, "the answer's size", f"up to {most}", header.msg_size)
        sealed = page[MESSAGE_HEADER.size : stop] + header.authtag[:TAG_SIZE]
        try:
            return AESGCM(key).decrypt(iv(number), sealed, page[AAD_FROM : MESSAGE_HEADER.size])
        except InvalidTag:
            raise RequestFailed(errno.EBADMSG, "the answer's tag is right: nobody has changed it") from None

    async def _secrets(self) -> Record:
        return SECRETS_PAGE.unpack(await self.cpu.read(self.place.secrets, PAGE_SIZE))

    def _key(self, secrets: Record) -> bytes:
        key: bytes = getattr(secrets, f"vmpck{self.vmpck}")
        return key

    async def _count(self, number: int) -> None:
        counter = SECRETS_PAGE.fields[f"msg_seqno_{self.vmpck}"]
        await self.cpu.write(self.place.secrets + counter.offset, number.to_bytes(counter.size, "little"))

    async def _wipe(self) -> None:
        key = SECRETS_PAGE.fields[f"vmpck{self.vmpck}"]
        await self.cpu.write(self.place.secrets + key.offset, bytes(key.size))
