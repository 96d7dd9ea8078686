"""Products side by side: what two EPYC generations do not have in common.

Words come from the product's own properties; a question mark stands at what no source states.
"""

from __future__ import annotations

from snpbook.spec.cpuid import ENCRYPTED_MEMORY_LEAF, INSTRUCTIONS, SevCapability
from snpbook.spec.products import Product
from snpbook.views.static import Static
from snpbook.views.tables import table


def differences(left: Product, right: Product) -> list[tuple[str, str, str]]:
    """What differs: (name, left, right) as words, properties first, then the features of CPUID 8000_001F EAX."""
    rows = zip(_words(left).items(), _words(right).values(), strict=True)
    return [(name, mine, other) for (name, mine), other in rows if mine != other]


def cpuid_differences(left: Product, right: Product) -> list[tuple[str, str, str]]:
    """The CPUID leaves that differ: (leaf, left, right), each as EAX EBX ECX EDX in hexadecimal."""
    named = {(leaf, subleaf or 0) for leaf, subleaf in [*left.leaves, *right.leaves]}
    rows = []
    for leaf, subleaf in sorted(named | {(ENCRYPTED_MEMORY_LEAF, 0)}):
        mine, other = left.cpuid(leaf, subleaf), right.cpuid(leaf, subleaf)
        if mine != other:
            rows.append((f"{leaf:08X}.{subleaf:X}", repr(mine), repr(other)))
    return rows


def comparison(left: Product, right: Product) -> Static:
    """The differences as a table."""
    caption, head = f"{left.title} and {right.title}", ["property", left.name, right.name]
    return table(caption, head, differences(left, right), note="? unconfirmed: no source states it")


def _words(product: Product) -> dict[str, str]:
    """Every property by its name."""
    memory, firmware, segments = product.memory, product.firmware, product.rmp_segments
    snp = firmware if firmware is not None and firmware.abi.snp else None
    words = {
        "signature": f"{int(product.signature):#010x}",
        "physical_bits": str(product.physical_bits),
        "address_reduction": str(product.address_reduction),
        "linear_bits": str(product.linear_bits),
        "c_bit": str(product.c_bit),
        "vmpls": str(product.vmpls),
        "asid_limit": str(product.asid_limit),
        "min_sev_asid": str(product.min_sev_asid),
        "encryption": product.encryption,
        "coherent": _yes(product.coherent),
        **{name: _yes(name in product.instructions) for name in INSTRUCTIONS},
        "rmp_segments": "one piece" if segments is None else f"{segments.cached_segments} segments cached",
        "firmware": "none" if firmware is None else str(firmware),
        "firmware.abi.policy_bits": "none" if snp is None else f"{snp.abi.policy_bits:#x}",
        "tcb": "none" if snp is None else str(snp.tcb),
        "memory": f"{memory.channels} channels, {memory.rate} MT/s, {memory.peak_bandwidth:.1f} GB/s",
        "memory.max_tib": f"{memory.max_tib} TiB",
        "tsc_factor": str(product.tsc_factor or "none"),
    }
    for name in product.unconfirmed:
        if name in words:
            words[name] += " ?"
    return words | {bit.name or "": _yes(bit in product.capabilities) for bit in SevCapability}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
