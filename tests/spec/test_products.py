"""Products against vectors from real machines, the kernel's arithmetic, and each other."""

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from snpbook.spec.cpuid import Registers
from snpbook.spec.products import Product, product, product_names, snp_product_names
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmsa import VCPU_TYPES, CpuidSignature

NAMES = ["genoa", "milan", "naples", "rome", "turin"]
# Host vectors of 8000_001F, with the BIOS setting that they show.
VECTORS = [
    ("naples", 1, (0x0000000F, 0x0000016F, 0x0000000F, 0x00000001)),
    ("rome", 1, (0x0001000F, 0x0000016F, 0x000001FD, 0x00000001)),
    ("milan", 128, (0x0101FD3F, 0x00004173, 0x000001FD, 0x00000080)),
    ("milan", 510, (0x0101FD3F, 0x00004173, 0x000001FD, 0x000001FE)),
    ("genoa", 1, (0x030FFFFB, 0x000041B3, 0x000003EE, 0x00000001)),
    ("turin", 1, (0xCFFFFFFB, 0x000041B3, 0x000003EE, 0x00000001)),
]
# Leaf 1 EAX, 8000_0008 EAX.
SIGNATURES = {
    "naples": (0x00800F12, 0x3030),
    "rome": (0x00830F10, 0x3030),
    "milan": (0x00A00F11, 0x3030),
    "genoa": (0x00A10F11, 0x3934),
    "turin": (0x00B00F21, 0x3934),
}
VCPU_SIGNATURES = {
    "EPYC": 0x00800F12, "EPYC-v1": 0x00800F12, "EPYC-v2": 0x00800F12, "EPYC-v3": 0x00800F12, "EPYC-v4": 0x00800F12,
    "EPYC-IBPB": 0x00800F12, "EPYC-Rome": 0x00830F10, "EPYC-Rome-v1": 0x00830F10, "EPYC-Rome-v2": 0x00830F10,
    "EPYC-Rome-v3": 0x00830F10, "EPYC-Milan": 0x00A00F11, "EPYC-Milan-v1": 0x00A00F11, "EPYC-Milan-v2": 0x00A00F11,
    "EPYC-Genoa": 0x00A10F10, "EPYC-Genoa-v1": 0x00A10F10, "EPYC-Turin": 0x00B00F00,
}  # fmt: skip
# Steppings that Linux lists: Milan A0, B1, Milan-X; Genoa, Genoa-X; Bergamo.
SILICON = {
    (0x19, 1, 0): 0xA00F10, (0x19, 1, 1): 0xA00F11, (0x19, 1, 2): 0xA00F12, (0x19, 0x11, 1): 0xA10F11,
    (0x19, 0x11, 2): 0xA10F12, (0x19, 0xA0, 1): 0xAA0F01, (0x19, 0xA0, 2): 0xAA0F02,
}  # fmt: skip


def test_names() -> None:
    assert product_names() == NAMES
    assert snp_product_names() == ["genoa", "milan"]
    with pytest.raises(ValueError, match="no product 'zen': one of genoa, milan, naples, rome, turin"):
        product("zen")


@pytest.mark.parametrize(("name", "min_sev_asid", "registers"), VECTORS)
def test_encrypted_memory_leaf(name: str, min_sev_asid: int, registers: tuple[int, ...]) -> None:
    assert replace(product(name), min_sev_asid=min_sev_asid).cpuid(0x8000001F) == registers


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_address_sizes(name: str) -> None:
    p, (signature, sizes) = product(name), SIGNATURES[name]
    assert p.cpuid(1).eax == p.cpuid(0x80000001).eax == int(p.signature) == signature
    assert p.cpuid(0x80000008).eax == sizes
    assert p.cpuid(1).ebx >> 8 & 0xFF == 8, "CLFLUSH size in quadwords"


@pytest.mark.parametrize("name", NAMES)
def test_part_names_itself(name: str) -> None:
    p = product(name)
    vendor = b"".join(n.to_bytes(4, "little") for n in (p.cpuid(0).ebx, p.cpuid(0).edx, p.cpuid(0).ecx))
    brand = b"".join(n.to_bytes(4, "little") for leaf in range(0x80000002, 0x80000005) for n in p.cpuid(leaf))
    assert vendor == b"AuthenticAMD"
    assert brand.startswith(b"AMD EPYC ")
    assert brand[9:10] in {b"7", b"9"}


def test_leaf_with_and_without_subleaves() -> None:
    milan = product("milan")
    assert milan.cpuid(1, 5) == milan.cpuid(1)
    assert milan.cpuid(0xD, 2) == (0x100, 0x240, 0, 0)
    assert milan.cpuid(0xD, 3) == milan.cpuid(0x40000000) == milan.cpuid(0x80000025) == Registers()


@pytest.mark.parametrize("name", NAMES)
def test_size_of_the_xsave_area_follows_from_its_components(name: str) -> None:
    p = product(name)
    components = [p.cpuid(0xD, i) for i in range(2, 64) if p.cpuid(0xD, 0).eax >> i & 1]
    assert components
    assert p.cpuid(0xD, 0).ecx >= max(size + offset for size, offset, _, _ in components)


