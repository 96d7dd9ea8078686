"""Certificates from files: PEM, DER, what is broken outside and what is broken inside."""

import warnings
from base64 import b64encode
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.bundle import load_certificates
from snpbook.attest.certs import Certificate
from snpbook.attest.chain import authority_fault
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.roots import ROOT_SETS, named_roots, own_roots
from tests.attest.own_chain import OwnChain
from tests.attest.vectors import REAL, VECTORS, needs_vectors, vcek_file

CHAIN = OwnChain()
INTERMEDIATES = {
    "milan": "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b",
    "genoa": "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521",
    "turin": "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185",
    "milan_vlek": "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5",
    "genoa_vlek": "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372",
    "turin_vlek": "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c",
}
"""SHA-256 of AMD's published intermediates; those of the roots are `data/roots/amd.toml`."""


def pem(der: bytes, label: str = "CERTIFICATE") -> bytes:
    return f"-----BEGIN {label}-----\n{b64encode(der).decode()}\n-----END {label}-----\n".encode()


@needs_vectors
@pytest.mark.parametrize("name", INTERMEDIATES)
def test_amds_chains_have_the_published_fingerprints(name: str) -> None:
    intermediate, root = load_certificates((VECTORS / "chains" / f"{name}.pem").read_bytes())
    assert intermediate.fingerprint == INTERMEDIATES[name]
    assert root.fingerprint in named_roots("amd").fingerprints
    assert root.signed_by(root)
    assert intermediate.signed_by(root)
    assert not root.signed_by(intermediate)
    assert intermediate.has_ca_key
    assert (authority_fault(root, 1), authority_fault(intermediate, 0)) == ("", "")
    assert authority_fault(intermediate, 1) == "a path of at most 0"


@needs_vectors
@pytest.mark.parametrize("name", REAL)
def test_serial_number_zero_is_read_in_silence(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_certificates(vcek_file(name).read_bytes())[0].common_name == "SEV-VCEK"


def test_pem_and_der_are_the_same_certificate() -> None:
    ders = [certificate.der for certificate in CHAIN.certificates]
    text = b"a comment\n" + b"\r\n".join(map(pem, ders)) + pem(b"not looked at", "PRIVATE KEY")
    assert load_certificates(text) == CHAIN.certificates
    assert load_certificates(ders[0]) == [CHAIN.vek]
    assert load_certificates(b"".join(ders)) == CHAIN.certificates
    for joined in (ders[0] + pem(ders[1]) + pem(ders[2]), pem(ders[0]) + b"".join(ders[1:])):
        assert load_certificates(joined) == CHAIN.certificates
    assert repr(CHAIN.vek) == f"Certificate(SEV-VCEK, sha256 {sha256(ders[0]).hexdigest()[:16]})"


DER = CHAIN.ask.der


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0",
        b"no certificate at all",
        DER[:-1],
        DER + b"\0",
        b"\x31" + DER[1:],
        DER[:2] + b"\xff" + DER[3:],
        b"\x30\x80" + DER + b"\0\0",
        pem(DER)[:-30],
        pem(DER, "PRIVATE KEY"),
        pem(DER).replace(b"\n", b"\n*", 1),
        pem(DER)[:100] + b"A" + pem(DER)[100:],
        pem(DER[:-1]),
        pem(b""),
        DER[:-1] + pem(DER),
        pem(DER) + DER[:-1],
    ],
)
def test_a_broken_outer_form_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        load_certificates(data)


@pytest.mark.parametrize("der", [b"\x30\x00", b"\x30\x03\x02\x01\x00", DER[:4] + bytes(len(DER) - 4)])
def test_a_well_formed_outside_with_anything_inside_is_not_genuine(der: bytes) -> None:
    for data in (der, pem(der)):
        with pytest.raises(NotGenuine) as refusal:
            load_certificates(data)
        assert refusal.value.check == "certificates.decode"


@given(offset=st.integers(0, len(DER) - 1), mask=st.integers(1, 255))
def test_a_damaged_certificate_raises_nothing_else(offset: int, mask: int) -> None:
    damaged = bytearray(DER)
    damaged[offset] ^= mask
    try:
        certificate = Certificate.read(bytes(damaged))
    except (MalformedEvidence, NotGenuine):
        return
    assert not (certificate.signed_by(CHAIN.ark) and certificate.tbs != CHAIN.ask.tbs)
    assert isinstance(authority_fault(certificate, 0), str)


@given(st.binary(max_size=300))
def test_noise_raises_nothing_else(data: bytes) -> None:
    for form in (data, b"\x30" + bytes([len(data) % 128]) + data[: len(data) % 128], pem(data)):
        with pytest.raises((MalformedEvidence, NotGenuine)):
            load_certificates(form)


def test_root_sets() -> None:
    amd, toy = map(named_roots, ROOT_SETS)
    assert not amd.fingerprints & toy.fingerprints
    assert len(amd.fingerprints) == len(toy.fingerprints) == 3
    assert repr(toy) == "Roots(toy, 3 pinned)"
    with pytest.raises(ValueError, match="one of amd, toy"):
        named_roots("mine")
    with pytest.raises(MalformedEvidence, match="its own issuer"):
        own_roots("mine", [CHAIN.vek, CHAIN.ask])
