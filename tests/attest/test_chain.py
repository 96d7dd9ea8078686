"""The chain above a report: each link by itself, authorities, dates, keys that are never computed with, revocation."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snpbook.attest import certs
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import Result
from snpbook.attest.crl import RevocationList
from snpbook.attest.verify import verify
from snpbook.spec.certificates import PSS_ALGORITHM, PSS_ALGORITHM_EXPLICIT
from tests.attest.judging import GOOD, failed_check, judged
from tests.attest.own_chain import EXPIRES, ISSUED, OwnChain, der, integer, resigned, toy_key
from tests.attest.vectors import NOW, REAL, needs_vectors, real_certificates

DEFECTS = {
    "not yet": ({"issued": NOW + timedelta(seconds=1)}, "chain.root.dates"),
    "no longer": ({"expires": NOW - timedelta(seconds=1)}, "chain.root.dates"),
    "ASK of another root": ({"ask_signer": toy_key("ask")}, "chain.intermediate.signature"),
    "ASK is no CA": ({"ask_is_ca": False}, "chain.intermediate.authority"),
    "ASK with a short key": ({"ask_key": rsa.generate_private_key(65537, 2048)}, "chain.intermediate.authority"),
    "ASK with e = 3": ({"ask_key": rsa.generate_private_key(3, 2048)}, "chain.intermediate.authority"),
    "uncritical constraints": ({"ask_critical": False}, "chain.intermediate.authority"),
    "unknown critical extension": ({"ask_extension": x509.InhibitAnyPolicy(0)}, "chain.intermediate.authority"),
    "SHA-256": ({"hash": SHA256(), "salt": 32}, "chain.root.signature"),
    "short salt": ({"salt": 32}, "chain.root.signature"),
    "foreign names": ({"organisation": "Another Micro Devices"}, "chain.names"),
    "the name of an ASVK": ({"ask_name": "SEV-VLEK-Milan"}, "report.product"),
    "the name of a VLEK": ({"vek_name": "SEV-VLEK"}, "certificates.vek"),
    "P-256": ({"vek_key": ec.generate_private_key(ec.SECP256R1())}, "vek.key"),
    "critical extension": ({"critical": True}, "vek.critical"),
    "foreign extension": ({"foreign_extension": True}, "vek.extensions"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_chain_with_a_defect(name: str) -> None:
    defect, check = DEFECTS[name]
    assert judged(GOOD.but(**defect)) == check


def test_every_link_is_judged_by_itself() -> None:
    report, roots = GOOD.report(), GOOD.roots
    old, foreign = GOOD.but(expires=NOW - timedelta(seconds=1)), GOOD.but(ask_key=toy_key("asvk"))
    for pool, check in (
        ([old.vek, GOOD.ask, GOOD.ark], "chain.vek.dates"),
        ([GOOD.vek, old.ask, GOOD.ark], "chain.intermediate.dates"),
        ([foreign.vek, GOOD.ask, GOOD.ark], "chain.vek.signature"),
    ):
        assert failed_check(report, pool, roots) == check


def test_a_root_that_may_not_sign_is_no_root() -> None:
    ark = resigned(GOOD.ark.der, GOOD.ark_key, lambda tbs: tbs.replace(b"\x03\x02\x01\x06", b"\x03\x02\x01\x80"))
    chain = [GOOD.vek, GOOD.ask, Certificate.read(ark)]
    assert failed_check(GOOD.report(), chain, replace(GOOD.roots, fingerprints=frozenset([chain[2].fingerprint]))) == (
        "chain.root.authority"
    )


def test_the_root_signs_itself() -> None:
    """A pinned root whose own signature is broken: pinning is by fingerprint, and still the root must be whole."""
    broken = Certificate.read(GOOD.ark.der[:-1] + bytes([GOOD.ark.der[-1] ^ 1]))
    roots = replace(GOOD.roots, fingerprints=frozenset([broken.fingerprint]))
    assert failed_check(GOOD.report(), [GOOD.vek, GOOD.ask, broken], roots) == "chain.root.signature"


def test_key_identifiers_that_disagree() -> None:
    """AMD's roots name their key, our own do not: the intermediate is held against a root that does."""
    named = x509.SubjectKeyIdentifier.from_public_key(GOOD.ark_key.public_key())
    identifier = der(0x30, der(6, b"\x55\x1d\x0e"), der(4, der(4, named.digest)))

    def add(tbs: bytes) -> bytes:
        """One more extension, in the last field."""
        at = tbs.rindex(b"\xa3\x82") if b"\xa3\x82" in tbs else tbs.rindex(b"\xa3")
        inner = tbs[at:][tbs[at:].index(b"\x30") + 2 :]
        return tbs[:at] + der(0xA3, der(0x30, inner, identifier))

    root = Certificate.read(resigned(GOOD.ark.der, GOOD.ark_key, lambda tbs: add(tbs) if len(tbs) > 100 else tbs))
    roots = replace(GOOD.roots, fingerprints=frozenset([root.fingerprint]))
    for digest, check in ((named.digest, ""), (b"?" * 20, "chain.key_identifier")):
        ask = GOOD.but(ask_extension=x509.AuthorityKeyIdentifier(digest, None, None)).ask
        if check:
            assert failed_check(GOOD.report(), [GOOD.vek, ask, root], roots) == check
        else:
            assert verify(GOOD.report(), [GOOD.vek, ask, root], roots, NOW).product == "milan"


@pytest.mark.parametrize(("path", "accepted"), [(None, True), (0, True), (3, True)])
def test_path_lengths_that_allow_the_chain(path: int | None, accepted: bool) -> None:
    chain = GOOD.but(ask_path=path)
    assert bool(verify(chain.report(), chain.certificates, chain.roots, NOW)) is accepted


