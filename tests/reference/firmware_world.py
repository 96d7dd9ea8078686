"""What the checks of firmware commands look at, as plain values.

A board of 64 MiB with one core complex, described and not simulated: states by name, addresses by number, memory
only by what it means ("the tag is right"). It shares nothing with the library; every number is typed again on
purpose. Sources: the firmware sheet's sections 1.1 to 1.5, 3 and 4 (hexadecimal offsets and codes).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MIB, PAGE = 1 << 20, 4096
C_BIT = 1 << 51
ADDRESS_LIMIT = 0x3FFCFFFFFFFF
ASEG = (0xA0000, 0xC0000)

# Where the cases put things. Multiples of 2 MB suit large pages.
BUFFER, GCTX, AGENT = 16 * MIB, 28 * MIB, 30 * MIB
SRC, DST, MDATA, OUT, LIST = 18 * MIB, 20 * MIB, 22 * MIB, 24 * MIB, 26 * MIB
IN_RMP, IN_TSEG, IN_ASEG, IN_NOTHING, ABOVE = 47 * MIB, 50 * MIB, 0xA0000, 128 * MIB, 0x3FFD00000000

ASID_LIMIT, MIN_SEV_ASID, ASID_COUNTERS = 509, 100, 2048
API = (1, 55)
POLICY_BITS = (1 << 21) - 1
POLICY = 0x30000
SMT, ONE, MIGRATE_MA, DEBUG, SINGLE_SOCKET = (1 << bit for bit in (16, 17, 18, 19, 20))

PAGE_STATES = (
    "HYPERVISOR", "HV_FIXED", "FIRMWARE", "CONTEXT", "METADATA", "RECLAIM", "PRE_GUEST", "PRE_SWAP", "GUEST_INVALID",
    "GUEST_VALID",
)  # fmt: skip
"""Default is the state of a page that the RMP has no entry for, and cannot be given to one that it has."""
OF_GUESTS = ("PRE_GUEST", "PRE_SWAP", "GUEST_INVALID", "GUEST_VALID")
IMMUTABLE = ("HV_FIXED", "FIRMWARE", "CONTEXT", "METADATA", "PRE_GUEST", "PRE_SWAP")


@dataclass
class Page:
    """One page as the firmware decodes its entry; `owner` is the context of a Metadata page."""

    state: str = "HYPERVISOR"
    large: bool = False
    asid: int = 0
    gfn: int = 0
    vmsa: bool = False
    owner: int = 0
    vmpl: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Mdata:
    """A metadata entry that a swap would read; `tag` tells whether the page swapped out belongs to it."""

    valid: bool = True
    validated: bool = False
    vmsa: bool = False
    metadata: bool = False
    large: bool = False
    tag: bool = True


@dataclass
class Guest:
    """A guest context. `ma` is the migration agent's context, or nothing."""

    gstate: str = "INIT"
    asid: int = 0
    policy: int = 0
    imi_en: bool = False
    ma: int | None = None
    vcek_dis: bool = False
    id_block: bool = False
    iv_count: int = 0
    msg_count: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    root: Mdata = field(default_factory=lambda: Mdata(valid=False))
    same_socket_as_agent: bool = True


@dataclass
class LegacyGuest:
    """A guest of the legacy commands; `asid_state` is the least that any complex says of its ASID."""

    state: str = "LUPDATE"
    asid: int = 0
    policy: int = 0


@dataclass
class Core:
    """What SNP_INIT reads of one core, and whether it has done WBINVD."""

    syscfg: int = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25  # MFDM, memory encryption, SNPEn, VMPLEn
    hwcr: int = 1  # SmmLock
    mtrr_fixed: int = 0x0606060606060606
    iorr: int = 0
    tom: int = 64 * MIB
    tom2: int = 0
    tseg: int = 48 * MIB
    debug_status: int = 0
    rmp_base: int = 47 * MIB
    rmp_end: int = 48 * MIB - 1
    hsave: int = 0
    wbinvd: bool = True


