"""Ways to keep a guest's private memory: which kind of guest has which, and the hooks that they need of the kernel.

A cell that no kernel ever had is here with the reason, and is refused by name. The column of TDX in the table of hooks
is unconfirmed. Sources: RFC v7 and v8 letters and patches 04 to 06, 41, 55 to 57; UPM v10; Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from snpbook.spec.cite import Cite

KINDS = ("plain", "sev", "sev-es", "snp")


class Backend(StrEnum):
    """Where private pages are, and what keeps them there."""

    REGISTERED = "registered"
    """The VMM's own pages, all pinned for long by KVM_MEMORY_ENCRYPT_REG_REGION."""
    LAZY = "lazy"
    """A restricted file beside the VMM's pages; a page is pinned by being there, from its first private use on."""
    RESTRICTED = "restricted"
    """The same file for SNP: RMP entries follow the attribute, and are given back when the file tells of a hole."""
    GUEST_MEMFD = "guest_memfd"
    """A file of the VM itself; RMP entries follow the first use, and a punch gives them back."""
    NULL = "null"
    """A file whose pages nobody encrypts and whose hooks do nothing: what the others add to it is theirs."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of guest on a back end: the era whose kernel has it."""

    kind: str
    backend: Backend
    era: str
    cite: Cite
    unconfirmed: bool = False
    upm: bool = True
    """Whether its slots have private files."""


class NoSuchCell(ValueError):
    """No kernel keeps the private memory of such guests in this way."""


_V7_SEV, _SEV_C = Cite("V7", "patch 7 to 12"), Cite("LINUX", "arch/x86/kvm/svm/sev.c")

CELLS: Mapping[tuple[str, Backend], Cell] = {
    (cell.kind, cell.backend): cell
    for cell in (
        Cell("sev", Backend.REGISTERED, "mainline", _SEV_C, upm=False),
        Cell("sev-es", Backend.REGISTERED, "mainline", _SEV_C, upm=False),
        Cell("snp", Backend.REGISTERED, "rfc-v7", Cite("V7", "letter: since v6"), unconfirmed=True, upm=False),
        Cell("sev", Backend.LAZY, "rfc-v7", _V7_SEV),
        Cell("sev-es", Backend.LAZY, "rfc-v7", _V7_SEV),
        Cell("snp", Backend.RESTRICTED, "rfc-v7", Cite("V7", "patch 55 to 57")),
        Cell("snp", Backend.GUEST_MEMFD, "mainline", Cite("LINUX", "virt/kvm/guest_memfd.c")),
        Cell("plain", Backend.GUEST_MEMFD, "mainline", Cite("LINUX", "KVM_X86_SW_PROTECTED_VM, for tests")),
        Cell("plain", Backend.NULL, "rfc-v7", Cite("UPM", "self-tests: the attribute alone decides")),
    )
}
"""The cells that exist."""

_WHY_NOT: Mapping[tuple[str, Backend], str] = {
    ("plain", Backend.REGISTERED): "the ioctl is for guests with SEV (ENOTTY)",
    ("plain", Backend.LAZY): "there is nothing to pin where nothing is encrypted",
    ("plain", Backend.RESTRICTED): "there is no RMP entry to follow the attribute",
    ("sev", Backend.RESTRICTED): "without an RMP nothing follows the attribute: it is called lazy pinning there",
    ("sev-es", Backend.RESTRICTED): "without an RMP nothing follows the attribute: it is called lazy pinning there",
    ("snp", Backend.LAZY): "with an RMP pages are converted, not only pinned: it is called restricted there",
    ("sev", Backend.GUEST_MEMFD): "Linux gives private memory to SNP guests and to those for tests alone",
    ("sev-es", Backend.GUEST_MEMFD): "Linux gives private memory to SNP guests and to those for tests alone",
    ("sev", Backend.NULL): "pages of an encrypted guest may not move, and nothing pins these",
    ("sev-es", Backend.NULL): "pages of an encrypted guest may not move, and nothing pins these",
    ("snp", Backend.NULL): "pages of an SNP guest need RMP entries, and nothing makes these",
}


def cell(kind: str, backend: str) -> Cell:
    """The cell of a kind of guest and a back end. `NoSuchCell` says why there is none."""
    if kind not in KINDS:
        raise NoSuchCell(f"no kind of guest {kind!r}: one of {', '.join(KINDS)}")
    if backend not in Backend._value2member_map_:
        raise NoSuchCell(f"no back end {backend!r}: one of {', '.join(Backend)}")
    place = kind, Backend(backend)
    if place not in CELLS:
        raise NoSuchCell(f"a {kind} guest has no {backend} memory: {_WHY_NOT[place]}")
    return CELLS[place]


@dataclass(frozen=True, slots=True)
class Hook:
    """A place where KVM asks the architecture: what each kind of guest does there, and what became of the place."""

    name: str
    when: str
    null: str
    sev: str
    snp: str
    tdx: str
    upstream: str
    cite: Cite


HOOKS: tuple[Hook, ...] = (
    Hook(
        "private_mem_enabled", "a slot with a private file is set",
        "the VM was made so", "upm_mode, from the capability", "upm_mode, from the capability", "always",
        "kvm_arch_has_private_mem: the type of the VM", Cite("V7", "patch 3"),
    ),
    Hook(
        "fault_is_private", "a nested page fault",
        "undecided: the attribute is believed", "undecided: the attribute is believed",
        "bit 34 of the fault's error code (ENC)", "the shared bit of the guest's address",
        "PFERR_PRIVATE_ACCESS, bit 49 of KVM's own error code", Cite("V7", "patch 4, 12 and 56"),
    ),
    Hook(
        "update_mem_attr", "KVM_SET_MEMORY_ATTRIBUTES",
        "nothing", "nothing", "memory, then RMPUPDATE of each page; PSMASH where a 2 MB entry is in the way",
        "nothing: the secure page tables follow at the next fault",
        "gmem_prepare, at the first use of the page and not at the ioctl", Cite("V7", "patch 5 and 55"),
    ),
    Hook(
        "invalidate_restricted_mem", "a hole is punched, the file or the VM ends",
        "nothing", "nothing: no page has an entry", "RMPUPDATE back to the hypervisor",
        "the page leaves the secure page tables first", "gmem_invalidate, as the file frees a page",
        Cite("V7", "patch 6 and 57"),
    ),
    Hook(
        "rmp_page_level_adjust", "a fault chooses the size of the mapping",
        "nothing", "nothing", "no larger than the page's RMP entry", "no larger than the guest accepts",
        "private_max_mapping_level", Cite("V7", "patch 41"),
    ),
)  # fmt: skip
"""The hooks that the v7 series added. What TDX needs is unconfirmed."""
