"""Certificates in AMD's own formats: the real Naples chain, the toy ones, and each kind of damage."""

import random
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256

import pytest

from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.roots import Roots, named_sev_roots
from snpbook.attest.sev_chain import SevCertificate, verify_platform
from snpbook.spec.sev_certificates import CertUsage
from tests.attest.vectors import VECTORS, needs_vectors
from tests.sampling import sampled

NAMES = ("pdh", "pek", "oca", "cek", "ask", "ark")
ROOTS = named_sev_roots("amd")


def naples() -> dict[str, bytes]:
    return {name: (VECTORS / "legacy" / f"naples_{name}.cert").read_bytes() for name in NAMES}


def read(ders: Iterable[bytes]) -> list[SevCertificate]:
    return [SevCertificate.read(der) for der in ders]


def refused(chain: dict[str, bytes], roots: Roots = ROOTS) -> str:
    with pytest.raises(NotGenuine) as refusal:
        verify_platform(read(chain.values()), roots)
    return refusal.value.check


@needs_vectors
def test_the_real_chain() -> None:
    chain = naples()
    assert sha256(chain["ark"]).hexdigest() in ROOTS.fingerprints
    for order in (list(chain.values()), list(chain.values())[::-1]):
        platform = verify_platform(read(order), ROOTS)
        assert repr(platform) == "<VerifiedPlatform, roots amd>"
        assert platform.pdh.key_size == 384
    signatures = [
        check.name for check in platform.checks if ".signed_by_" in check.name and not check.name.endswith("id")
    ]
    assert signatures == [
        "sev.ark.signed_by_ark", "sev.ask.signed_by_ark", "sev.cek.signed_by_ask", "sev.oca.signed_by_oca",
        "sev.pek.signed_by_oca", "sev.pek.signed_by_cek", "sev.pdh.signed_by_pek",
    ]  # fmt: skip
    assert repr(read(chain.values())[0]).startswith("SevCertificate(PDH, sha256 34b11563")


@needs_vectors
def test_roots_are_pinned_and_nothing_may_lack() -> None:
    assert refused(naples(), Roots("none", frozenset())) == "sev.root"
    for name in NAMES:
        assert refused({other: der for other, der in naples().items() if other != name}) == "sev.certificates"


@needs_vectors
@pytest.mark.parametrize(
    ("name", "offset", "value", "check"),
    [
        ("pdh", 0, 2, "sev.pdh.version"),
        ("pdh", 6, 1, "sev.pdh.reserved"),
        ("pdh", 0x0C, 2, "sev.pdh.key"),
        ("pdh", 0x10, 1, "sev.pdh.key"),
        ("pdh", 0x14, 0xAA, "sev.pdh.key"),
        ("pdh", 0x413, 1, "sev.pdh.key"),
        ("pdh", 4, 0xEE, "sev.pdh.signed_by_pek"),
        ("pdh", 0x414, 0x01, "sev.pdh.signed_by_pek"),
        ("pdh", 0x41C, 0xAA, "sev.pdh.signed_by_pek"),
        ("pdh", 0x61B, 1, "sev.pdh.signed_by_pek"),
        ("oca", 4, 0xEE, "sev.oca.signed_by_oca"),
        ("cek", 4, 0xEE, "sev.cek.signed_by_ask"),
        ("cek", 0x61B, 1, "sev.cek.signed_by_ask"),
        ("ask", 0x14, 0, "sev.ask.signed_by_ark.id"),
        ("ask", 0x28, 1, "sev.ask.reserved"),
        ("ask", 0x40, 3, "sev.ask.key"),
        ("ask", 0x3D, 0, "sev.ask.key"),
        ("ask", 0x300, 0, "sev.ask.signed_by_ark"),
    ],
)
def test_a_damaged_certificate(name: str, offset: int, value: int, check: str) -> None:
    chain = naples()
    damaged = bytearray(chain[name])
    damaged[offset] = value if damaged[offset] != value else value ^ 0xFF
    assert refused({**chain, name: bytes(damaged)}) == check


@needs_vectors
@pytest.mark.parametrize("name", NAMES)
def test_every_signed_byte_counts(name: str) -> None:
    chain = naples()
    signed = 0x414 if name not in ("ask", "ark") else 0x40 + 512
    for offset in sampled(range(signed), 12):
        damaged = bytearray(chain[name])
        damaged[offset] ^= 0x10
        with pytest.raises(NotGenuine):
            verify_platform(read({**chain, name: bytes(damaged)}.values()), ROOTS)


@needs_vectors
def test_damage_of_any_kind() -> None:
    source = random.Random(5)
    for _ in range(300):
        chain = {name: bytearray(der) for name, der in naples().items()}
        for _ in range(3):
            der = chain[source.choice(NAMES)]
            der[source.randrange(len(der))] = source.randrange(256)
        with suppress(NotGenuine):
            verify_platform(read(map(bytes, chain.values())), ROOTS)


def test_lengths() -> None:
    for size in (0, 831, 833, 2083, 2085, 1601):
        with pytest.raises(MalformedEvidence, match=f"{size} bytes"):
            SevCertificate.read(bytes(size))
    assert SevCertificate.read(bytes(832)).usage == CertUsage.ARK
    assert repr(SevCertificate.read(b"\xff" * 2084)).startswith("SevCertificate(0xffffffff")
