"""Guest policy, TCB versions and platform information: the 64-bit words of launches and reports.

Sources: SNP ABI (guest policy, TCB_VERSION, PLATFORM_INFO), Linux psp-sev.h.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, Record, bits, uint

POLICY = Layout(
    "GuestPolicy",
    8,
    Cite("SNP", "guest policy"),
    [
        uint("abi_minor", 0, 1, note="lowest firmware ABI minor version"),
        uint("abi_major", 1, 1, note="lowest firmware ABI major version"),
        bits("smt", 0x02, 1, 0, note="simultaneous multithreading allowed"),
        bits("one", 0x02, 1, 1, note="must be one"),
        bits("migrate_ma", 0x02, 1, 2, note="a migration agent is allowed"),
        bits("debug", 0x02, 1, 3, note="the host may decrypt the guest's memory"),
        bits("single_socket", 0x02, 1, 4, note="only on one socket"),
        bits("cxl_allow", 0x02, 1, 5, note="CXL devices and memory allowed"),
        bits("mem_aes_256_xts", 0x02, 1, 6, note="demands AES-256-XTS for memory"),
        bits("rapl_dis", 0x02, 1, 7, note="demands that running average power limit is off"),
        bits("ciphertext_hiding", 0x03, 1, 0, note="demands ciphertext hiding"),
        bits("page_swap_disable", 0x03, 1, 1, note="forbids page swap and move"),
    ],
)
"""Which revision brought the bits from 21 on is in `snpbook.spec.releases`."""


def guest_policy(policy: int) -> Record:
    """The fields of a guest policy."""
    return POLICY.unpack(policy.to_bytes(POLICY.size, "little"))


LEGACY_POLICY = Layout(
    "LegacyGuestPolicy",
    4,
    Cite("SEV", "guest policy"),
    [
        bits("nodbg", 0x00, 1, 0, note="forbids debugging"),
        bits("noks", 0x00, 1, 1, note="forbids sharing keys with other guests"),
        bits("es", 0x00, 1, 2, note="demands SEV-ES"),
        bits("nosend", 0x00, 1, 3, note="forbids sending the guest to another platform"),
        bits("domain", 0x00, 1, 4, note="only to platforms of the same owner"),
        bits("sev", 0x00, 1, 5, note="only to platforms with SEV"),
        uint("api_major", 0x02, 1, note="lowest firmware API major version"),
        uint("api_minor", 0x03, 1, note="lowest firmware API minor version"),
    ],
)

LEGACY_POLICY_ES = 0x4
"""Bit 2 of a legacy policy: the guest is a SEV-ES guest."""
DEFAULT_LEGACY_POLICY = 0x1
"""No debugging: what QEMU passes for a SEV guest when nothing is asked."""

DEFAULT_POLICY = 0x30000
"""SMT allowed, bit 17 set: what QEMU and Linux pass when nothing is asked."""

PLATFORM_INFO = Layout(
    "PlatformInfo",
    8,
    Cite("SNP", "PLATFORM_INFO"),
    [
        bits("smt_en", 0, 1, 0),
        bits("tsme_en", 0, 1, 1),
        bits("ecc_en", 0, 1, 2),
        bits("rapl_dis", 0, 1, 3),
        bits("ciphertext_hiding_en", 0, 1, 4),
        bits("alias_check_complete", 0, 1, 5),
        bits("tio_en", 0, 1, 7),
    ],
)


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security versions of the platform's components; compare component-wise, never as a number.

    `fmc` exists from Turin on and is None elsewhere.
    """

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int | None = None

    @classmethod
    def from_int(cls, value: int, turin: bool = False) -> Tcb:
        """Decode a TCB_VERSION: Milan and Genoa [bl, tee, 4 reserved, snp, ucode], Turin [fmc, bl, tee, snp, ...]."""
        b = value.to_bytes(8, "little")
        if turin:
            return cls(bootloader=b[1], tee=b[2], snp=b[3], microcode=b[7], fmc=b[0])
        return cls(bootloader=b[0], tee=b[1], snp=b[6], microcode=b[7])

    def __int__(self) -> int:
        if self.fmc is not None:
            b = bytes([self.fmc, self.bootloader, self.tee, self.snp, 0, 0, 0, self.microcode])
        else:
            b = bytes([self.bootloader, self.tee, 0, 0, 0, 0, self.snp, self.microcode])
        return int.from_bytes(b, "little")

    def at_least(self, minimum: Tcb) -> bool:
        """True when no component is below `minimum`'s."""
        return all((mine or 0) >= (least or 0) for mine, least in zip(astuple(self), astuple(minimum), strict=True))

    def __str__(self) -> str:
        fmc = "" if self.fmc is None else f"fmc {self.fmc} "
        return f"{fmc}bl {self.bootloader} tee {self.tee} snp {self.snp} ucode {self.microcode:#x}"
