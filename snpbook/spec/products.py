"""Products: what differs between EPYC generations, as data read from `data/products/*.toml`.

Nothing in the model asks for a product's name; it asks for a property. Each file cites its sources.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from operator import or_
from types import MappingProxyType
from typing import Any

from snpbook.spec.cpuid import (
    ADDRESS_SIZES,
    ADDRESS_SIZES_LEAF,
    ENCRYPTED_MEMORY,
    ENCRYPTED_MEMORY_LEAF,
    EXTENDED_SIGNATURE_LEAF,
    INSTRUCTIONS,
    SEGMENTED_RMP,
    SEGMENTED_RMP_LEAF,
    SIGNATURE_LEAF,
    Registers,
    SevCapability,
)
from snpbook.spec.layout import Record
from snpbook.spec.policy import Tcb
from snpbook.spec.releases import Release, release
from snpbook.spec.resources import resource
from snpbook.spec.sev_features import REQUIRED_CAPABILITY, SevFeatures
from snpbook.spec.vmsa import VCPU_TYPES, CpuidSignature

MEMORY_KEY_SIZES = {"naples-xe": 16, "naples-xex": 16, "xex-aes-128": 16, "xts-aes-256": 64}
"""The memory ciphers, and the bytes of a key of each: XTS has two of 32."""
TSC_MHZ = 2400
"""The rate of the time-stamp counter, the same on every product (MODEL): what GUEST_TSC_FREQ scales for a guest."""
Leaves = Mapping[tuple[int, int | None], Registers]
"""CPUID leaves by (leaf, subleaf); subleaf None answers every ECX."""


@dataclass(frozen=True, slots=True)
class FirmwareBuild:
    """The firmware that a machine boots with, and the TCB versions that come with it.

    `abi` is what its interface is. `report_version` is the build's own: builds of one revision differ in it. What
    stands after `build` is SNP's.
    """

    abi: Release
    build: int
    report_version: int = 0
    platform_info: int = 0
    tcb: Tcb = field(default_factory=Tcb)

    def __str__(self) -> str:
        return f"{self.abi.major}.{self.abi.minor}.{self.build}"


@dataclass(frozen=True, slots=True)
class Memory:
    """DRAM of one socket: channels, transfers per channel in MT/s, and how much fits, in TiB."""

    channels: int
    rate: int
    max_tib: int

    @property
    def peak_bandwidth(self) -> float:
        """GB/s: each transfer of a channel carries 8 bytes."""
        return self.channels * self.rate * 8 / 1000


@dataclass(frozen=True, slots=True)
class Product:
    """One EPYC generation.

    `asid_limit` is the highest ASID that can be encrypted; ASIDs below `min_sev_asid` are for SEV-ES and SNP
    guests. That bound is a BIOS setting: `dataclasses.replace(product, min_sev_asid=...)` is the product of a
    machine with another one. `encryption` names the memory cipher. `leaves` are those of one part of the
    generation, logical CPU 0. `firmware` is None where no firmware is modelled. `unconfirmed` names the
    fields that no source states. `ValueError` for a cipher or an ASID bound that cannot be.
    """

    name: str
    title: str
    signature: CpuidSignature
    vcpu_type: str
    capabilities: SevCapability
    c_bit: int
    address_reduction: int
    physical_bits: int
    linear_bits: int
    vmpls: int
    asid_limit: int
    min_sev_asid: int
    encryption: str
    memory: Memory
    leaves: Leaves = field(hash=False, repr=False)
    firmware: FirmwareBuild | None = None
    tsc_factor: int = 0
    unconfirmed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.encryption not in MEMORY_KEY_SIZES:
            raise ValueError(f"encryption = {self.encryption!r}: one of {', '.join(MEMORY_KEY_SIZES)}")
        if not 1 <= self.min_sev_asid <= self.asid_limit + 1:
            limits = f"1 (none for SEV-ES) to {self.asid_limit + 1} (all for SEV-ES)"
            raise ValueError(f"min_sev_asid = {self.min_sev_asid}: {limits}")

    def __repr__(self) -> str:
        return f"Product({self.name}, {self.encryption}, {self.asid_limit} ASIDs)"

    def running(self, revision: str) -> Product:
        """The product with SNP firmware of that document revision, such as "1.58"; all else of the build stays.

        `ValueError` for one that is not known, and for a product without SNP firmware.
        """
        abi = release(revision)
        if self.firmware is None or not self.firmware.abi.snp or not abi.snp:
            raise ValueError(f"{self.title} with firmware {revision}: both must have SNP commands")
        build = replace(self.firmware, abi=abi, report_version=abi.report_version)
        return replace(self, firmware=build)

    @property
    def vcpu_signature(self) -> int:
        """CPUID Fn1 EAX of the vCPU model that guests get by default."""
        return int(VCPU_TYPES[self.vcpu_type])

    @property
    def memory_key_size(self) -> int:
        """Bytes of the memory controller's key."""
        return MEMORY_KEY_SIZES[self.encryption]

    @property
    def encrypted_physical_bits(self) -> int:
        """Bits of a system physical address once SYSCFG.MemEncryptionModEn is set (Linux arch/x86/kernel/cpu/amd.c)."""
        return self.physical_bits - self.address_reduction

    @property
    def es_asids(self) -> range:
        """ASIDs of SEV-ES and SNP guests; empty where the BIOS reserves none (Linux svm/sev.c)."""
        return range(1, self.min_sev_asid)

    @property
    def sev_asids(self) -> range:
        """ASIDs of SEV guests without encrypted registers; empty where all are reserved for SEV-ES and SNP."""
        return range(self.min_sev_asid, self.asid_limit + 1)

    @property
    def coherent(self) -> bool:
        """Whether caches keep lines of different encryption domains coherent."""
        return SevCapability.HW_ENF_CACHE_COH in self.capabilities

    @property
    def instructions(self) -> frozenset[str]:
        """The instructions on the RMP that exist; the others raise #UD."""
        return frozenset(name for name, needs in INSTRUCTIONS.items() if needs in self.capabilities)

    @property
    def sev_features(self) -> SevFeatures:
        """The bits of VMSA.SEV_FEATURES that the processor knows."""
        known = (feature for feature, needs in REQUIRED_CAPABILITY.items() if needs in self.capabilities)
        return reduce(or_, known, SevFeatures(0))

    @property
    def rmp_segments(self) -> Record | None:
        """Bounds of a segmented RMP (`SEGMENTED_RMP`), or None where the table is one piece."""
        if SevCapability.SEGMENTED_RMP not in self.capabilities:
            return None
        return self.cpuid(SEGMENTED_RMP_LEAF).decode(SEGMENTED_RMP)

    def cpuid(self, leaf: int, subleaf: int = 0) -> Registers:
        """What CPUID returns on the host for EAX = `leaf` and ECX = `subleaf`; zeros for an unknown leaf."""
        found = self.leaves.get((leaf, subleaf)) or self.leaves.get((leaf, None)) or Registers()
        if leaf in (SIGNATURE_LEAF, EXTENDED_SIGNATURE_LEAF):
            return found._replace(eax=int(self.signature))
        if leaf == ADDRESS_SIZES_LEAF:
            sizes = ADDRESS_SIZES.record(physical=self.physical_bits, linear=self.linear_bits)
            return found._replace(eax=int.from_bytes(bytes(sizes), "little"))
        if leaf == ENCRYPTED_MEMORY_LEAF:
            return Registers.of(
                ENCRYPTED_MEMORY.record(
                    capabilities=self.capabilities,
                    c_bit=self.c_bit,
                    address_reduction=self.address_reduction,
                    vmpls=self.vmpls,
                    asid_limit=self.asid_limit,
                    min_sev_asid=self.min_sev_asid,
                )
            )
        return found


