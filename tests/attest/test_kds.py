"""The client of the key service: addresses, what is kept, whom it asks again, and what it makes of bad answers."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snpbook.attest import kds
from snpbook.attest.kds import FetchFailed, KdsClient
from snpbook.attest.parse import Report
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import verify
from snpbook.firmware.keys import Chip, sign_report
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.policy import Tcb
from snpbook.spec.report import ATTESTATION_REPORT, SIGNED_SIZE, SigningKey
from snpbook.vendor.key_service import KeyService
from tests.attest.vectors import needs_vectors, real_report

ISSUED, NOW = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
MILAN, TURIN = PRODUCT_LINES["milan"], PRODUCT_LINES["turin"]
TCBS = {"milan": Tcb(4, 0, 24, 0xDB), "genoa": Tcb(10, 0, 23, 0x54), "turin": Tcb(1, 1, 4, 0x51, fmc=1)}
CHIPS = {name: Chip.from_seed("client", name) for name in TCBS}
CPUIDS = {"milan": (0x19, 0x01), "genoa": (0x19, 0x11), "turin": (0x1A, 0x02)}
SERVICE = KeyService(CHIPS.values(), ISSUED, lambda: NOW)
HOST = "https://kdsintf.amd.com"


class Network:
    """A fetch function that answers as it is told, then as the service does; and a clock that only counts."""

    def __init__(self, *answers: tuple[int, bytes] | OSError) -> None:
        self.answers: Iterator[tuple[int, bytes] | OSError] = iter(answers)
        self.asked: list[str] = []
        self.slept: list[float] = []

    def fetch(self, url: str) -> tuple[int, bytes]:
        self.asked.append(url)
        answer = next(self.answers, None)
        if isinstance(answer, OSError):
            raise answer
        return answer or SERVICE.fetch(url)

    def client(self, directory: Path | None = None) -> KdsClient:
        return KdsClient(self.fetch, self.slept.append, directory)


def report(product: str, version: int = 3) -> Report:
    """A genuine report of the product's chip."""
    family, model = CPUIDS[product]
    fields = {"cpuid_family": family, "cpuid_model": model} if version > 2 else {}
    chip, tcb = CHIPS[product], TCBS[product]
    signed = ATTESTATION_REPORT.pack(
        version=version, policy=0x30000, signature_algo=1, chip_id=chip.chip_id, reported_tcb=int(tcb), **fields
    )[:SIGNED_SIZE]
    r, s = sign_report(chip.vcek(tcb), signed)
    return Report.parse(signed + r + s + bytes(368))


def test_addresses_are_those_of_the_interface() -> None:
    chip = bytes(range(64))
    assert kds.vcek_url(MILAN, chip, Tcb(3, 0, 8, 115)) == (
        f"{HOST}/vcek/v1/Milan/{chip.hex()}?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115"
    )
    assert kds.vcek_url(TURIN, chip, TCBS["turin"]) == (
        f"{HOST}/vcek/v1/Turin/0001020304050607?fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=81"
    )
    assert kds.chain_url(MILAN, SigningKey.VLEK) == f"{HOST}/vlek/v1/Milan/cert_chain"
    assert kds.crl_url(MILAN, SigningKey.VCEK, "http://localhost") == "http://localhost/vcek/v1/Milan/crl"


@needs_vectors
def test_the_address_of_a_real_chip_is_known() -> None:
    parsed = Report.parse(real_report("genoa"))
    url = kds.vcek_url(PRODUCT_LINES["genoa"], parsed.fields.chip_id, parsed.tcb("reported_tcb", "genoa"))
    assert url.endswith(f"/Genoa/{parsed.raw[0x1A0:0x1E0].hex()}?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84")


@pytest.mark.parametrize("product", TCBS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_gathered_verifies_and_is_asked_for_once(product: str, in_memory: bool, tmp_path: Path) -> None:
    network, parsed = Network(), report(product)
    client = network.client(None if in_memory else tmp_path / "certs")
    for _ in range(2):
        bundle = client.gather(parsed, product)
        verified = verify(parsed.raw, bundle.certificates, named_roots("toy"), NOW, crls=bundle.crls)
        assert verified.product == product
        assert not [check for check in verified.checks if check.result == "skipped"]
    name = PRODUCT_LINES[product].name
    assert len(network.asked) == 4, "chain and VCEK once, the list twice"
    assert network.asked.count(f"{HOST}/vcek/v1/{name}/crl") == 2
    assert network.slept == []


def test_offline_a_directory_serves_all_and_nothing_else(tmp_path: Path) -> None:
    parsed = report("milan")
    fetched = Network().client(tmp_path).gather(parsed, "milan")
    offline = KdsClient(None, lambda _: pytest.fail("nobody waits offline"), tmp_path)
    assert offline.gather(parsed, "milan") == fetched
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(FetchFailed, match=r"no network, and no vcek_v1_Turin_cert_chain\.pem in"):
        offline.chain(TURIN, SigningKey.VCEK)
    with pytest.raises(FetchFailed, match="no network"):
        KdsClient(None, lambda _: None).chain(MILAN, SigningKey.VCEK)


def test_failures_that_may_pass_are_tried_again_ever_later() -> None:
    network = Network((429, b""), (500, b""), OSError("no route"), (503, b""))
    assert network.client().chain(MILAN, SigningKey.VCEK) == SERVICE.fetch("/vcek/v1/Milan/cert_chain")[1]
    assert network.slept == [1, 2, 4, 8]


@pytest.mark.parametrize("failure", [(429, b"Slow down"), (500, b""), OSError("no route")])
def test_patience_ends(failure: tuple[int, bytes] | OSError) -> None:
    network = Network(*[failure] * 100)
    with pytest.raises(FetchFailed, match=r"answered 429 \(Slow down\)|answered 500|no connection: no route") as caught:
        network.client().chain(MILAN, SigningKey.VCEK)
    assert sum(network.slept) == 121
    assert caught.value.status == (None if isinstance(failure, OSError) else failure[0])


@pytest.mark.parametrize("status", [400, 401, 404, 414, 302])
def test_other_failures_are_final(status: int) -> None:
    network = Network((status, b"No\xff such chip\n"))
    with pytest.raises(FetchFailed, match=f"answered {status}") as caught:
        network.client().vcek(MILAN, CHIPS["milan"].chip_id, TCBS["milan"])
    assert caught.value.status == status
    assert network.slept == []


@pytest.mark.parametrize(
    "body", [b"", b"<html>log in first</html>", b"-----BEGIN CERTIFICATE-----\n!", b"\x30\x82\x05"]
)
def test_an_answer_that_is_no_certificate_is_not_kept(body: bytes, tmp_path: Path) -> None:
    network = Network((200, body))
    client = network.client(tmp_path)
    with pytest.raises(FetchFailed, match="no certificate"):
        client.chain(MILAN, SigningKey.VCEK)
    assert list(tmp_path.iterdir()) == []
    assert client.chain(MILAN, SigningKey.VCEK)


def test_a_masked_chip_is_not_asked_for() -> None:
    network = Network()
    with pytest.raises(FetchFailed, match="masks"):
        network.client().vcek(MILAN, bytes(64), TCBS["milan"])
    assert network.asked == []


def test_an_unknown_chip_is_the_services_404() -> None:
    with pytest.raises(FetchFailed, match="answered 404") as caught:
        Network().client().vcek(MILAN, bytes([1]) * 64, TCBS["milan"])
    assert caught.value.status == 404