@pytest.mark.parametrize("now", [ISSUED, EXPIRES])
def test_dates_include_their_ends(now: datetime) -> None:
    assert verify(GOOD.report(), GOOD.certificates, GOOD.roots, now).product == "milan"
    there = now.astimezone(timezone(timedelta(hours=9)))
    assert verify(GOOD.report(), GOOD.certificates, GOOD.roots, there).product == "milan"


def with_key(modulus: int, exponent: int, size: int) -> bytes:
    """The ARK with another RSA key, in the DER of a certificate that is well-formed in everything else."""
    old = GOOD.ark_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key = der(0x30, der(2, b"\0" + modulus.to_bytes(size, "big")), integer(exponent))
    tbs = GOOD.ark.tbs[4:].replace(old, der(0x30, old[4:19], der(3, b"\0", key)))
    return der(0x30, der(0x30, tbs), PSS_ALGORITHM, der(3, b"\0", GOOD.ark.signature))


@pytest.mark.parametrize(
    ("bits", "exponent"), [(2048, 65537), (4088, 65537), (8192, 65537), (4096, 3), (1 << 20, 65537)]
)
def test_a_key_of_another_shape_is_never_computed_with(
    bits: int, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ark = with_key((1 << bits) - 1, exponent, bits // 8)
    monkeypatch.delattr(certs, "load_der_public_key")  # whoever makes a key of it fails
    root = Certificate.read(ark)
    assert root.public_key.kind == f"RSA-{bits}, e = {exponent}"
    assert root.public_key.key is None
    assert not GOOD.ask.signed_by(root)
    roots = replace(GOOD.roots, fingerprints=frozenset([root.fingerprint]))
    assert failed_check(GOOD.report(), [GOOD.vek, GOOD.ask, root], roots) == "chain.root.authority"


def test_both_pss_encodings_are_accepted_and_no_third() -> None:
    explicit = GOOD.but(vek_edit=lambda part: part.replace(PSS_ALGORITHM, PSS_ALGORITHM_EXPLICIT))
    assert PSS_ALGORITHM in GOOD.vek.der
    assert PSS_ALGORITHM_EXPLICIT in explicit.vek.der
    for chain in (GOOD, explicit):
        assert verify(chain.report(), chain.certificates, chain.roots, NOW).product == "milan"
    third = GOOD.but(vek_edit=lambda part: part.replace(b"\xa2\x03\x02\x01\x30", b"\xa2\x03\x02\x01\x20"))
    assert judged(third) == "chain.vek.signature"
    mixed = GOOD.vek.der.replace(PSS_ALGORITHM, PSS_ALGORITHM[:-1] + b"\x20", 1)
    assert not Certificate.read(mixed).uses_pss


@needs_vectors
@pytest.mark.parametrize("name", REAL)
def test_amds_authorities_are_of_amds_kind(name: str) -> None:
    _, intermediate, root = real_certificates(name)
    assert (intermediate.public_key.kind, root.public_key.kind) == ("RSA-4096, e = 65537",) * 2


def revoked(crls: list[RevocationList], now: datetime = NOW, chain: OwnChain = GOOD) -> str:
    return failed_check(chain.report(), chain.certificates, chain.roots, now=now, crls=crls)


def test_a_current_list_is_asked() -> None:
    verified = verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW, crls=[GOOD.crl(5, 6)])
    made = {check.name: check.result for check in verified.checks if check.name.startswith("chain.revocation")}
    assert len(made) == 4
    assert set(made.values()) == {Result.PASSED}


def test_a_revoked_intermediate() -> None:
    """Its serial number is 7; that an old list says so is enough."""
    assert revoked([GOOD.crl(6, 7)]) == "chain.revocation.serial"
    assert revoked([GOOD.crl(7, days=1), GOOD.crl(issued=ISSUED + timedelta(days=1))]) == "chain.revocation.serial"


def test_a_list_of_another_key() -> None:
    assert revoked([GOOD.crl(signer=toy_key("ask"))]) == "chain.revocation.signature"
    beside = [GOOD.crl(7, signer=toy_key("ask")), GOOD.crl()]
    assert verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW, crls=beside)
    assert revoked([GOOD.crl(7), beside[0]]) == "chain.revocation.serial"
    silent = GOOD.but(ark_signs_lists=False)
    assert revoked([silent.crl()], chain=silent) == "chain.revocation.signature"


def test_a_list_that_is_not_current() -> None:
    assert revoked([GOOD.crl(days=1)]) == "chain.revocation.dates"
    assert revoked([GOOD.crl(issued=NOW + timedelta(days=1))]) == "chain.revocation.dates"
    newer = [GOOD.crl(days=1), GOOD.crl(issued=NOW - timedelta(days=1))]
    assert verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW, crls=newer)


def test_a_list_with_an_unknown_critical_extension() -> None:
    assert revoked([GOOD.crl(critical=True)]) == "chain.revocation.critical"


def test_lists_of_other_roots_do_not_count() -> None:
    other = replace(GOOD, product="Genoa").crl(7)
    verified = verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW, crls=[other])
    skipped = [check for check in verified.checks if check.result is Result.SKIPPED]
    assert [check.name for check in skipped] == ["chain.revocation"]
    assert repr(other).startswith("RevocationList(CN=ARK-Genoa,")
    assert repr(other).endswith(" 2025-01-01, 1 revoked)")
    assert GOOD.crl().this_update == datetime(2025, 1, 1, tzinfo=UTC)
