"""Products: what differs between EPYC generations, as data read from `data/products/*.toml`.

Nothing in the model asks for a product's name; it asks for a property. Each file cites its sources.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from snpbook.spec.policy import Tcb
from snpbook.spec.resources import resource
from snpbook.spec.vmsa import VCPU_TYPES, CpuidSignature


@dataclass(frozen=True, slots=True)
class FirmwareRelease:
    """The SEV firmware that a machine boots with."""

    major: int
    minor: int
    build: int
    report_version: int
    platform_info: int
    policy_bits: int


@dataclass(frozen=True, slots=True)
class Product:
    """One EPYC generation.

    `asid_limit` is the highest usable ASID (CPUID 8000_001F ECX); ASIDs below `min_sev_asid`, a
    BIOS setting, are for SEV-ES and SNP guests. `encryption` names the memory cipher.
    """

    name: str
    title: str
    signature: CpuidSignature
    vcpu_type: str
    sev_features_cpuid: int
    c_bit: int
    address_reduction: int
    physical_bits: int
    vmpls: int
    asid_limit: int
    min_sev_asid: int
    encryption: str
    tsc_factor: int
    firmware: FirmwareRelease
    tcb: Tcb

    def __repr__(self) -> str:
        return f"Product({self.name}, {self.encryption}, {self.asid_limit} ASIDs)"

    @property
    def vcpu_signature(self) -> int:
        """CPUID Fn1 EAX of the vCPU model that guests get by default."""
        return int(VCPU_TYPES[self.vcpu_type])

    @property
    def memory_key_size(self) -> int:
        """Bytes of the memory controller's key: 16 for XEX-AES-128, 64 for XTS-AES-256 (both halves)."""
        return {"xex-aes-128": 16, "xts-aes-256": 64}[self.encryption]


def product_names() -> list[str]:
    """The names that `product` knows, sorted."""
    return sorted(path.stem for path in resource("data", "products").glob("*.toml"))


@cache
def product(name: str) -> Product:
    """The product of that name; `ValueError` names the known ones."""
    if name not in product_names():
        raise ValueError(f"no product {name!r}: one of {', '.join(product_names())}")
    data = tomllib.loads(resource("data", "products", f"{name}.toml").read_text())
    signature = CpuidSignature(**data["signature"])
    firmware, tcb = FirmwareRelease(**data["firmware"]), Tcb(**data["tcb"])
    return Product(name=name, signature=signature, firmware=firmware, tcb=tcb, **data["chip"])
