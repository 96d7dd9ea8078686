"""PEM armour of certificates (RFC 7468), without the ssl module, which browsers' Pythons lack."""

from base64 import b64decode, b64encode
from textwrap import wrap

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_LINE = 64


def pem_from_der(der: bytes) -> str:
    """A certificate in PEM, 64 characters a line."""
    return "\n".join([BEGIN, *wrap(b64encode(der).decode(), _LINE), END, ""])


def der_from_pem(pem: str) -> bytes:
    """The one certificate of a PEM text; `ValueError` where there is no whole one."""
    return b64decode(pem.partition(BEGIN)[2].partition(END)[0], validate=False)
