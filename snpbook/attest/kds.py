"""AMD's key distribution service as a client sees it: addresses, and certificates fetched once and kept.

Who has a network passes a fetch function in; without one the client lives on what its directory holds. What is fetched
is no more trusted than evidence from anybody: the roots are pinned elsewhere. Source: KDS (interface).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snpbook.attest.bundle import Bundle, ders
from snpbook.attest.checks import MalformedEvidence
from snpbook.attest.parse import Report
from snpbook.spec.certificates import KDS_URL, ProductLine, product_line
from snpbook.spec.kds import KDS_PARAMETERS, KdsStatus
from snpbook.spec.policy import Tcb
from snpbook.spec.report import SigningKey

Fetch = Callable[[str], tuple[int, bytes]]
"""Status and body of a URL; `OSError` where there is no connection."""

PAUSES = (1, 2, 4, 8, 16, 30, 60)
"""Seconds before each further attempt: two minutes in all, which AMD's throttling is known to outlast."""
PASSING = (KdsStatus.TOO_MANY_REQUESTS, *range(500, 600))
"""Statuses that may be another one next time; the others, such as that of an unknown chip, are final."""


def chain_url(line: ProductLine, key: SigningKey, base: str = KDS_URL) -> str:
    """Both CA certificates above a VCEK or VLEK, intermediate first, as PEM."""
    return f"{base}/{key.name.lower()}/v1/{line.name}/cert_chain"


def crl_url(line: ProductLine, key: SigningKey, base: str = KDS_URL) -> str:
    """The root's revocation list for the intermediate above a VCEK or VLEK, as DER."""
    return f"{base}/{key.name.lower()}/v1/{line.name}/crl"


def vcek_url(line: ProductLine, chip_id: bytes, tcb: Tcb, base: str = KDS_URL) -> str:
    """The certificate of one chip's key for one TCB (the reported one), as DER."""
    parameters = KDS_PARAMETERS[line.struct_version]
    query = "&".join(f"{name}={getattr(tcb, component) or 0:02}" for name, component in parameters.items())
    return f"{base}/vcek/v1/{line.name}/{chip_id[: line.hwid_size].hex()}?{query}"


class FetchFailed(OSError):
    """What a URL names could not be had; `status` is what the service answered, None where it was not reached."""

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.status = url, status


class KdsClient:
    """Certificates and revocation lists of the service at `base`.

    Certificates are fetched once and kept, in `directory` where one is given; a revocation list is fetched each time,
    and its kept copy is for who has no `fetch`. Failures that may pass are tried again after `sleep`, which takes
    seconds. All methods raise `FetchFailed`.
    """

    def __init__(
        self,
        fetch: Fetch | None,
        sleep: Callable[[float], None],
        directory: Path | None = None,
        base: str = KDS_URL,
    ) -> None:
        self.fetch, self.sleep, self.directory, self.base = fetch, sleep, directory, base.rstrip("/")
        self._kept: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"KdsClient({self.base if self.fetch else 'offline'}, {self.directory or 'in memory'})"

    def vcek(self, line: ProductLine, chip_id: bytes, tcb: Tcb) -> bytes:
        """DER of a chip's certificate at a TCB; `chip_id` as reports carry it."""
        url = vcek_url(line, chip_id, tcb, self.base)
        if not any(chip_id):
            raise FetchFailed(url, "the host masks the chip's id, so that its certificate must come with the evidence")
        return self._get(url, ".der")

    def chain(self, line: ProductLine, key: SigningKey) -> bytes:
        """PEM of the intermediate and the root above a VCEK or VLEK."""
        return self._get(chain_url(line, key, self.base), ".pem")

    def crl(self, line: ProductLine, key: SigningKey) -> bytes:
        """DER of the revocation list that may name that intermediate."""
        return self._get(crl_url(line, key, self.base), ".crl", fresh=True)

    def gather(self, report: Report, product: str) -> Bundle:
        """All that AMD publishes for a signed report of a product line; a VLEK is the cloud provider's to give."""
        line, key = product_line(product), report.fields.signing_key
        blobs = []
        if key is SigningKey.VCEK:
            blobs.append(self.vcek(line, report.fields.chip_id, report.tcb("reported_tcb", product)))
        blobs += [*ders(self.chain(line, key)), self.crl(line, key)]
        return Bundle.decode(blobs)

    def _get(self, url: str, suffix: str, fresh: bool = False) -> bytes:
        name = url.removeprefix(self.base).lstrip("/").translate(str.maketrans("/?&", "___")) + suffix
        if (kept := self._load(name)) is not None and not (fresh and self.fetch):
            return kept
        if self.fetch is None:
            raise FetchFailed(url, f"not fetched: there is no network, and no {name} in {self.directory or 'memory'}")
        body = self._fetch(self.fetch, url)
        try:
            ders(body)
        except MalformedEvidence as error:
            raise FetchFailed(url, f"answered with what is no certificate: {error}", KdsStatus.OK) from error
        self._keep(name, body)
        return body

    def _fetch(self, fetch: Fetch, url: str) -> bytes:
        """The body behind a URL, with patience."""
        for pause in (*PAUSES, None):
            status, body, reason = None, b"", ""
            try:
                status, body = fetch(url)
            except OSError as error:
                reason = f"no connection: {error}"
            if status == KdsStatus.OK:
                return body
            if pause is None or (status is not None and status not in PASSING):
                break
            self.sleep(pause)
        said = body[:200].decode("ascii", "replace").strip()
        raise FetchFailed(url, reason or f"answered {status} ({said})", status)

    def _load(self, name: str) -> bytes | None:
        if self.directory is None:
            return self._kept.get(name)
        path = self.directory / name
        return path.read_bytes() if path.is_file() else None

    def _keep(self, name: str, body: bytes) -> None:
        if self.directory is None:
            self._kept[name] = body
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f".{name}.{os.getpid()}"
        partial.write_bytes(body)
        partial.replace(self.directory / name)
