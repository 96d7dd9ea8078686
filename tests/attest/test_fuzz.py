"""No parser raises anything but its own errors, and none takes more than time in proportion to its input.

`SNPBOOK_TESTS=all` shares a million inputs among the parsers; every run takes a sample of them.
"""

import random
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snpbook.attest.bundle import Bundle
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.evidence import Evidence
from snpbook.attest.id_auth import IdBlock, verify_id_block
from snpbook.attest.parse import Report
from snpbook.attest.verify import verify
from snpbook.spec import guid
from tests.attest.judging import GOOD
from tests.attest.test_certs import pem
from tests.attest.test_evidence import answer, table
from tests.attest.test_id_auth import OWN
from tests.attest.vectors import NOW
from tests.sampling import ALL

OWN_ERRORS = (MalformedEvidence, NotGenuine)
REPORT = GOOD.report()
TABLE = table([(guid.CERT_VCEK, GOOD.vek.der), (guid.CERT_CRL, GOOD.crl(1, 2, 3).der)])


def judge(report: bytes) -> None:
    verify(report, GOOD.certificates, GOOD.roots, NOW, allow_newer=True)


PARSERS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "evidence": (
        Evidence.read,
        [REPORT, REPORT + TABLE, answer() + REPORT, REPORT.hex().encode(), b64encode(REPORT + TABLE)],
    ),
    "report": (lambda data: list(Report.parse(data).unknown_bits()), [REPORT]),
    "verify": (judge, [REPORT]),
    "certificates": (Bundle.read, [GOOD.vek.der, GOOD.ask.der, GOOD.ark.der, pem(GOOD.vek.der) + pem(GOOD.ask.der)]),
    "revocation lists": (Bundle.read, [GOOD.crl(1, 2, 3).der, pem(GOOD.crl().der, "X509 CRL")]),
    "ID blocks": (lambda data: verify_id_block(IdBlock.read(data[:0x60], data[0x60:])), [OWN.block + OWN.auth]),
    "configfs-tsm": (lambda data: Evidence.read_tsm({"outblob": REPORT, "auxblob": data}), [TABLE]),
}
SHARE = 1_000_000 // len(PARSERS) if ALL else 1500


@pytest.mark.parametrize("name", PARSERS)
def test_damage_of_any_kind(name: str) -> None:
    """Bits, bytes, lengths, ends and joins, from a fixed seed."""
    parse, seeds = PARSERS[name]
    source = random.Random(name)
    for _ in range(SHARE):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(data) + 1)
            how = source.randrange(5)
            if how == 0 and at < len(data):
                data[at] ^= 1 << source.randrange(8)
            elif how == 1 and at < len(data):
                data[at] = source.choice((0, 1, 0x7F, 0x80, 0x84, 0xFF))
            elif how == 2:
                del data[at : at + source.choice((1, 2, 24, 1000))]
            elif how == 3:
                data[at:at] = source.randbytes(source.choice((1, 4, 32)))
            else:
                other = source.choice(seeds)
                data[at:] = other[source.randrange(len(other)) :]
        with suppress(OWN_ERRORS):
            parse(bytes(data))


@pytest.mark.parametrize("name", PARSERS)
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=3000), at=st.integers(0, 3000), whole=st.booleans())
def test_bytes_of_any_kind(name: str, data: bytes, at: int, whole: bool) -> None:
    parse, seeds = PARSERS[name]
    seed = seeds[0]
    with suppress(OWN_ERRORS):
        parse(data if whole else seed[:at] + data + seed[at:])


def long_table(count: int) -> bytes:
    entries = b"".join(index.to_bytes(16, "big") + bytes(8) for index in range(1, count + 1))
    return REPORT + entries


LONG: dict[str, tuple[Callable[[bytes], object], Callable[[int], bytes], int]] = {
    "hexadecimal": (Evidence.read, lambda n: b"ab " * n, 400_000),
    "base64": (Evidence.read, lambda n: b"QUJD\n" * n, 200_000),
    "neither": (Evidence.read, lambda n: b" " * n + b"!" + b" " * n, 400_000),
    "a table without end": (Evidence.read, long_table, 3_000),
    "PEM begins": (Bundle.read, lambda n: b"-----BEGIN CERTIFICATE-----" * n, 80_000),
    "PEM of spaces": (Bundle.read, lambda n: b"-----BEGIN CERTIFICATE-----" + b" \n" * n, 200_000),
    "PEM of keys": (Bundle.read, lambda n: b"-----BEGIN KEY-----\n-----END KEY-----\n" * n, 20_000),
    "many certificates": (Bundle.read, lambda n: pem(GOOD.vek.der) * n, 40),
    "a long revocation list": (Bundle.read, lambda n: GOOD.crl(*range(1, n)).der, 3_000),
    "DER of many": (Bundle.read, lambda n: b"\x30\x84" + (n * 2).to_bytes(4, "big") + b"\x05\x00" * n, 100_000),
    "DER in DER": (Bundle.read, lambda n: b"\x30\x84" + (n * 2).to_bytes(4, "big") + b"\x30\x80" * n, 100_000),
}


@pytest.mark.parametrize("name", LONG)
def test_twice_the_length_takes_twice_the_time(name: str) -> None:
    """At most 2.3 times; the quickest of runs in turn, because others use the machine too."""
    parse, make, size = LONG[name]
    once, twice = make(size), make(2 * size)

    def cost(data: bytes) -> float:
        begun = process_time()
        with suppress(OWN_ERRORS):
            parse(data)
        return process_time() - begun

    once_best = twice_best = float("inf")
    for run in range(30):
        once_best, twice_best = min(once_best, cost(once)), min(twice_best, cost(twice))
        if run >= 4 and twice_best <= 2.3 * once_best:
            return
    raise AssertionError(f"doubling the length costs {twice_best / once_best:.2f} times")
