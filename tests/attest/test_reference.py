"""The verifier and a check from scratch agree: real evidence, Turin and VLEK chains of our own, and damaged forms."""

import random

import pytest

from snpbook.attest.certs import Certificate
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.roots import Roots, named_roots
from snpbook.attest.verify import verify
from tests.attest.own_chain import CHIP_ID, OwnChain, milan_extensions, text, turin_extensions
from tests.attest.vectors import NOW, REAL, needs_vectors, real_certificates, real_report
from tests.reference import attestation
from tests.sampling import sampled

VLEK = {**milan_extensions(), "2": text("Milan"), "5": text("CN=cloud.example")}
del VLEK["4"]
TURIN = {
    "version": 5, "cpuid_family": 0x1A, "cpuid_model": 2, "reported_tcb": 0x5100000004030201,
    "chip_id": CHIP_ID[:8] + bytes(56), "launch_mit_vector": 0x3F,
}  # fmt: skip
OWN = {
    "milan": (OwnChain(), {}),
    "turin": (OwnChain(product="Turin", extensions=turin_extensions()), TURIN),
    "vlek": (OwnChain(extensions=VLEK, vek_name="SEV-VLEK", ask_name="SEV-VLEK-Milan"), {"signing_key": 1}),
}


def reference(report: bytes, ders: list[bytes], roots: Roots) -> str | None:
    try:
        return attestation.check(report, *ders, set(roots.fingerprints), NOW)
    except attestation.Bad:
        return None


def library(report: bytes, ders: list[bytes], roots: Roots) -> str | None:
    try:
        return verify(report, [Certificate.read(der) for der in ders], roots, NOW).product
    except (NotGenuine, MalformedEvidence):
        return None


@needs_vectors
@pytest.mark.parametrize("name", REAL)
def test_real_evidence(name: str) -> None:
    ders = [certificate.der for certificate in real_certificates(name)]
    arguments = real_report(name), ders, named_roots("amd")
    assert reference(*arguments) == library(*arguments) == name.split("-")[0]
    assert reference(*arguments[:2], named_roots("toy")) is None


@pytest.mark.parametrize("name", OWN)
def test_products_and_providers_without_public_reports(name: str) -> None:
    chain, fields = OWN[name]
    ders = [certificate.der for certificate in chain.certificates]
    for changed in ({}, {"signing_key": 7}, {"policy": 0x10000}, {"version": 6}, {"reported_tcb": 1}):
        report = chain.report(**{**fields, **changed})
        expected = chain.product.lower() if not changed else None
        assert reference(report, ders, chain.roots) == library(report, ders, chain.roots) == expected


@pytest.mark.parametrize("seed", sampled(range(400), 24))
def test_damaged_evidence(seed: int) -> None:
    """A flipped bit of the report, the VEK or the intermediate is judged alike."""
    random_source = random.Random(seed)
    chain, fields = OWN[random_source.choice(sorted(OWN))]
    parts = [chain.report(**fields), *(certificate.der for certificate in chain.certificates)]
    which = random_source.choice([0, 0, 1, 2])
    damaged = bytearray(parts[which])
    damaged[random_source.randrange(len(damaged))] ^= 1 << random_source.randrange(8)
    parts[which] = bytes(damaged)
    assert reference(parts[0], parts[1:], chain.roots) == library(parts[0], parts[1:], chain.roots)
