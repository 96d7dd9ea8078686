"""The interface of AMD's key distribution service: parameters of a request, statuses, forms of the answers.

Source: KDS (interface), and what its clients send and meet; which status answers which mistake beyond a malformed id
(400) and an unknown chip, TCB or product (404), and the media types, are unconfirmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum

KDS_PARAMETERS: Mapping[int, Mapping[str, str]] = {
    0: {"blSPL": "bootloader", "teeSPL": "tee", "snpSPL": "snp", "ucodeSPL": "microcode"},
    1: {"fmcSPL": "fmc", "blSPL": "bootloader", "teeSPL": "tee", "snpSPL": "snp", "ucodeSPL": "microcode"},
}
"""By structVersion of the product line: the parameters of a VEK's address, in AMD's order, and each one's component."""

TARGET_MAX = 8000
"""Characters of path and query: what RFC 9110 wants every server to take, and many times what a request needs."""

CRLF_CHAINS: Mapping[tuple[str, str], str] = {("turin", "vcek"): "", ("turin", "vlek"): "\r\n"}
"""The chains, by product and service, whose lines end in CR LF, and what stands behind the last: seen in AMD's own."""


class KdsStatus(IntEnum):
    """How the service answers."""

    OK = 200
    BAD_REQUEST = 400
    UNAUTHORIZED = 401
    NOT_FOUND = 404
    METHOD_NOT_ALLOWED = 405
    REQUEST_TIMEOUT = 408
    URI_TOO_LONG = 414
    TOO_MANY_REQUESTS = 429
    INTERNAL_SERVER_ERROR = 500
    SERVICE_UNAVAILABLE = 503

    @property
    def phrase(self) -> str:
        """The status in words, such as "Not Found"."""
        return "OK" if self is KdsStatus.OK else self.name.replace("_", " ").title().replace("Uri", "URI")


class MediaType(StrEnum):
    """Content types, from memory."""

    CERTIFICATE = "application/pkix-cert"
    CHAIN = "application/x-pem-file"
    CRL = "application/pkix-crl"
    CEK = "application/octet-stream"
    TEXT = "text/plain; charset=utf-8"
