"""The roots that a relying party trusts, pinned by fingerprint: names in a certificate prove nothing.

AMD's own and the toy ones are data in `data/roots`; a caller may bring others. A root that arrives with the evidence
is never trusted for that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass

from snpbook.attest.certs import Certificate
from snpbook.attest.checks import MalformedEvidence
from snpbook.spec.resources import resource

ROOT_SETS = ("amd", "toy")


@dataclass(frozen=True, slots=True)
class Roots:
    """A named set of roots: SHA-256 of each, in hex, and the certificates where the caller brought them."""

    name: str
    fingerprints: frozenset[str]
    certificates: tuple[Certificate, ...] = ()

    def __repr__(self) -> str:
        return f"Roots({self.name}, {len(self.fingerprints)} pinned)"


def named_roots(name: str) -> Roots:
    """The root set `amd` (real machines) or `toy` (this model, keys public by design)."""
    return _pinned(name, name)


def named_sev_roots(name: str) -> Roots:
    """The same for SEV and SEV-ES, whose ARKs are in AMD's own format; AMD's is that of Naples alone."""
    return _pinned(name, f"{name}_sev")


def _pinned(name: str, file: str) -> Roots:
    if name not in ROOT_SETS:
        raise ValueError(f"no root set {name!r}: one of {', '.join(ROOT_SETS)}")
    pinned = tomllib.loads(resource("data", "roots", f"{file}.toml").read_text())
    return Roots(name, frozenset(pinned.values()))


def own_roots(name: str, certificates: Iterable[Certificate]) -> Roots:
    """The caller's roots: those of `certificates` that are their own issuer."""
    roots = tuple(certificate for certificate in certificates if certificate.subject == certificate.issuer)
    if not roots:
        raise MalformedEvidence("there is no root certificate here: a root is its own issuer")
    return Roots(name, frozenset(root.fingerprint for root in roots), roots)
