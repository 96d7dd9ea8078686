"""A host that lies about the processor at launch: the VMM fills the CPUID page from what KVM holds of a vCPU.

What the firmware lets through is what a guest gets to see. Sources: SNP ABI, CPUID page; firmware 1.55.25.
"""

from __future__ import annotations

from random import Random

from snpbook.system import Guest

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_WORD = 1 << 32
_INDEXES = 4


def change_cpuid(guest: Guest, random: Random) -> None:
    """Other values, leaves left out, told twice, or at another's place; before the launch."""
    vcpu = guest.vmm.vcpus[0]
    entries = list(vcpu.cpuid)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(entries))
        entry, name = entries[at], random.choice(_REGISTERS)
        own = getattr(entry, name)
        others = own ^ 1 << random.randrange(_WORD.bit_length() - 1), own & random.randrange(_WORD), 0
        other = entry.replace(**{name: random.choice((*others, random.randrange(_WORD)))})
        match random.randrange(6):
            case 0:
                del entries[at]
            case 1:
                entries.insert(random.randrange(len(entries)), other)
            case 2:
                place = random.choice(entries)
                entries[at] = entry.replace(function=place.function, index=random.randrange(_INDEXES))
            case _:
                entries[at] = other
    vcpu.cpuid = tuple(entries)
