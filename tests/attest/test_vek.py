"""The profile of VEK certificates: exactly AMD's extensions, each once, each in its form."""

import pytest

from snpbook.attest.certs import Certificate
from snpbook.attest.checks import NotGenuine, Result
from snpbook.attest.vek import read_vek
from snpbook.attest.verify import verify
from snpbook.spec.report import SigningKey
from tests.attest.judging import GOOD, judged
from tests.attest.own_chain import CHIP_ID, integer, milan_extensions, text
from tests.attest.vectors import NOW

EXTENSIONS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no patch level": ({"3.4": None}, "vek.extensions"),
    "no chip": ({"4": None}, "vek.extensions"),
    "a chip and a provider": ({"5": text("CN=cloud")}, "vek.extensions"),
    "a Turin patch level": ({"3.9": integer(0)}, "vek.extensions"),
    "unknown structure": ({"1": integer(2)}, "vek.struct_version"),
    "Turin's structure": ({"1": integer(1)}, "vek.extensions"),
    "patch level too high": ({"3.1": integer(128)}, "vek.patch_levels"),
    "negative patch level": ({"3.8": b"\x02\x01\xde"}, "vek.patch_levels"),
    "padded patch level": ({"3.1": b"\x02\x02\x00\x03"}, "vek.patch_levels"),
    "patch level with a tail": ({"3.1": b"\x02\x01\x03\x00"}, "vek.patch_levels"),
    "another product": ({"2": text("Genoa")}, "binding.product"),
    "another type of text": ({"2": b"\x0c\x05Milan"}, "vek.text"),
    "another reserved level": ({"3.5": integer(1)}, "binding.tcb"),
    "another chip": ({"4": bytes(64)}, "binding.chip_id"),
    "a product like ours": ({"2": text("MilanX")}, "binding.product"),
    "no stepping": ({"2": text("Milan-")}, "binding.product"),
    "half a chip": ({"4": CHIP_ID[:32]}, "vek.hwid"),
    "half a wrapped chip": ({"4": b"\x04\x20" + CHIP_ID[:32]}, "vek.hwid"),
    "a chip wrapped twice": ({"4": b"\x04\x42\x04\x40" + CHIP_ID}, "vek.hwid"),
    "a wrapped chip with a tail": ({"4": b"\x04\x40" + CHIP_ID + b"\0"}, "vek.hwid"),
    "a chip in a BIT STRING": ({"4": b"\x03\x40" + CHIP_ID}, "vek.hwid"),
    "another wrapped chip": ({"4": b"\x04\x40" + bytes(64)}, "binding.chip_id"),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_are_exactly_amds(name: str) -> None:
    changes, check = EXTENSIONS[name]
    extensions = {key: value for key, value in {**milan_extensions(), **changes}.items() if value is not None}
    assert judged(GOOD.but(extensions=extensions)) == check


def test_the_order_of_extensions_is_free() -> None:
    chain = GOOD.but(extensions=dict(reversed(milan_extensions().items())))
    assert verify(chain.report(), chain.certificates, chain.roots, NOW).product == "milan"


def test_a_chip_may_be_wrapped_as_an_octet_string() -> None:
    """Bare as AMD gives it, even where it looks like an OCTET STRING itself, or wrapped as extensions usually are."""
    looks_wrapped = b"\x04\x3e" + CHIP_ID[2:]
    for value, chip in ((b"\x04\x40" + CHIP_ID, CHIP_ID), (looks_wrapped, looks_wrapped)):
        chain = GOOD.but(extensions={**milan_extensions(), "4": value})
        verified = verify(chain.report(chip_id=chip), chain.certificates, chain.roots, NOW)
        assert verified.vek.hwid == chip
        assert verified.checks[-1].result is Result.PASSED


def test_a_duplicate_extension_is_refused() -> None:
    """The library's builder makes none, so one identifier is patched into another of the same length."""
    oid = bytes([0x2B, 6, 1, 4, 1, 0x9C, 0x78, 1, 3])
    der = GOOD.vek.der.replace(oid + b"\x07", oid + b"\x06")
    with pytest.raises(NotGenuine, match="uplicate"):
        Certificate.read(der)


def test_a_compressed_point_is_refused() -> None:
    edit = GOOD.vek.der.index(b"\x03\x62\x00\x04")
    damaged = GOOD.vek.der[: edit + 3] + b"\x05" + GOOD.vek.der[edit + 4 :]
    with pytest.raises(NotGenuine) as refusal:
        Certificate.read(damaged)
    assert refusal.value.check == "certificates.decode"


def test_a_certificate_of_version_1() -> None:
    """It writes no version, and has no extensions."""

    def edit(part: bytes) -> bytes:
        part = part.removeprefix(b"\xa0\x03\x02\x01\x02")
        return part.partition(b"\xa3\x82")[0]

    assert judged(GOOD.but(vek_edit=edit)) == "vek.version"


def test_the_serial_number_is_amds_0_or_anothers() -> None:
    for serial in (b"\x00", b"\x05"):
        chain = GOOD.but(vek_edit=lambda part, s=serial: part.replace(b"\x02\x01\x07", b"\x02\x01" + s, 1))
        assert chain.vek.serial == serial[0]
        assert verify(chain.report(), chain.certificates, chain.roots, NOW).product == "milan"


def test_what_a_vek_says() -> None:
    content, _ = read_vek(GOOD.vek, SigningKey.VCEK)
    assert (content.struct_version, content.product_name, content.line) == (0, "Milan-B0", "Milan")
    assert (content.tcb, content.hwid, content.csp_id) == (0xDE08000000000003, CHIP_ID, None)