@pytest.mark.parametrize("name", NAMES)
def test_no_hypervisor_only_features(name: str) -> None:
    p = product(name)
    assert not p.capabilities & (1 << 28 | 1 << 29)
    assert not p.cpuid(0x80000008).ebx >> 25 & 1, "VIRT_SPEC_CTRL"


def test_vcpu_types() -> None:
    assert {name: int(signature) for name, signature in VCPU_TYPES.items()} == VCPU_SIGNATURES
    assert {name: int(CpuidSignature(*name)) for name in SILICON} == SILICON
    assert {name: product(name).vcpu_signature for name in NAMES} == {
        "naples": 0x800F12, "rome": 0x830F10, "milan": 0xA00F11, "genoa": 0xA10F10, "turin": 0xB00F00,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "bits"), [("naples", 43), ("rome", 43), ("milan", 43), ("genoa", 46), ("turin", 46)])
def test_address_bits_with_encryption_on(name: str, bits: int) -> None:
    assert product(name).encrypted_physical_bits == bits


def test_milan_reaches_8_tib_and_genoa_64() -> None:
    assert 1 << product("milan").encrypted_physical_bits == 8 << 40
    assert 1 << product("genoa").encrypted_physical_bits == 64 << 40


@pytest.mark.parametrize(
    ("name", "min_sev_asid", "es", "sev"),
    [
        ("milan", 1, 0, 509),  # ES and SNP unusable
        ("milan", 100, 99, 410),
        ("milan", 128, 127, 382),
        ("milan", 509, 508, 1),
        ("milan", 510, 509, 0),  # every ASID is for ES and SNP
        ("genoa", 1, 0, 1006),
        ("naples", 5, 4, 11),
    ],
)
def test_asid_counts(name: str, min_sev_asid: int, es: int, sev: int) -> None:
    p = replace(product(name), min_sev_asid=min_sev_asid)
    assert (len(p.es_asids), len(p.sev_asids)) == (es, sev)
    assert [*p.es_asids, *p.sev_asids] == list(range(1, p.asid_limit + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_sev_asid": 0}, "min_sev_asid = 0: 1 .* to 510"),
        ({"min_sev_asid": 511}, "min_sev_asid = 511: 1 .* to 510"),
        ({"encryption": "rot13"}, "encryption = 'rot13': one of naples-xe"),
    ],
)
def test_impossible_products(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(product("milan"), **change)


def test_default_of_the_bios_setting() -> None:
    assert {product(name).min_sev_asid for name in NAMES} == {5, 100}
    assert product("naples").min_sev_asid == 5, "it has 15 ASIDs"


def test_instructions() -> None:
    snp = {"RMPUPDATE", "PSMASH", "PVALIDATE", "RMPADJUST"}
    assert {name: set(product(name).instructions) for name in NAMES} == {
        "naples": set(), "rome": set(), "milan": snp, "genoa": snp | {"RMPQUERY"},
        "turin": snp | {"RMPQUERY", "RMPREAD"},
    }  # fmt: skip


def test_encryption_and_coherence() -> None:
    found = {name: (p.encryption, p.memory_key_size, p.coherent) for name, p in _all().items()}
    assert found == {
        "naples": ("naples-xex", 16, False), "rome": ("xex-aes-128", 16, False), "milan": ("xex-aes-128", 16, True),
        "genoa": ("xts-aes-256", 64, True), "turin": ("xts-aes-256", 64, True),
    }  # fmt: skip
    assert replace(product("naples"), encryption="naples-xe").memory_key_size == 16


def test_segmented_rmp_is_turins() -> None:
    assert {name for name, p in _all().items() if p.rmp_segments is not None} == {"turin"}
    assert product("turin").rmp_segments.min_segment_size == 36


def test_features_of_guests() -> None:
    milan = product("milan").sev_features
    assert SevFeatures.SECURE_TSC | SevFeatures.VMSA_REG_PROT in milan
    assert not milan & (SevFeatures.VMPL_SSS | SevFeatures.SMT_PROTECTION | SevFeatures.SECURE_AVIC)
    assert product("rome").sev_features == 0
    assert product("turin").sev_features == reduce(int.__or__, SevFeatures)


def test_memory_of_a_socket() -> None:
    found = {
        name: (p.memory.channels, round(p.memory.peak_bandwidth, 1), p.memory.max_tib) for name, p in _all().items()
    }
    assert found == {
        "naples": (8, 170.6, 2), "rome": (8, 204.8, 4), "milan": (8, 204.8, 4), "genoa": (12, 460.8, 6),
        "turin": (12, 576.0, 6),
    }  # fmt: skip


def test_firmware_where_it_is_modelled() -> None:
    assert {name: str(p.firmware) for name, p in _all().items() if p.firmware} == {
        "genoa": "1.55.40",
        "milan": "1.55.29",
        "naples": "0.17.48",
        "rome": "0.24.14",
    }


@pytest.mark.parametrize("name", NAMES)
def test_unconfirmed_names_are_those_of_fields(name: str) -> None:
    for path in product(name).unconfirmed:
        value: Any = product(name)
        for part in path.split("."):
            value = getattr(value, part)


def _all() -> dict[str, Product]:
    return {name: product(name) for name in NAMES}
