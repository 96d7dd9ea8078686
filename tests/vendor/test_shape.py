"""Certificates have the exact shape of AMD's: real ones, with only keys and signatures exchanged, are our bytes."""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snpbook.firmware.keys import Chip, attestation_key
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.policy import Tcb
from snpbook.spec.products import snp_product_names
from snpbook.vendor.ca import AmdCa, ToyAuthority

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
real_data = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs the real certificates in ../shared/vectors")

OLD = datetime(2023, 6, 3, 19, 23, 43, tzinfo=UTC)
NEW = datetime(2025, 4, 3, 19, 23, 43, tzinfo=UTC)
SIGNATURE = 512


def ders(path: Path) -> list[bytes]:
    """The certificates of a PEM file, or of a DER file."""
    if path.suffix == ".der":
        return [path.read_bytes()]
    blocks = path.read_text().split("-----BEGIN CERTIFICATE-----")[1:]
    return [base64.b64decode(block.split("-----END")[0]) for block in blocks]


def modulus(key: rsa.RSAPublicKey) -> bytes:
    return key.public_numbers().n.to_bytes(512, "big")


@dataclass
class Der:
    """One element of a DER encoding, read by plain arithmetic."""

    tag: int
    content: bytes
    whole: bytes

    @classmethod
    def read(cls, data: bytes) -> "Der":
        size, start = data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        return cls(data[0], data[start : start + size], data[: start + size])

    def __iter__(self):
        rest = self.content
        while rest:
            element = Der.read(rest)
            yield element
            rest = rest[len(element.whole) :]

    def __getitem__(self, index: int) -> "Der":
        return list(self)[index]


def tbs(certificate: bytes) -> Der:
    return Der.read(certificate)[0]


@real_data
@pytest.mark.parametrize("name", PRODUCT_LINES)
@pytest.mark.parametrize("role", ["ark", "ask", "asvk"])
def test_real_ca_certificate_with_our_keys_is_ours(name: str, role: str) -> None:
    (ask, ark), (asvk, _) = ders(VECTORS / "chains" / f"{name}.pem"), ders(VECTORS / "chains" / f"{name}_vlek.pem")
    real = {"ark": ark, "ask": ask, "asvk": asvk}[role]
    ca = AmdCa(name)
    ours: ToyAuthority = getattr(ca, role)

    def of_real(certificate: bytes, *path: int) -> bytes:
        element = tbs(certificate)
        for index in path:
            element = element[index]
        return element.content

    def key_id(certificate: bytes, position: int) -> bytes:
        return of_real(certificate, 7, 0, position, 1)[2:]

    mended = real[:-SIGNATURE] + ours.der[-SIGNATURE:]
    spki, ark_key_id = of_real(real, 6, 1), key_id(ark, 1)
    for old, new in [
        (spki, tbs(ours.der)[6][1].content),
        (ark_key_id, key_id(ca.ark.der, 1)),
        (key_id(real, 1 if role == "ark" else 0), key_id(ours.der, 1 if role == "ark" else 0)),
    ]:
        mended = mended.replace(old, new)
    assert mended == ours.der
    assert modulus(ours.key.public_key()) in ours.der


@real_data
@pytest.mark.parametrize(
    ("name", "file", "tcb", "issued"),
    [
        ("milan", "milan_v2_vcek.der", Tcb(3, 0, 8, 0x73), datetime(2023, 4, 3, 19, 23, 43, tzinfo=UTC)),
        ("milan", "milan_v2_debug_vcek.der", Tcb(2, 0, 5, 0x44), datetime(2022, 9, 24, 0, 55, 28, tzinfo=UTC)),
        ("genoa", "genoa_v3_vcek.pem", Tcb(10, 0, 23, 0x54), datetime(2026, 2, 5, 2, 5, 7, tzinfo=UTC)),
    ],
)
def test_real_vcek_signed_part_is_ours(name: str, file: str, tcb: Tcb, issued: datetime) -> None:
    (real,) = ders(VECTORS / "reports" / file)
    point = tbs(real)[6][1].content[1:]
    public_key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    chip_id = list(tbs(real)[7][0])[-1][1].content
    ours = AmdCa(name).issue_vcek(chip_id, tcb, public_key, issued)
    assert ours[:-SIGNATURE] == real[:-SIGNATURE]
    assert ours[-SIGNATURE:] != real[-SIGNATURE:]


@pytest.mark.parametrize(
    ("name", "tcb", "issued", "size"),
    [
        ("milan", Tcb(4, 0, 24, 0x73), OLD, 1360),
        ("milan", Tcb(4, 0, 24, 0xDB), OLD, 1361),
        ("milan", Tcb(4, 0, 24, 0xDB), NEW, 1351),
        ("genoa", Tcb(10, 0, 23, 0x54), OLD, 1357),
        ("genoa", Tcb(10, 0, 23, 0x54), NEW, 1347),
        ("turin", Tcb(1, 1, 4, 0x51, fmc=1), NEW, 1289),
    ],
)
def test_vcek_size(name: str, tcb: Tcb, issued: datetime, size: int) -> None:
    assert len(AmdCa(name).provision(Chip.from_seed("sizes", name), tcb, issued)) == size


