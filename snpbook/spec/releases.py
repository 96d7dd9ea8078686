"""Firmware releases: which commands, fields, policy bits, reports and features a revision of the SNP ABI brought.

1.55 is firmware 1.55.25, exact; 1.51 and 1.58 are that firmware less or plus what is known to differ. Published builds
go on calling themselves 1.55 where documents speak of 1.56 to 1.58. Sources: SNP ABI revisions, Linux psp-sev.h,
virtee/sev and go-sev-guest (reports), firmware 1.55.25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import TIO_COMMANDS
from snpbook.spec.messages import MessageType
from snpbook.spec.platform import FeatureEbx, FeatureEcx
from snpbook.spec.policy import POLICY

Revision = tuple[int, int]
"""Major and minor of the document."""

_C, _T = Command, MessageType

COMMANDS_SINCE: Mapping[Command, Revision] = {
    _C.SNP_INIT_EX: (1, 52),
    _C.SNP_DOWNLOAD_FIRMWARE_EX: (1, 53),
    _C.SNP_VLEK_LOAD: (1, 54),
    _C.SNP_VERIFY_MITIGATION: (1, 58),
}
"""Commands that are younger than 1.51."""
SNP_SINCE: Revision = (1, 51)
"""Older firmware has the SEV and SEV-ES commands alone."""

FIELDS_SINCE: Mapping[Command, Mapping[str, Revision]] = {
    _C.SNP_INIT_EX: {"rapl_dis": (1, 56), "ciphertext_hiding_en": (1, 56), "tio_en": (1, 56), "max_snp_asid": (1, 56)},
}
"""Fields of command buffers that are younger than their command: reserved bits to an older firmware."""

POLICY_SINCE: Mapping[str, Revision] = {
    "cxl_allow": (1, 56),
    "mem_aes_256_xts": (1, 56),
    "rapl_dis": (1, 56),
    "ciphertext_hiding": (1, 56),
    "page_swap_disable": (1, 58),
}
"""Guest policy bits that 1.55.25 does not know, and the revision that is taken to have brought each."""

FEATURES_SINCE: Mapping[FeatureEcx, Revision] = {
    FeatureEcx.VLEK: (1, 54),
    FeatureEcx.X86_SNP_SHUTDOWN: (1, 51),
    FeatureEcx.RAPL_DISABLE: (1, 56),
    FeatureEcx.CIPHERTEXT_HIDING: (1, 56),
    FeatureEcx.AES_256_XTS_POLICY: (1, 56),
    FeatureEcx.CXL_POLICY: (1, 56),
    FeatureEcx.VERIFY_MITIGATION: (1, 58),
}
"""What SNP_FEATURE_INFO tells in ECX of index 0."""

REPORT_VERSIONS: Mapping[int, Revision] = {2: (1, 51), 3: (1, 56), 5: (1, 58)}
"""Version 4 is version 3 to a reader; what it adds is not published."""

SECRETS_VERSIONS: Mapping[int, Revision] = {2: (1, 51), 3: (1, 55)}
"""VERSION of the secrets page."""

MESSAGE_VERSIONS: Mapping[MessageType, Mapping[int, Revision]] = {_T.KEY_REQ: {2: (1, 58)}}
"""Versions of a guest message beyond its first."""

_LEGACY = ("everything: the SEV and SEV-ES commands are those of 1.55",)
UNCONFIRMED: Mapping[Revision, tuple[str, ...]] = {
    (0, 17): _LEGACY,
    (0, 24): _LEGACY,
    (1, 51): (
        "that SNP_INIT_EX is missing (Linux uses it from 1.52 on), and that SNP_SHUTDOWN_EX is not",
        "that SNP_DOWNLOAD_FIRMWARE_EX is missing",
        "version 2 of the secrets page",
        "everything else that is not told: as 1.55",
    ),
    (1, 55): (),
    (1, 58): (
        "which revision brought the policy bits from 21 on",
        "that SNP_FEATURE_INFO tells all of them",
        "the payload size of MSG_KEY_REQ version 2",
        "everything else that is not told: as 1.55",
    ),
}
"""What no source states, by the release whose facts rest on it."""


@dataclass(frozen=True, slots=True)
class Release:
    """The SNP ABI as firmware of one revision implements it; below 1.51 the SEV API alone.

    `major` and `minor` are what the firmware calls itself, to a host, in reports and against a guest's policy.
    """

    revision: Revision
    major: int
    minor: int

    def __repr__(self) -> str:
        return f"Release({self})"

    def __str__(self) -> str:
        return "{}.{}".format(*self.revision)

    def _knows(self, since: Revision) -> bool:
        return since <= self.revision

    @property
    def snp(self) -> bool:
        """Whether it has SNP commands."""
        return self._knows(SNP_SINCE)

    @property
    def commands(self) -> frozenset[Command]:
        """The commands that it has; others answer INVALID_COMMAND."""
        since = {c: SNP_SINCE for c in Command if c.name.startswith("SNP_")} | dict(COMMANDS_SINCE)
        return frozenset(c for c in Command if self._knows(since.get(c, (0, 0)))) - TIO_COMMANDS

    def unknown_fields(self, command: Command) -> tuple[str, ...]:
        """The fields of a command's buffer that it takes for reserved bits."""
        return tuple(name for name, since in FIELDS_SINCE.get(command, {}).items() if not self._knows(since))

    @property
    def policy_bits(self) -> int:
        """The bits of a guest policy that it knows; others must be zero."""
        unknown = {name for name, since in POLICY_SINCE.items() if not self._knows(since)}
        return sum(f.limit << f.first_bit for name, f in POLICY.fields.items() if name not in unknown)

    @property
    def features(self) -> FeatureEcx:
        """ECX of SNP_FEATURE_INFO, index 0."""
        known = FeatureEcx(0)
        for feature, since in FEATURES_SINCE.items():
            known |= feature if self._knows(since) else FeatureEcx(0)
        return known

    @property
    def feature_ebx(self) -> FeatureEbx:
        """EBX of SNP_FEATURE_INFO, index 0: the legacy commands are there, trusted I/O is not."""
        return FeatureEbx.LEGACY_SEV

    @property
    def report_version(self) -> int:
        """The newest version of the attestation report, 0 without SNP; a build may send an older or a newer one."""
        return max((version for version, since in REPORT_VERSIONS.items() if self._knows(since)), default=0)

    @property
    def secrets_version(self) -> int:
        """The version of the secrets page that it writes; 0 without SNP."""
        return max((version for version, since in SECRETS_VERSIONS.items() if self._knows(since)), default=0)

    def message_version(self, message: MessageType) -> int:
        """The highest MSG_VERSION that it takes of a request."""
        newer = MESSAGE_VERSIONS.get(message, {})
        return max((version for version, since in newer.items() if self._knows(since)), default=1)

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """What no source states about it."""
        return UNCONFIRMED[self.revision]


RELEASES: Mapping[str, Release] = {
    str(each): each
    for each in (
        Release((0, 17), 0, 17),
        Release((0, 24), 0, 24),
        Release((1, 51), 1, 51),
        Release((1, 55), 1, 55),
        Release((1, 58), 1, 55),
    )
}


@cache
def release(revision: str) -> Release:
    """The release of that document revision, such as "1.55"; `ValueError` names the known ones."""
    if revision not in RELEASES:
        raise ValueError(f"no firmware release {revision!r}: one of {', '.join(RELEASES)}")
    return RELEASES[revision]
