"""`snpbook kds`: AMD's key distribution service, as a server for simulated chips and as a client of any such service.

`serve` speaks for the chips of named seeds, with toy keys; `fetch` asks the real service, or another, for what a report
needs. This is the command line's own HTTP client. Exit codes are those of `snpbook.cli.errors`.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import click

from snpbook.attest.bundle import Bundle
from snpbook.attest.chain import WITHOUT_CPUID
from snpbook.attest.kds import FetchFailed, KdsClient
from snpbook.attest.parse import Report
from snpbook.cli.errors import NotGenuine
from snpbook.cli.evidence_files import read_evidence
from snpbook.firmware.keys import Chip
from snpbook.spec.certificates import KDS_URL, PRODUCT_LINES
from snpbook.spec.kds import KdsStatus
from snpbook.spec.products import product as find_product
from snpbook.spec.products import product_names
from snpbook.spec.report import SigningKey
from snpbook.vendor.ca import ISSUED
from snpbook.vendor.kds import listen, url_of
from snpbook.vendor.kds import serve as serve_until
from snpbook.vendor.key_service import KeyService

PORT = 8765
ANSWER_SECONDS = 30.0
ANSWER_LIMIT = 1 << 20


@click.group(no_args_is_help=False)
def kds() -> None:
    """AMD's key distribution service: serve one for simulated chips, or fetch from one."""


@kds.command
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes a free one.")
@click.option("--seed", "seeds", multiple=True, default=("demo",), show_default=True, help="Chips; repeatable.")
@click.option(
    "--throttle", type=click.IntRange(min=1), metavar="N", help="429 beyond N requests per client and minute."
)
@click.option("--provider", "providers", multiple=True, metavar="SECRET=NAME", help="Who gets a VLEK; repeatable.")
def serve(address: str, port: int, seeds: tuple[str, ...], throttle: int | None, providers: tuple[str, ...]) -> None:
    """Serve the certificates of simulated chips until interrupted; all keys are toys.

    Each seed stands for one chip of every product, the one that `snpbook demo --seed` runs on. There are certificates
    for the TCB of the product's firmware and all older ones.
    """
    names = dict(provider.partition("=")[::2] for provider in providers)
    if not all((*names, *names.values())):
        raise click.UsageError("--provider is SECRET=NAME, such as s3cret=CN=csp.example.")
    chips = [Chip.from_seed(seed, product) for product in product_names() for seed in seeds]
    builds = {product: find_product(product).firmware for product in PRODUCT_LINES}
    published = {product: build.tcb for product, build in builds.items() if build}
    service = KeyService(
        chips, ISSUED, lambda: datetime.now(UTC), published=published, providers=names, throttle=throttle
    )
    listening = listen(port, address)
    click.echo(f"{service!r} at {url_of(listening)}")
    for chip in chips:
        if line := PRODUCT_LINES.get(chip.product):
            click.echo(f"{line.name:6} hwID {chip.chip_id[: line.hwid_size].hex()}")
    asyncio.run(serve_until(service, listening, Future()))


@kds.command
@click.argument("file")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", default=KDS_URL, show_default=True, help="The service.")
@click.option(
    "--product", type=click.Choice(list(PRODUCT_LINES), case_sensitive=False), help="For reports that do not name it."
)
def fetch(file: str, directory: Path, url: str, product: str | None) -> None:
    """Fetch what vouches for the report in FILE into DIRECTORY: chip certificate, chain, revocation list.

    What DIRECTORY holds already is not asked for again, except the revocation list. A VLEK comes from the cloud
    provider. Then `snpbook report verify FILE --certs DIRECTORY` has all it needs.
    """
    _, report = read_evidence(file)
    if report.fields.signing_key not in (SigningKey.VCEK, SigningKey.VLEK):
        raise NotGenuine(f"{file}: the report is unsigned", "No certificate vouches for it.")
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url: {url!r} is no http or https address.")
    client = KdsClient(http_get, time.sleep, directory, url)
    named = report.product or product
    bundle = _gather(client, report, (named,) if named else WITHOUT_CPUID)
    for each in (*bundle.certificates, *bundle.crls):
        click.echo(repr(each))


def _gather(client: KdsClient, report: Report, products: tuple[str, ...]) -> Bundle:
    """What the service has for a report of the first of the products whose chips it knows this one among."""
    for product in products[:-1]:
        try:
            return client.gather(report, product)
        except FetchFailed as error:
            if error.status != KdsStatus.NOT_FOUND:
                raise
    return client.gather(report, products[-1])


def http_get(url: str) -> tuple[int, bytes]:
    """Status and body of an address: the fetch function of `KdsClient`."""
    try:
        with urlopen(url, timeout=ANSWER_SECONDS) as response:
            return response.status, response.read(ANSWER_LIMIT)
    except HTTPError as answer:
        with answer:
            return answer.code, answer.read(ANSWER_LIMIT)
    except HTTPException as error:
        raise OSError(f"no answer in HTTP: {error!r}") from error