def product_names() -> list[str]:
    """The names that `product` knows, sorted."""
    return sorted(path.stem for path in resource("data", "products").glob("*.toml"))


def snp_product_names() -> list[str]:
    """The products that run SNP guests: those of whose firmware the SNP commands are modelled."""
    builds = {name: product(name).firmware for name in product_names()}
    return [name for name, build in builds.items() if build and build.abi.snp]


@cache
def product(name: str) -> Product:
    """The product of that name; `ValueError` names the known ones."""
    if name not in product_names():
        raise ValueError(f"no product {name!r}: one of {', '.join(product_names())}")
    data = tomllib.loads(resource("data", "products", f"{name}.toml").read_text())
    chip: dict[str, Any] = data["chip"]
    capabilities = SevCapability(chip.pop("capabilities"))
    unconfirmed = tuple(chip.pop("unconfirmed"))
    firmware = None
    if "firmware" in data:
        abi = release(data["firmware"].pop("release"))
        firmware = FirmwareBuild(abi, **data["firmware"], tcb=Tcb(**data.get("tcb", {})))
    return Product(
        name=name,
        signature=CpuidSignature(**data["signature"]),
        capabilities=capabilities,
        memory=Memory(**data["memory"]),
        leaves=MappingProxyType({_leaf(key): Registers(**registers) for key, registers in data["cpuid"].items()}),
        firmware=firmware,
        unconfirmed=unconfirmed,
        **chip,
    )


def _leaf(key: str) -> tuple[int, int | None]:
    """`0000_0001` or `0000_000D.1`: a leaf, with its subleaf where ECX counts."""
    leaf, _, subleaf = key.partition(".")
    return int(leaf, 16), int(subleaf, 16) if subleaf else None
