"""A chain of certificates from the root down: who vouches for whom, until when, with what key."""

from __future__ import annotations

from collections.abc import Iterable

from snpbook.attest.certs import Certificate
from snpbook.attest.roots import Roots
from snpbook.views.static import Static
from snpbook.views.tables import table


def certificates(chain: Iterable[Certificate], roots: Roots) -> Static:
    """A row each; a root is pinned by its fingerprint or is not."""
    rows = [
        (
            each.common_name,
            each.issuer.rpartition("CN=")[2].partition(",")[0] if "CN=" in each.issuer else each.issuer,
            each.public_key.kind,
            each.span,
            each.fingerprint[:16],
            f"pinned by {roots.name}" if each.fingerprint in roots.fingerprints else "",
        )
        for each in chain
    ]
    head = ["certificate", "issued by", "key", "valid", "sha256", "root"]
    return table("Certificates", head, rows, mono=["sha256"])