@dataclass
class World:
    """A machine and its secure processor between two commands."""

    snp: str = "INIT"
    legacy: str = "UNINIT"
    legacy_es: bool = True
    owned: bool = False
    rmp_initialised: bool = True
    rmp_tcb_changed: bool = False
    iommu_enforced: bool = True
    guest_count: int = 0
    committed: tuple[int, int, int, int] = (4, 0, 24, 0xDB)  # bootloader, TEE, SNP, microcode
    configured: tuple[int, int, int, int] | None = None
    mask_chip_id: bool = False
    mask_chip_key: bool = False
    vlek: bool = False
    smt: bool = True
    sockets: int = 1
    ring_mode: bool = False
    faults: set[str] = field(default_factory=set)  # of the chip, by name: diag mode, unlocked part, no answer ...
    cores: list[Core] = field(default_factory=lambda: [Core(), Core()])
    asids: list[dict[int, str]] = field(default_factory=lambda: [{}])  # per core complex; an ASID not named is CLEAN
    pages: dict[int, Page] = field(default_factory=dict)  # by address
    guests: dict[int, Guest] = field(default_factory=dict)  # by address of the context page
    handles: dict[int, LegacyGuest] = field(default_factory=dict)
    tmrs: list[tuple[int, int]] = field(default_factory=list)
    dram: tuple[int, int] = (0, 64 * MIB)
    rmp: tuple[int, int] = (47 * MIB, 48 * MIB)
    tseg: tuple[int, int] = (48 * MIB, 64 * MIB)

    def at(self, address: int) -> Page:
        """The entry that answers for an address: a 2 MB entry speaks for all of its 512 pages."""
        address = address & ~C_BIT & -PAGE
        head = self.pages.get(address & -(2 * MIB))
        if head is not None and head.large:
            return head
        if address in self.pages:
            return self.pages[address]
        if self.rmp[0] <= address < self.rmp[1]:
            return Page("FIRMWARE")
        if address >= (self.rmp[1] - self.rmp[0] - 0x4000) // 16 * PAGE:
            return Page("DEFAULT")
        plain = self.dram[0] <= address < self.dram[1] and not _meets(address, PAGE, self.tseg, ASEG)
        return Page("HYPERVISOR" if plain else "HV_FIXED")

    def guest(self, gctx: int) -> Guest:
        """The guest of a context page; of any other page one whose state no command admits."""
        return self.guests.get(gctx & ~C_BIT, Guest("NONE"))

    def of_asid(self, asid: int) -> bool:
        """Whether any page carries the ASID."""
        return asid != 0 and any(page.asid == asid for page in self.pages.values())

    def asid(self, asid: int) -> list[str]:
        """The state of an ASID on each core complex."""
        return [states.get(asid, "CLEAN") for states in self.asids]

    def set_asid(self, asid: int, state: str) -> None:
        for states in self.asids:
            states[asid] = state


@dataclass
class Request:
    """A command's buffer, field by field as the sheet names them, and what the memory it points to means."""

    fields: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    stray: int | None = None  # a reserved bit of the buffer that is set

    def __getattr__(self, name: str) -> Any:
        for known in ("fields", "memory"):
            if name in self.__dict__.get(known, {}):
                return self.__dict__[known][name]
        raise AttributeError(name)

    def set(self, name: str, value: Any) -> None:
        known = self.fields if name in self.fields else self.memory
        if name not in known:
            raise KeyError(name)
        known[name] = value


def _meets(address: int, size: int, *ranges: tuple[int, int]) -> bool:
    return any(address < end and address + size > start for start, end in ranges)


def bad_address(w: World, address: int, size: int = PAGE, lookup: bool = True) -> int:
    """The status of an address that the firmware does not touch, or 0 (1.2, rule 5).

    Unconfirmed: the RMP's range answers so also before SNP_INIT, and a look-up does whatever SNP's state.
    """
    address &= ~C_BIT
    if address + size - 1 > ADDRESS_LIMIT:
        return 0x09
    if _meets(address, size, w.rmp):
        return 0x16 if lookup else 0x09
    if _meets(address, size, w.tseg, ASEG, *w.tmrs):
        return 0x09
    if not (w.dram[0] <= address and address + size <= w.dram[1]):
        return 0x03
    return 0x00
