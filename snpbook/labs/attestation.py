"""The chapter on attestation: a report and its chain, the verifier's desk, a broker, and thirteen pieces to judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from textwrap import shorten

from snpbook.attest.appraise import Policy, appraise
from snpbook.attest.bundle import Bundle
from snpbook.attest.release import Broker, report_data, spki, unseal
from snpbook.attest.roots import named_roots
from snpbook.evidence.maker import Maker, Recipe
from snpbook.exercises.pieces import NOW, Piece, pieces, thirteenth
from snpbook.firmware.keys import kdf, random_key
from snpbook.spec.policy import guest_policy
from snpbook.views.certificates import certificates
from snpbook.views.report_map import report_map
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.widgets.attestation_desk import AttestationDesk

SECRET = b"the disk's key"


class Lab:
    """A guest's evidence on the owner's desk, and the owner's broker."""

    def __init__(self, product: str = "genoa", seed: str = "attestation") -> None:
        self.desk = AttestationDesk(NOW, lambda: datetime.now(UTC), product, seed)
        self._product, self._seed, self._drawn = product, seed, 0

    def __repr__(self) -> str:
        return f"Lab({self._product}, {self._seed})"

    def map(self) -> Static:
        """The report on the desk, byte by byte."""
        return report_map(self.desk.kit.report)

    def chain(self) -> Static:
        """The certificates on the desk."""
        return certificates(self.desk.kit.readable, named_roots(self.desk.roots.value))

    def release(self, *, swapped: bool = False, late: bool = False, twice: bool = False) -> Broker:
        """From the nonce to the secret: what the broker wrote down is its `audit`.

        A host may have `swapped` the key for one of its own, be too `late`, or try the nonce `twice`. Each time the
        broker refuses with `ReleaseRefused`.
        """
        rng = self._rng()
        guest, host = random_key(rng), random_key(rng)
        maker = Maker(Recipe(NOW, self._product, seed=self._seed))
        policy = Policy("the owner's", measurement=maker.fields["measurement"], vmpl=0)
        self.broker = Broker(SECRET, policy, named_roots("toy"), rng)
        nonce = self.broker.challenge(NOW)
        report = maker.report(report_data=report_data(nonce, spki(guest)))
        chain = Bundle.decode(maker.kit().certificates.values()).certificates
        sent, moment = spki(host if swapped else guest), NOW + timedelta(hours=late)
        sealed = self.broker.release(nonce, sent, report, chain, moment)
        if twice:
            self.broker.release(nonce, sent, report, chain, moment)
        assert unseal(sealed, guest, nonce) == SECRET
        return self.broker

    def audit(self) -> Static:
        """What the broker of the last release wrote down."""
        rows = [
            (f"{entry.time:%H:%M:%S}", entry.event.value, shorten(entry.reason, 96, placeholder=" ..."))
            for entry in self.broker.audit
        ]
        return table("Audit log", ["time", "event", "reason"], rows)

    def pieces(self) -> Static:
        """The twelve, by what their reports say."""
        return _listed("Twelve pieces of evidence", dict(enumerate(pieces(), 1)))

    def thirteenth(self, policy: Policy) -> str:
        """What a policy says of the thirteenth."""
        return repr(appraise(thirteenth().verified, policy))

    def last(self) -> Static:
        """The thirteenth beside the first."""
        return _listed("The first and the thirteenth", {1: pieces()[0], len(pieces()) + 1: thirteenth()})

    def _rng(self) -> Callable[[int], bytes]:
        def draw(size: int) -> bytes:
            self._drawn += 1
            return kdf(self._seed.encode(), "lab", self._drawn.to_bytes(4, "little"), size)

        return draw


def _listed(caption: str, shown: Mapping[int, Piece]) -> Static:
    rows = []
    for number, piece in shown.items():
        fields = piece.verified.report.fields
        rows.append(
            (
                f"{number}. {piece.name}",
                str(fields.version),
                fields.signing_key.name,
                str(fields.vmpl),
                "debug" if guest_policy(fields.policy).debug else "",
                str(piece.verified.tcb("reported_tcb")),
                fields.report_data.hex()[:8],
                f"{fields.author_key_en} {fields.author_key_digest.hex()[:8]}",
                fields.id_key_digest.hex()[:8],
            )
        )
    head = ["piece", "version", "key", "VMPL", "policy", "reported TCB", "report data", "author", "ID key"]
    return table(caption, head, rows, mono=head[5:])
