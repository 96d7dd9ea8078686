"""Evidence to decide on: twelve pieces of which seven are acceptable, and a thirteenth that looks like them.

All are genuine. Nothing says which are acceptable but the reasons that stand beside those that are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from hashlib import sha384, sha512
from typing import Any

from snpbook.attest.bundle import Bundle
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import VerifiedReport, verify
from snpbook.evidence.kit import ROOT_SET, Kit
from snpbook.evidence.maker import Maker, Recipe
from snpbook.spec.policy import DEFAULT_POLICY, POLICY, Tcb

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PRODUCT = "genoa"
NONCE = sha512(b"the owner's nonce").digest()
AUTHOR = sha384(b"the owner's author key").digest()
TCB = Tcb(bootloader=10, tee=0, snp=23, microcode=84)
"""What the owner asks for at least."""
_ID_KEY = sha384(b"the owner's ID key").digest()
_OURS: Mapping[str, Any] = {
    "report_data": NONCE, "author_key_en": 1, "author_key_digest": AUTHOR, "id_key_digest": _ID_KEY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of evidence; `fault` says why it is not acceptable, and is empty where it is."""

    name: str
    kit: Kit
    fault: str = ""

    @property
    def verified(self) -> VerifiedReport:
        """The report, verified under the toy roots."""
        bundle = Bundle.decode([*self.kit.certificates.values(), self.kit.crl])
        roots = named_roots(ROOT_SET)
        return verify(self.kit.report, bundle.certificates, roots, self.kit.now, crls=bundle.crls)


@cache
def pieces() -> tuple[Piece, ...]:
    """The twelve, in an order that tells nothing."""
    debug = int.from_bytes(POLICY.pack(one=1, smt=1, debug=1), "little")
    no_smt = int.from_bytes(POLICY.pack(one=1), "little")
    newer, older = replace(TCB, snp=TCB.snp + 1), replace(TCB, snp=TCB.snp - 1, microcode=TCB.microcode + 9)
    held: dict[str, Any] = dict.fromkeys(("current_tcb", "committed_tcb", "launch_tcb"), int(newer))
    empty = bytes(len(AUTHOR))
    return (
        _piece("an ordinary guest"),
        _piece("debugging", "the host may read its memory", guest_policy=debug),
        _piece("another chip", chip="chip 2"),
        _piece("a process in the guest", "anybody in the guest can ask at VMPL 3", vmpl=3),
        _piece("newer firmware", tcb=newer),
        _piece("yesterday's report", "it answers another nonce", report_data=sha512(b"another nonce").digest()),
        _piece("a provider's key", signer="vlek"),
        _piece("rolled back", "SNP firmware too old, however new the microcode", tcb=older, **held),
        _piece("without SMT", guest_policy=no_smt),
        _piece(
            "an author of nothing", "AUTHOR_KEY_EN without an ID block: nobody signed anything",
            author_key_digest=empty, id_key_digest=empty,
        ),
        _piece("a later version", version=5),
        _piece("a later SVN", guest_svn=3),
    )  # fmt: skip


@cache
def thirteenth() -> Piece:
    """Written by who has read the key of this TCB out of the chip: no guest stands behind it."""
    return _piece("the thirteenth", "a forger has the VCEK of this TCB", report_id=bytes(range(32)))


def _piece(
    name: str, fault: str = "", *, chip: str = "chip 1", signer: str = "vcek", tcb: Tcb = TCB, version: int = 3,
    guest_policy: int = DEFAULT_POLICY, **fields: Any,
) -> Piece:  # fmt: skip
    recipe = Recipe(NOW, PRODUCT, signer, version, tcb, guest_policy, {**_OURS, **fields}, chip)
    kit = Maker(recipe).kit()
    return Piece(name, kit, fault)
