"""AMD's key distribution service for a simulated fleet of chips: which request gets which answer, and no socket.

AMD knows every chip's secret, so a certificate is made when it is asked for, and its bytes depend on chip and TCB
alone. Connections are served by `snpbook.vendor.kds`. Source: KDS (interface); what it leaves open is MODEL.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from hmac import compare_digest
from urllib.parse import parse_qsl

from snpbook.firmware.keys import Chip, attestation_key
from snpbook.spec.certificates import HWID_SIZE, PRODUCT_LINES, SPL_MAX, UCODE_SPL_MAX, ProductLine
from snpbook.spec.kds import CRLF_CHAINS, KDS_PARAMETERS, TARGET_MAX, KdsStatus, MediaType
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.policy import Tcb
from snpbook.spec.products import product as find_product
from snpbook.vendor.ca import AmdCa
from snpbook.vendor.sev_ca import SevCa
from snpbook.vendor.vlek import provider_sticks

CRL_LIFETIME = timedelta(days=30)
CACHED = 4096
"""Certificates of a kind that are kept; an older one is made again when it is asked for, byte for byte."""
THROTTLE_WINDOW = timedelta(minutes=1)

_HOST = "(?:https?://[^/]*)?"
_PATH = re.compile(_HOST + "/(vcek|vlek)/v1/([^/]*)/([^/]*)")
_CEK_PATH = re.compile(_HOST + "/cek/id/([^/]*)")
_ID = re.compile("[0-9a-f]*")
_NUMBER = re.compile("[0-9]{1,3}")
_PRODUCTS = {line.name: product for product, line in PRODUCT_LINES.items()}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service says to one request."""

    status: KdsStatus
    body: bytes
    media_type: MediaType = MediaType.TEXT


