"""The toy authority: what it issues verifies, is reproducible, and bad arguments are refused by name."""

import shutil
import subprocess
import tomllib
import warnings
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.utils import CryptographyDeprecationWarning

from snpbook.firmware.keys import Chip, attestation_key
from snpbook.spec.certificates import PRODUCT_LINES, TRAILER_OMITTED_FROM
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.policy import Tcb
from snpbook.spec.resources import resource
from snpbook.tools import toy_roots
from snpbook.vendor import pss
from snpbook.vendor.ca import AmdCa
from snpbook.vendor.sev_ca import SevCa

OLD = datetime(2023, 6, 3, 19, 23, 43, tzinfo=UTC)
NEW = datetime(2025, 4, 3, 19, 23, 43, tzinfo=UTC)
MILAN, TURIN = Tcb(4, 0, 24, 0xDB), Tcb(1, 1, 4, 0x51, fmc=1)
VLEK_KEY = attestation_key(bytes(48), VLEK_LABEL).public_key()
VCEK_OF_SEED_A = "6f8e4ad39b3d8ad62e56810b15d7af76583cc8e1d7d45cdea8c6b32a9ecc415f"


def tcb_of(product: str) -> Tcb:
    return TURIN if product == "turin" else MILAN


def parsed(der: bytes) -> x509.Certificate:
    """A certificate with AMD's serial number 0, which the library's parser warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Parsed a serial number", CryptographyDeprecationWarning)
        return x509.load_der_x509_certificate(der)


def issued_by(ca: AmdCa, kind: str, issued: datetime) -> bytes:
    if kind == "vcek":
        return ca.provision(Chip.from_seed("verify", ca.product), tcb_of(ca.product), issued)
    return ca.issue_vlek("CN=csp.example", tcb_of(ca.product), VLEK_KEY, issued)


@pytest.mark.parametrize("product", PRODUCT_LINES)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("issued", [OLD, NEW])
def test_the_library_accepts_the_chain(product: str, kind: str, issued: datetime) -> None:
    ca = AmdCa(product)
    intermediate = x509.load_der_x509_certificate((ca.ask if kind == "vcek" else ca.asvk).der)
    root = x509.load_der_x509_certificate(ca.ark.der)
    vek = parsed(issued_by(ca, kind, issued))
    for certificate, issuer in ((vek, intermediate), (intermediate, root), (root, root)):
        certificate.verify_directly_issued_by(issuer)
        assert certificate.signature_algorithm_parameters._salt_length == 48
    with pytest.raises((ValueError, InvalidSignature)):
        vek.verify_directly_issued_by(root)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize("product", PRODUCT_LINES)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("issued", [OLD, NEW])
def test_openssl_accepts_the_chain(product: str, kind: str, issued: datetime, tmp_path: Path) -> None:
    ca, other = AmdCa(product), AmdCa("genoa" if product == "milan" else "milan")
    intermediate = ca.ask if kind == "vcek" else ca.asvk
    (tmp_path / "vek.der").write_bytes(issued_by(ca, kind, issued))
    (tmp_path / "intermediate.pem").write_text(intermediate.pem)
    (tmp_path / "root.pem").write_text(ca.ark.pem)
    (tmp_path / "other.pem").write_text(other.ark.pem)

    def verify(root: str) -> int:
        moment = str(int(issued.timestamp()) + 1)
        command = ["openssl", "verify", "-attime", moment, "-CAfile", root]
        certificates = ["-untrusted", "intermediate.pem", "vek.der"]
        return subprocess.run([*command, *certificates], cwd=tmp_path, capture_output=True).returncode

    assert verify("root.pem") == 0
    assert verify("other.pem") != 0


def test_same_content_same_bytes() -> None:
    chip = Chip.from_seed("a", "milan")
    first = AmdCa("milan").provision(chip, MILAN, NEW)
    assert first == AmdCa("milan").provision(chip, MILAN, NEW)
    assert first == AmdCa("milan").issue_vcek(chip.chip_id, MILAN, chip.vcek(MILAN).public_key(), NEW)
    others = [
        AmdCa("milan").provision(Chip.from_seed("b", "milan"), MILAN, NEW),
        AmdCa("milan").provision(chip, Tcb(4, 0, 24, 0xDA), NEW),
        AmdCa("milan").provision(chip, MILAN, OLD),
    ]
    assert len({first, *others}) == 4
    # Pinned: evidence that people keep must stay reproducible from its seed.
    assert sha256(first).hexdigest() == VCEK_OF_SEED_A


def test_pss_signs_for_the_library_and_for_nothing_else() -> None:
    key = AmdCa("genoa").ask.key
    signature = pss.sign(key, b"message")
    assert signature == pss.sign(key, b"message")
    assert signature != pss.sign(key, b"massage")
    profile = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    key.public_key().verify(signature, b"message", profile, hashes.SHA384())
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, b"massage", profile, hashes.SHA384())


@pytest.mark.parametrize("product", PRODUCT_LINES)
def test_pins_name_the_roots_and_nothing_of_amds(product: str) -> None:
    pins = tomllib.loads(resource("data", "roots", "toy.toml").read_text())
    ca = AmdCa(product)
    assert pins[product] == ca.ark.fingerprint == sha256(ca.ark.der).hexdigest()
    assert list(pins) == list(PRODUCT_LINES)


def test_chain_is_ask_then_ark() -> None:
    ca = AmdCa("milan")
    names = [c.subject.rfc4514_string() for c in x509.load_pem_x509_certificates(ca.chain_pem().encode())]
    assert [name.split(",")[0] for name in names] == ["CN=SEV-Milan", "CN=ARK-Milan"]
    assert len(ca.chain_pem()) == 4602


def test_every_repr_says_toy() -> None:
    ca = AmdCa("turin")
    assert all("toy" in repr(value) for value in (ca, ca.ark, ca.ask, ca.asvk, SevCa("turin")))
    assert all(path.name.startswith("toy_") for path in resource("data", "roots", "toy").iterdir())


def test_the_maker_changes_nothing_while_the_keys_are_there(tmp_path: Path) -> None:
    source = resource("data", "roots")
    (tmp_path / "toy").mkdir()
    for path in (source / "toy").glob("*.key.pem"):
        shutil.copy(path, tmp_path / "toy")
    toy_roots.make(tmp_path)
    for path in [source / "toy.toml", source / "toy_sev.toml", *(source / "toy").iterdir()]:
        assert (tmp_path / path.relative_to(source)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("product", "argument", "change"),
    [
        ("milan", "chip_id", {"chip_id": bytes(63)}),
        ("milan", "chip_id", {"chip_id": bytes(65)}),
        ("turin", "chip_id", {"chip_id": bytes(8)}),
        ("turin", "chip_id", {"chip_id": bytes(8) + b"\1" + bytes(55)}),
        ("milan", "tcb: bootloader", {"tcb": Tcb(bootloader=128)}),
        ("milan", "tcb: tee", {"tcb": Tcb(tee=-1)}),
        ("milan", "tcb: snp", {"tcb": Tcb(snp=128)}),
        ("milan", "tcb: microcode", {"tcb": Tcb(microcode=256)}),
        ("milan", "tcb: Milan has no fmc", {"tcb": Tcb(fmc=0)}),
        ("turin", "tcb: Turin has an fmc", {"tcb": Tcb()}),
        ("turin", "tcb: fmc", {"tcb": Tcb(fmc=128)}),
        ("genoa", "public_key", {"public_key": ec.derive_private_key(1, ec.SECP256R1()).public_key()}),
        ("genoa", "issued", {"issued": NEW.replace(tzinfo=None)}),
    ],
)
def test_bad_arguments_of_a_vcek_are_named(product: str, argument: str, change: dict[str, object]) -> None:
    good = {"chip_id": bytes(64), "tcb": tcb_of(product), "public_key": VLEK_KEY, "issued": NEW}
    with pytest.raises(ValueError, match=f"^{argument}"):
        AmdCa(product).issue_vcek(**good | change)


def test_other_bad_arguments_are_named() -> None:
    ca = AmdCa("milan")
    for csp_id in ("", "CN=Zürich"):
        with pytest.raises(ValueError, match="csp_id: "):
            ca.issue_vlek(csp_id, MILAN, VLEK_KEY, NEW)
    with pytest.raises(ValueError, match="chip: "):
        ca.provision(Chip.from_seed("a", "genoa"), MILAN, NEW)
    with pytest.raises(ValueError, match="tcb: snp"):
        ca.provision(Chip.from_seed("a", "milan"), Tcb(snp=300), NEW)
    with pytest.raises(ValueError, match="'rome'"):
        AmdCa("rome")


def test_today_is_after_the_change_of_form() -> None:
    assert OLD.date() < TRAILER_OMITTED_FROM < NEW.date()
