"""The KDS's answers, without a socket: every path, every parameter rule, each refusal with its status."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import example, given
from hypothesis import strategies as st

from snpbook.firmware.keys import Chip, attestation_key
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.policy import Tcb
from snpbook.vendor.ca import AmdCa
from snpbook.vendor.key_service import CRL_LIFETIME, KeyService
from snpbook.vendor.sev_ca import SevCa
from snpbook.vendor.vlek import provider_sticks
from tests.vendor.test_ca import parsed

CHAINS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "chains"
ISSUED, NOW = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
SNP = ("Milan", "Genoa", "Turin")
CHIPS = {name: Chip.from_seed("chip", name.lower()) for name in (*SNP, "Naples", "Rome")}
TCBS = {"Milan": Tcb(4, 0, 24, 0xDB), "Genoa": Tcb(10, 0, 23, 0x54), "Turin": Tcb(1, 1, 4, 0x51, fmc=1)}
FULL = "blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
TURIN = "fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=81"
QUERIES = {"Milan": FULL, "Genoa": "blSPL=10&teeSPL=0&snpSPL=23&ucodeSPL=84", "Turin": TURIN}
HWIDS = {name: CHIPS[name].chip_id[: 8 if name == "Turin" else 64].hex() for name in SNP}
MILAN = f"/vcek/v1/Milan/{HWIDS['Milan']}"
CSP = "CN=cc-us-east-2.amazonaws.com"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def service(**options: object) -> KeyService:
    return KeyService(CHIPS.values(), ISSUED, Clock(), **options)  # type: ignore[arg-type]


KDS = service(published={"milan": TCBS["Milan"]}, providers={"secret": CSP})


def status(target: str, authorization: str = "") -> int:
    answer = KDS.answer(target, "client", authorization)
    if answer.status != 200:
        assert answer.media_type.startswith("text/plain")
        assert answer.body.startswith(answer.status.phrase.encode())
        assert len(answer.body) < 200
    return answer.status


@pytest.mark.parametrize("product", SNP)
def test_a_vcek_is_that_of_the_authority(product: str) -> None:
    answer = KDS.answer(f"/vcek/v1/{product}/{HWIDS[product]}?{QUERIES[product]}")
    assert (answer.status, answer.media_type) == (200, "application/pkix-cert")
    ca = AmdCa(product.lower())
    assert answer.body == ca.provision(CHIPS[product], TCBS[product], ISSUED)
    parsed(answer.body).verify_directly_issued_by(parsed(ca.ask.der))
    assert answer == service().answer(f"/vcek/v1/{product}/{HWIDS[product]}?{QUERIES[product]}"), "of another service"


def test_numbers_are_padded_or_not_and_parameters_in_any_order() -> None:
    same = [
        "blSPL=4&teeSPL=0&snpSPL=24&ucodeSPL=219",
        "ucodeSPL=219&snpSPL=024&teeSPL=000&blSPL=004",
        "%62lSPL=04" + FULL[8:],
    ]
    assert {KDS.answer(f"{MILAN}?{query}") for query in same} == {KDS.answer(f"{MILAN}?{FULL}")}
    assert KDS.answer(f"{MILAN}?{FULL}").status == 200


@pytest.mark.parametrize("product", SNP)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_a_chain_is_as_long_as_amds(product: str, kind: str) -> None:
    answer = KDS.answer(f"/{kind}/v1/{product}/cert_chain")
    assert (answer.status, answer.media_type) == (200, "application/x-pem-file")
    assert len(answer.body) == {"vcek": (4602, 4676), "vlek": (4611, 4688)}[kind][product == "Turin"]
    names = [c.subject.rfc4514_string().split(",")[0] for c in x509.load_pem_x509_certificates(answer.body)]
    assert names == [f"CN=SEV-{'VLEK-' * (kind == 'vlek')}{product}", f"CN=ARK-{product}"]


@pytest.mark.skipif(not CHAINS.is_dir(), reason="needs the real chains in ../shared/vectors")
@pytest.mark.parametrize("product", SNP)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_a_chain_has_the_armour_of_amds(product: str, kind: str) -> None:
    real = (CHAINS / f"{product.lower()}{'_vlek' * (kind == 'vlek')}.pem").read_bytes()
    ours = KDS.answer(f"/{kind}/v1/{product}/cert_chain").body
    assert [len(line) for line in ours.splitlines(keepends=True)] == [
        len(line) for line in real.splitlines(keepends=True)
    ]
    assert [i for i, c in enumerate(ours) if c in b"\r\n-"] == [i for i, c in enumerate(real) if c in b"\r\n-"]


@pytest.mark.parametrize("product", SNP)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_a_revocation_list_is_of_the_day_and_signed_by_the_root(product: str, kind: str) -> None:
    answer = KDS.answer(f"/{kind}/v1/{product}/crl")
    assert (answer.status, answer.media_type) == (200, "application/pkix-crl")
    crl, root = x509.load_der_x509_crl(answer.body), parsed(AmdCa(product.lower()).ark.der)
    assert crl.issuer == root.subject
    key = root.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    key.verify(crl.signature, crl.tbs_certlist_bytes, pss, hashes.SHA384())
    with pytest.raises(InvalidSignature):
        key.verify(crl.signature, crl.tbs_certlist_bytes + b"\0", pss, hashes.SHA384())
    assert crl.last_update_utc <= NOW < crl.next_update_utc == crl.last_update_utc + CRL_LIFETIME
    assert len(crl) == 0
    assert answer == KDS.answer(f"/{kind}/v1/{product}/crl")


def test_a_revocation_list_names_what_is_revoked() -> None:
    ca = AmdCa("milan")
    crl = x509.load_der_x509_crl(ca.crl(ISSUED, NOW, [0x10001]))
    assert [(entry.serial_number, entry.revocation_date_utc) for entry in crl] == [(0x10001, ISSUED)]
    assert ca.crl(ISSUED, NOW) == ca.crl(ISSUED, NOW)


def test_a_vlek_is_for_its_provider() -> None:
    target = f"/vlek/v1/Milan/cert?{FULL}"
    assert [status(target, header) for header in ("", "Bearer other", "secret", "Bearer s\xe9cret")] == [401] * 4
    answer = KDS.answer(target, authorization="Bearer secret")
    assert answer.status == 200
    certificate = parsed(answer.body)
    certificate.verify_directly_issued_by(parsed(AmdCa("milan").asvk.der))
    assert CSP.encode() in answer.body
    sticks = provider_sticks(CSP, TCBS["Milan"])  # what the provider's machines load with SNP_VLEK_LOAD
    assert certificate.public_key() == attestation_key(sticks[7], VLEK_LABEL).public_key()
    assert answer.body != service(providers={"secret": "CN=other"}).answer(target, authorization="Bearer secret").body


@pytest.mark.parametrize("product", ["Naples", "Rome", "Milan", "Genoa"])
def test_a_cek_is_the_chips_signed_by_the_ask(product: str) -> None:
    answer = KDS.answer(f"/cek/id/{CHIPS[product].chip_id.hex()}")
    assert (answer.status, answer.media_type, len(answer.body)) == (200, "application/octet-stream", 2084)
    point = CHIPS[product].cek.public_key().public_numbers()
    assert answer.body[0x14:0x44] == point.x.to_bytes(48, "little")
    assert answer.body == SevCa(product.lower()).sign_cek(answer.body)


NEWER = {"blSPL": "blSPL=05" + FULL[8:], "ucodeSPL": FULL[:-3] + "220"}
REFUSED = {
    # Malformed ids and parameters.
    f"/vcek/v1/Milan/{HWIDS['Milan'].upper()}?{FULL}": 400,
    f"{MILAN[:-1]}?{FULL}": 400,
    f"{MILAN}0?{FULL}": 400,
    f"{MILAN[:-1]}g?{FULL}": 400,
    f"/vcek/v1/Milan/?{FULL}": 400,
    f"/vcek/v1/Milan/{'0' * 16}?{FULL}": 400,
    f"/vcek/v1/Turin/{'0' * 17}?{TURIN}": 400,
    "/cek/id/": 400,
    "/cek/id/xyz": 400,
    MILAN: 400,
    f"{MILAN}?": 400,
    f"{MILAN}?blSPL=04&teeSPL=00&snpSPL=24": 400,
    f"{MILAN}?{FULL}&fmcSPL=01": 400,
    f"{MILAN}?{FULL}&blSPL=04": 400,
    f"{MILAN}?{FULL}&": 400,
    f"{MILAN}?{FULL.replace('bl', 'BL')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=-4')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=0x4')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=%D9%A4')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=128')}": 400,
    f"{MILAN}?{FULL.replace('=219', '=256')}": 400,
    f"{MILAN}?{FULL.replace('=04', '=0004')}": 400,
    f"{MILAN}?{FULL.replace('&', ';')}": 400,
    f"/vcek/v1/Turin/{HWIDS['Turin']}?{FULL}": 400,
    # Chips, TCBs, products and paths that nobody knows.
    f"/vcek/v1/Milan/{'0' * 128}?{FULL}": 404,
    f"/vcek/v1/Genoa/{HWIDS['Milan']}?{FULL}": 404,
    f"/vcek/v1/Turin/{HWIDS['Turin'].ljust(128, '0')}?{TURIN}": 404,
    f"{MILAN}?{NEWER['blSPL']}": 404,
    f"{MILAN}?{NEWER['ucodeSPL']}": 404,
    f"/vcek/v1/milan/{HWIDS['Milan']}?{FULL}": 404,
    f"/vcek/v1/Naples/{HWIDS['Milan']}?{FULL}": 404,
    f"/vcek/v2/Milan/{HWIDS['Milan']}?{FULL}": 404,
    f"/cek/id/{'0' * 128}": 404,
    f"/cek/id/{CHIPS['Turin'].chip_id.hex()}": 404,
    "/vlek/v1/Milan/other": 404,
    "/vcek/v1/Milan/crl/": 404,
    "/vcek/v1/Rome/cert_chain": 404,
    "/vcek/v1/cert_chain": 404,
    "": 404,
    "/": 404,
    "*": 404,
    "http://[": 404,
    "/../../etc/passwd": 404,
    "/vcek/v1/Milan/../Genoa/crl": 404,
    "//vcek/v1/Milan/crl": 404,
    "/vcek/v1/Milan%2Fcrl": 404,
    "/vcek/v1/Milan/crl\n": 400,
    # Too long.
    f"{MILAN}?{FULL}&{'a=1&' * 4000}": 414,
    "/" + "a" * 8000: 414,
}


@pytest.mark.parametrize(("target", "expected"), REFUSED.items(), ids=lambda value: str(value)[:40])
def test_each_refusal_has_its_status(target: str, expected: int) -> None:
    assert status(target) == expected


def test_older_tcbs_have_certificates_too() -> None:
    older = {KDS.answer(f"{MILAN}?{FULL.replace('=219', f'={ucode}')}") for ucode in (0, 218, 219)}
    assert [answer.status for answer in older] == [200] * 3
    assert service().answer(f"{MILAN}?{NEWER['blSPL']}").status == 200, "nothing is said of Milan's newest"


def test_a_host_may_stand_before_the_path() -> None:
    answer = KDS.answer("/vcek/v1/Milan/crl")
    assert KDS.answer("https://kdsintf.amd.com/vcek/v1/Milan/crl") == answer
    assert KDS.fetch("http://127.0.0.1:1/vcek/v1/Milan/crl") == (200, answer.body)


def test_who_asks_too_often_waits_for_the_next_minute() -> None:
    clock = Clock()
    kds = KeyService([], ISSUED, clock, throttle=3)

    def ask(client: str) -> int:
        return kds.answer("/vcek/v1/Milan/cert_chain", client).status

    assert [ask("a") for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask("b") == 200, "others are served"
    clock.now += timedelta(seconds=52)
    assert ask("a") == 429
    clock.now += timedelta(seconds=1)
    assert ask("a") == 200


@given(st.text(max_size=300) | st.builds(lambda tail: f"{MILAN}?{tail}", st.text(max_size=60)))
@example(f"{MILAN}?{'%' * 100}")
def test_anything_may_be_asked(target: str) -> None:
    assert status(target) in (400, 404)


def test_chain_bodies_are_the_authoritys_certificates() -> None:
    ca = AmdCa("turin")
    blocks = KDS.answer("/vlek/v1/Turin/cert_chain").body.split(b"-----BEGIN CERTIFICATE-----")[1:]
    assert [base64.b64decode(block.split(b"-----END")[0]) for block in blocks] == [ca.asvk.der, ca.ark.der]
