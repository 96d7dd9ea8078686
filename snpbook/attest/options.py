"""The values of a policy's options, as TOML or Python give them, made into what a rule compares.

Bytes are `bytes` or hexadecimal text, words are numbers or tables of their fields, keys are PEM or the 0x404 bytes of
the SNP ABI. Each reader raises `ValueError` over a value that cannot be meant. Source: SNP ABI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from hashlib import sha384
from typing import Any
from uuid import UUID

from snpbook.spec import guid
from snpbook.spec.certificates import HWID_SIZE, HWID_SIZES
from snpbook.spec.launch import CURVE_P384, DIGEST_SIZE, PUBLIC_KEY
from snpbook.spec.layout import Layout
from snpbook.spec.policy import Tcb
from snpbook.spec.report import ATTESTATION_REPORT

Read = Callable[[Any], Any]
TCB_COMPONENTS = {
    "fmc": "fmc", "bootloader": "bootloader", "bl": "bootloader", "tee": "tee", "snp": "snp", "microcode": "microcode",
    "ucode": "microcode",
}  # fmt: skip
"""The components of a TCB, and the short names under which reports are shown."""
TABLE_ENTRIES = {
    "vcek": guid.CERT_VCEK, "vlek": guid.CERT_VLEK, "ask": guid.CERT_ASK, "ark": guid.CERT_ARK, "crl": guid.CERT_CRL,
}  # fmt: skip
REQUIRE = "require"
_SHA256_SIZE = 32


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"takes true or false, not {value!r}")
    return value


def asked(value: Any) -> bool | None:
    """True, or None where nothing is asked."""
    return flag(value) or None


def whole(width: int) -> Read:
    """A number of at most `width` bits, or text such as 0x3f."""

    def read(value: Any) -> int:
        try:
            number = int(value, 0) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"takes a number, not {value!r}") from error
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << width:
            raise ValueError(f"takes a number from 0 to {(1 << width) - 1:#x}, not {value!r}")
        return int(number)

    return read


def exactly(*sizes: int) -> Read:
    """Bytes of one of those sizes."""

    def read(value: Any) -> bytes:
        data = _bytes(value)
        if len(data) not in sizes:
            raise ValueError(f"{len(data)} bytes: it takes {' or '.join(map(str, sizes))}")
        return data

    return read


def padded(field: str) -> Read:
    """At least one byte and at most as many as a field of the report has; zeros behind are left out."""
    limit = ATTESTATION_REPORT.fields[field].size

    def read(value: Any) -> bytes:
        data = _bytes(value)
        if not 1 <= len(data) <= limit:
            raise ValueError(f"{len(data)} bytes: it takes 1 to {limit}")
        return data

    return read


def word(layout: Layout) -> Read:
    """A word of the report: as a number, or as a table of its fields, the others zero."""

    def read(value: Any) -> int:
        if isinstance(value, Mapping):
            return int.from_bytes(layout.pack(**value), "little")
        return int(whole(layout.size * 8)(value))

    return read


def tcb(value: Any) -> Mapping[str, int] | int:
    """The least of some components by name; or a TCB_VERSION, whose byte order a report's product decides."""
    if isinstance(value, Tcb):
        value = {name: least for name, least in asdict(value).items() if least is not None}
    if not isinstance(value, Mapping):
        return int(whole(64)(value))
    unknown = set(value) - set(TCB_COMPONENTS)
    if unknown:
        raise ValueError(f"no TCB component {sorted(unknown)[0]!r}: one of {', '.join(TCB_COMPONENTS)}")
    return {TCB_COMPONENTS[name]: whole(8)(least) for name, least in value.items()}


def version(value: Any) -> tuple[int, int]:
    """Major and minor: a pair, "1.55", or both in one number, the major in its upper byte."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return whole(8)(value[0]), whole(8)(value[1])
    if isinstance(value, str) and value.count(".") == 1:
        major, minor = value.split(".")
        if major.isdecimal() and minor.isdecimal():
            return whole(8)(int(major)), whole(8)(int(minor))
    number = whole(16)(value)
    return number >> 8, number & (1 << 8) - 1


def each(read: Read) -> Read:
    """A list, as a set."""

    def read_all(values: Any) -> frozenset[Any]:
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(f"takes a list, not {values!r}")
        return frozenset(map(read, values))

    return read_all


def chip(value: Any) -> bytes:
    """A chip's id as reports have it: 64 bytes, or the 8 that a Turin has."""
    data: bytes = exactly(*HWID_SIZES.values())(value)
    return data.ljust(HWID_SIZE, b"\0")


def measurements(value: Any) -> Mapping[str, bytes]:
    """Launch digests by name."""
    if not isinstance(value, Mapping):
        raise ValueError(f"takes a table of names and digests, not {value!r}")
    return {str(name): exactly(DIGEST_SIZE)(digest) for name, digest in value.items()}


def public_key_digest(value: Any) -> bytes:
    """What a report says of an ID or author key: SHA-384 of its 0x404 bytes; a PEM key is padded with zeros."""
    if isinstance(value, str) and "-----BEGIN" in value:
        return sha384(_snp_public_key(value)).digest()
    return sha384(exactly(PUBLIC_KEY.size)(value)).digest()


def table_options(value: Any) -> Mapping[UUID, bytes | None]:
    """What the evidence's table must hold, by GUID or name: the SHA-256 of the entry, or None for any content."""
    if not isinstance(value, Mapping):
        raise ValueError(f"takes a table of entries, not {value!r}")
    read = {}
    for name, wanted in value.items():
        identifier = TABLE_ENTRIES[name] if name in TABLE_ENTRIES else UUID(str(name))
        read[identifier] = None if wanted == REQUIRE else exactly(_SHA256_SIZE)(wanted)
    return read


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"takes hexadecimal text, not {value!r}")
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise ValueError(f"the hexadecimal text is broken: {error}") from error


def _snp_public_key(pem: str) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.encode())
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"the PEM key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("the PEM key is not on P-384, as ID and author keys are")
    size, point = PUBLIC_KEY.fields["qx"].size, key.public_numbers()
    qx, qy = (part.to_bytes(size, "little") for part in (point.x, point.y))
    return PUBLIC_KEY.pack(curve=CURVE_P384, qx=qx, qy=qy)
