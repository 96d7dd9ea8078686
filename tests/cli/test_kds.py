"""`snpbook kds`: a served fleet, fetched from by the same command, and what it says when that fails."""

import http.client
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snpbook.cli import kds as command
from snpbook.cli.main import main
from snpbook.firmware.keys import Chip
from snpbook.spec.products import product
from snpbook.vendor import kds
from snpbook.vendor.ca import ISSUED
from snpbook.vendor.key_service import KeyService
from tests.attest.test_kds import CHIPS, report

NOW = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture
def service() -> Iterator[str]:
    """The base URL of a running service that knows the chips of `tests.attest.test_kds`."""
    with kds.start(KeyService(CHIPS.values(), ISSUED, lambda: NOW)) as running:
        yield running.url


@pytest.mark.parametrize(("name", "version"), [("milan", 2), ("genoa", 2), ("milan", 3), ("turin", 5)])
def test_what_is_fetched_verifies_a_report(
    name: str, version: int, service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, certs = tmp_path / "report.bin", tmp_path / "certs"
    file.write_bytes(report(name, version).raw)
    assert main(["kds", "fetch", str(file), str(certs), "--url", service]) == 0
    assert capsys.readouterr().out.count("\n") == 4, "VCEK, ASK, ARK, revocation list"
    arguments = ["report", "verify", str(file), "--certs", str(certs), "--roots", "toy", "--now", NOW.isoformat()]
    assert main(arguments) == 0
    assert "skipped  chain.revocation" not in capsys.readouterr().out


def test_another_product_is_tried_where_the_chip_is_unknown_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(status: int) -> list[str]:
        urls: list[str] = []
        monkeypatch.setattr(command, "http_get", lambda url: (urls.append(url), (status, b""))[1])
        file = tmp_path / "report.bin"
        file.write_bytes(report("milan", 2).raw)
        assert main(["kds", "fetch", str(file), str(tmp_path / "certs")]) == 1
        return [url.split("/")[5] for url in urls]

    assert asked(404) == ["Milan", "Genoa"]
    assert asked(400) == ["Milan"]


def test_failures_are_told_in_two_lines(service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def errors(*arguments: str | Path, code: int) -> str:
        assert main(["kds", *map(str, arguments)]) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert 1 <= told.err.count("\n") <= 2
        return told.err

    file, masked, unsigned = (tmp_path / name for name in ("report.bin", "masked.bin", "unsigned.bin"))
    raw = report("milan").raw
    file.write_bytes(raw)
    masked.write_bytes(raw[:0x1A0] + bytes(64) + raw[0x1E0:])
    unsigned.write_bytes(raw[:0x48] + b"\x1c" + raw[0x49:])
    certs = tmp_path / "certs"
    assert "unsigned" in errors("fetch", unsigned, certs, "--url", service, code=3)
    assert "masks" in errors("fetch", masked, certs, "--url", service, code=1)
    assert "answered 404" in errors("fetch", file, certs, "--url", f"{service}/elsewhere", code=1)
    assert "no http" in errors("fetch", file, certs, "--url", "file:///etc/passwd", code=64)
    assert "cannot be read" in errors("fetch", tmp_path / "none.bin", certs, code=2)
    assert "SECRET=NAME" in errors("serve", "--provider", "secret", code=64)
    assert "in use" in errors("serve", "--port", service.rpartition(":")[2], code=1)


def test_http_get_gives_status_and_body_or_an_os_error(service: str) -> None:
    assert command.http_get(f"{service}/vcek/v1/Turin/cert_chain")[0] == 200
    assert command.http_get(f"{service}/nothing") == (404, b"Not Found: no such path or product\n")
    listening = kds.listen()
    free = kds.url_of(listening)
    listening.close()
    with pytest.raises(OSError, match="refused"):
        command.http_get(free)


def test_serve_speaks_for_the_chips_of_its_seeds_until_it_is_interrupted() -> None:
    arguments = ["kds", "serve", "--port", "0", "--seed", "one", "--seed", "two", "--provider", "s=CN=csp.example"]
    process = subprocess.Popen(
        [sys.executable, "-m", "snpbook", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    host = re.search(r"http://(\S+)", process.stdout.readline())
    assert host
    connection = http.client.HTTPConnection(host[1], timeout=20)

    def status(target: str, **headers: str) -> int:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status

    firmware = product("genoa").firmware
    assert firmware is not None
    newest = firmware.tcb
    query = "blSPL={}&teeSPL={}&snpSPL={}&ucodeSPL={}"
    current = query.format(newest.bootloader, newest.tee, newest.snp, newest.microcode)
    for seed, expected in (("one", 200), ("two", 200), ("three", 404)):
        chip = Chip.from_seed(seed, "genoa").chip_id.hex()
        assert status(f"/vcek/v1/Genoa/{chip}?{current}") == expected
    chip = Chip.from_seed("one", "genoa").chip_id.hex()
    assert status(f"/vcek/v1/Genoa/{chip}?{query.format(127, 127, 127, 255)}") == 404
    assert status(f"/cek/id/{Chip.from_seed('one', 'naples').chip_id.hex()}") == 200
    assert status(f"/vlek/v1/Genoa/cert?{current}") == 401
    assert status(f"/vlek/v1/Genoa/cert?{current}", Authorization="Bearer s") == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip()) == (130, "")