class _Refused(Exception):
    """A request that is not served: the status, and what the client is told."""

    def __init__(self, status: KdsStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class KeyService:
    """The KDS of a fleet: VCEKs, VLEKs, chains and revocation lists of SNP products, CEKs of every product.

    Certificates are dated `issued`, revocation lists by the `clock`; both have a time zone. `published` has the newest
    TCB of a product: for one with a newer component there is no certificate; a product that it leaves out has
    certificates at every TCB. `providers` are cloud providers by their secrets: each asks for its VLEK with the header
    `Authorization: Bearer SECRET` (MODEL). `throttle` is how many requests a client may make in a minute before it
    gets 429 for the rest of it; None lets everybody ask.
    """

    def __init__(
        self,
        chips: Iterable[Chip],
        issued: datetime,
        clock: Callable[[], datetime],
        *,
        published: Mapping[str, Tcb] | None = None,
        providers: Mapping[str, str] | None = None,
        throttle: int | None = None,
    ) -> None:
        self.issued, self.clock, self.throttle = issued, clock, throttle
        self.published, self.providers = dict(published or {}), dict(providers or {})
        self._chips = {chip.chip_id: chip for chip in chips}
        self._window, self._asked = 0, Counter[str]()
        self._vcek = lru_cache(CACHED)(self._issue_vcek)
        self._vlek = lru_cache(CACHED)(self._issue_vlek)
        self._cek = lru_cache(CACHED)(self._issue_cek)

    def __repr__(self) -> str:
        return f"KeyService(toy, {len(self._chips)} chips)"

    def answer(self, target: str, client: str = "", authorization: str = "") -> Answer:
        """The answer to a GET of `target` (path and query, or a URL) by the address `client`; refusals are answers."""
        try:
            self._count(client)
            if len(target) > TARGET_MAX:
                raise _Refused(KdsStatus.URI_TOO_LONG, f"at most {TARGET_MAX} characters")
            return self._route(target, authorization)
        except _Refused as refusal:
            return Answer(refusal.status, f"{refusal.status.phrase}: {refusal}\n".encode())

    def fetch(self, url: str) -> tuple[int, bytes]:
        """Status and body of a URL, whatever its host: a fetch function for clients that need no network."""
        answer = self.answer(url)
        return answer.status, answer.body

    def _route(self, target: str, authorization: str) -> Answer:
        path, _, query = target.partition("?")
        if found := _CEK_PATH.fullmatch(path):
            return Answer(KdsStatus.OK, self._cek(_hex(found[1], HWID_SIZE)), MediaType.CEK)
        found = _PATH.fullmatch(path)
        if found is None or found[2] not in _PRODUCTS:
            raise _Refused(KdsStatus.NOT_FOUND, "no such path or product")
        service, product, item = found[1], _PRODUCTS[found[2]], found[3]
        match service, item:
            case _, "cert_chain":
                return Answer(KdsStatus.OK, _chain(product, service), MediaType.CHAIN)
            case _, "crl":
                today = self.clock().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
                return Answer(KdsStatus.OK, _crl(product, today), MediaType.CRL)
            case "vlek", "cert":
                certificate = self._vlek(product, self._provider(authorization), self._tcb(product, query))
                return Answer(KdsStatus.OK, certificate, MediaType.CERTIFICATE)
            case "vcek", _:
                chip_id = _chip_id(PRODUCT_LINES[product], item)
                certificate = self._vcek(product, chip_id, self._tcb(product, query))
                return Answer(KdsStatus.OK, certificate, MediaType.CERTIFICATE)
        raise _Refused(KdsStatus.NOT_FOUND, "no such path")

    def _count(self, client: str) -> None:
        """One request more of a client; those that are refused count too."""
        if self.throttle is None:
            return
        window = int(self.clock().timestamp() // THROTTLE_WINDOW.total_seconds())
        if window != self._window:
            self._window = window
            self._asked.clear()
        self._asked[client] += 1
        if self._asked[client] > self.throttle:
            raise _Refused(KdsStatus.TOO_MANY_REQUESTS, f"more than {self.throttle} in a minute")

    def _provider(self, authorization: str) -> str:
        for secret, provider in self.providers.items():
            if compare_digest(authorization.encode(), f"Bearer {secret}".encode()):
                return provider
        raise _Refused(KdsStatus.UNAUTHORIZED, "a VLEK is given to its provider")

    def _tcb(self, product: str, query: str) -> Tcb:
        """The TCB of a query: each of the product's parameters once, decimal, zero-padded or not, in any order."""
        parameters = KDS_PARAMETERS[PRODUCT_LINES[product].struct_version]
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        except ValueError:
            pairs = []
        if sorted(name for name, _ in pairs) != sorted(parameters):
            raise _Refused(KdsStatus.BAD_REQUEST, f"the parameters are {', '.join(parameters)}, each once")
        for name, text in pairs:
            limit = UCODE_SPL_MAX if parameters[name] == "microcode" else SPL_MAX
            if not _NUMBER.fullmatch(text) or int(text) > limit:
                raise _Refused(KdsStatus.BAD_REQUEST, f"{name} is a decimal number from 0 to {limit}")
        tcb = Tcb(**{parameters[name]: int(text) for name, text in pairs})
        if product in self.published and not self.published[product].at_least(tcb):
            raise _Refused(KdsStatus.NOT_FOUND, "no certificate at this TCB")
        return tcb

    def _issue_vcek(self, product: str, chip_id: bytes, tcb: Tcb) -> bytes:
        chip = self._chips.get(chip_id)
        if chip is None or chip.product != product:
            raise _Refused(KdsStatus.NOT_FOUND, "no such chip")
        return _ca(product).provision(chip, tcb, self.issued)

    def _issue_vlek(self, product: str, provider: str, tcb: Tcb) -> bytes:
        key = attestation_key(provider_sticks(provider, tcb)[-1], VLEK_LABEL)
        return _ca(product).issue_vlek(provider, tcb, key.public_key(), self.issued)

    def _issue_cek(self, chip_id: bytes) -> bytes:
        chip = self._chips.get(chip_id)
        firmware = find_product(chip.product).firmware if chip else None
        if chip is None or firmware is None:
            raise _Refused(KdsStatus.NOT_FOUND, "no such chip")
        return SevCa(chip.product).issue_cek(chip, firmware.abi)


_ca = cache(AmdCa)


@cache
def _chain(product: str, service: str) -> bytes:
    pem = _ca(product).chain_pem(service)
    if (product, service) in CRLF_CHAINS:
        pem = pem.replace("\n", "\r\n") + CRLF_CHAINS[product, service]
    return pem.encode()


@lru_cache(16)
def _crl(product: str, day: datetime) -> bytes:
    return _ca(product).crl(day, day + CRL_LIFETIME)


def _chip_id(line: ProductLine, text: str) -> bytes:
    """A hwID as CHIP_ID; the 64 bytes of another line are no malformed hwID of this one, just nobody's."""
    if line.hwid_size < HWID_SIZE and len(text) == 2 * HWID_SIZE:
        raise _Refused(KdsStatus.NOT_FOUND, f"a hwID of {line.name} has {2 * line.hwid_size} digits")
    return _hex(text, line.hwid_size).ljust(HWID_SIZE, b"\0")


def _hex(text: str, size: int) -> bytes:
    if len(text) != 2 * size or not _ID.fullmatch(text):
        raise _Refused(KdsStatus.BAD_REQUEST, f"an id is {2 * size} lower-case hexadecimal digits")
    return bytes.fromhex(text)