@pytest.mark.parametrize(("microcode", "issued", "size"), [(0x73, OLD, 1328), (0xD9, NEW, 1319)])
def test_vlek_size(microcode: int, issued: datetime, size: int) -> None:
    key = attestation_key(bytes(48), VLEK_LABEL).public_key()
    csp_id = "CN=cc-us-east-2.amazonaws.com"
    assert len(AmdCa("milan").issue_vlek(csp_id, Tcb(3, 0, 20, microcode), key, issued)) == size


def extensions(certificate: bytes) -> list[tuple[str, str]]:
    """Extension identifiers below AMD's arc, and values, as hex; none may be marked critical."""
    found = []
    for extension in tbs(certificate)[7][0]:
        oid, value = extension
        assert oid.content.hex().startswith("2b060104019c78")
        found.append((oid.content.hex()[14:], value.content.hex()))
    return found


def test_turin_extensions() -> None:
    chip = Chip.from_seed("shape", "turin")
    assert extensions(AmdCa("turin").provision(chip, Tcb(2, 3, 4, 0x80, fmc=1), NEW)) == [
        ("0101", "020101"),
        ("0102", "1605" + b"Turin".hex()),
        ("010309", "020101"),
        ("010301", "020102"),
        ("010302", "020103"),
        ("010303", "020104"),
        ("010305", "020100"),
        ("010306", "020100"),
        ("010307", "020100"),
        ("010308", "02020080"),
        ("0104", chip.chip_id[:8].hex()),
    ]


def test_vlek_extensions() -> None:
    key = attestation_key(bytes(48), VLEK_LABEL).public_key()
    assert extensions(AmdCa("genoa").issue_vlek("CN=csp", Tcb(2, 3, 127, 0x7F), key, NEW)) == [
        ("0101", "020100"),
        ("0102", "1605" + b"Genoa".hex()),
        ("010301", "020102"),
        ("010302", "020103"),
        ("010304", "020100"),
        ("010305", "020100"),
        ("010306", "020100"),
        ("010307", "020100"),
        ("010303", "02017f"),
        ("010308", "02017f"),
        ("0105", "1606" + b"CN=csp".hex()),
    ]


@pytest.mark.parametrize(
    ("issued", "validity"),
    [
        (datetime(2025, 1, 1, tzinfo=UTC), ["250101000000Z", "320101000000Z"]),
        (datetime(2024, 2, 29, 12, tzinfo=UTC), ["240229120000Z", "310228120000Z"]),
        (datetime.fromisoformat("2025-01-01T01:00:00+02:00"), ["241231230000Z", "311231230000Z"]),
        (datetime(2044, 6, 1, tzinfo=UTC), ["440601000000Z", "20510601000000Z"]),
    ],
)
def test_validity_is_seven_years(issued: datetime, validity: list[str]) -> None:
    certificate = AmdCa("milan").provision(Chip.from_seed("dates", "milan"), Tcb(), issued)
    assert [time.content.decode() for time in tbs(certificate)[4]] == validity


def test_validity_of_a_vlek_is_one_year() -> None:
    key = attestation_key(bytes(48), VLEK_LABEL).public_key()
    certificate = AmdCa("milan").issue_vlek("CN=csp", Tcb(), key, NEW)
    assert [time.content.decode() for time in tbs(certificate)[4]] == ["250403192343Z", "260403192343Z"]


def test_key_is_uncompressed_p384() -> None:
    chip = Chip.from_seed("point", "genoa")
    key = chip.vcek(Tcb()).public_key()
    certificate = AmdCa("genoa").provision(chip, Tcb(), NEW)
    assert tbs(certificate)[6].whole == key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_trailer_field_goes_on_its_date() -> None:
    ca, chip = AmdCa("milan"), Chip.from_seed("trailer", "milan")
    before, after = (
        ca.provision(chip, Tcb(), moment)
        for moment in (datetime(2024, 11, 5, 23, 59, 59, tzinfo=UTC), datetime(2024, 11, 6, tzinfo=UTC))
    )
    assert [len(tbs(certificate)[2].content) for certificate in (before, after)] == [0x46, 0x41]
    assert all(tbs(c)[2].whole == Der.read(c)[1].whole for c in (before, after))


def test_every_snp_product_has_a_certificate_line() -> None:
    assert set(snp_product_names()) <= set(PRODUCT_LINES)


def test_serials_and_names_are_all_different() -> None:
    facts = [f for line in PRODUCT_LINES.values() for f in (line.ark, line.ask, line.asvk)]
    assert len({f.serial for f in facts}) == len({f.common_name for f in facts}) == 9
    assert all(a.serial < b.serial for a, b in pairwise(facts))
