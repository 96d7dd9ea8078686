"""The KDS on a socket: under load, and before clients that are slow, rude or many, every answer has its status."""

import asyncio
import gc
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

import pytest

from snpbook.firmware.keys import Chip
from snpbook.vendor import kds
from snpbook.vendor.key_service import KeyService
from tests.sampling import ALL

ISSUED = datetime(2026, 1, 1, tzinfo=UTC)
CHIP = Chip.from_seed("chip", "genoa")
GENOA = f"/vcek/v1/Genoa/{CHIP.chip_id.hex()}"
GOOD = f"{GENOA}?blSPL=10&teeSPL=0&snpSPL=23&ucodeSPL=84"
MIXED = [
    (GOOD, 200),
    ("/vcek/v1/Genoa/cert_chain", 200),
    ("/vlek/v1/Genoa/crl", 200),
    (GENOA, 400),
    ("/vcek/v1/Genoa/..%2f..%2f..%2fetc%2fpasswd", 400),
    ("/../../../../etc/passwd", 404),
    ("/vcek/v1/Genoa/../../../../etc/passwd", 404),
    ("/vlek/v1/Genoa/cert?" + GOOD.partition("?")[2], 401),
    ("/" + "x" * 9000, 414),
    (f"{GENOA}?{'blSPL=1&' * 10_000}", 414),
]
REQUESTS, CLIENTS = (50_000, 200) if ALL else (2_000, 50)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[kds.RunningService]:
    """A service with little patience, which logs nothing."""
    monkeypatch.setattr(kds, "TIMEOUT", 0.5)
    with kds.start(KeyService([CHIP], ISSUED, lambda: ISSUED)) as running:
        yield running
    assert caplog.text == ""


def connect(server: kds.RunningService) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)


def ask(connection: http.client.HTTPConnection, target: str, method: str = "GET") -> tuple[int, bytes]:
    connection.request(method, target)
    response = connection.getresponse()
    return response.status, response.read()


def said(server: kds.RunningService, *parts: bytes, pause: float = 0) -> bytes:
    """What the service says to raw bytes, until it hangs up."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        answer = b""
        while data := client.recv(1 << 16):
            answer += data
        return answer


def memory() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_answers_are_the_services(server: kds.RunningService) -> None:
    connection = connect(server)
    connection.request("GET", GOOD)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/pkix-cert"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.read() == KeyService([CHIP], ISSUED, lambda: ISSUED).answer(GOOD).body
    connection.request("HEAD", GOOD)
    response = connection.getresponse()
    assert (int(response.headers["Content-Length"]) > 1000, response.read()) == (True, b"")
    assert ask(connection, "http://kdsintf.amd.com" + GOOD)[0] == 200
    connection.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_only_get_and_head_are_allowed(server: kds.RunningService, method: str) -> None:
    connection = connect(server)
    assert ask(connection, GOOD, method)[0] == 405
    connection.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_clients_with_good_and_bad_requests(server: kds.RunningService) -> None:
    def client(count: int) -> list[tuple[str, int, bytes]]:
        connection = connect(server)
        answers = [(target, *ask(connection, target)) for target, _ in islice(cycle(MIXED), count)]
        connection.close()
        return answers

    def storm() -> list[tuple[str, int, bytes]]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return [one for many in pool.map(client, [REQUESTS // CLIENTS] * CLIENTS) for one in many]

    storm()
    before = memory()
    answers = storm()
    assert memory() - before < 16 << 20
    assert len(answers) == REQUESTS
    assert {(target, status) for target, status, _ in answers} == set(MIXED)
    assert len({body for target, _, body in answers if target == GOOD}) == 1, "the same bytes each time"


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 5 << 20])
def test_a_header_of_more_than_a_mebibyte_is_answered(server: kds.RunningService, size: int) -> None:
    line = b"GET /" + b"a" * size + b" HTTP/1.1\r\n\r\n"
    assert said(server, line).startswith(b"HTTP/1.1 414 URI Too Long\r\n")
    fields = b"GET / HTTP/1.1\r\n" + b"name: value\r\n" * (size // 13 + 1) + b"\r\n"
    assert said(server, fields).startswith(b"HTTP/1.1 414 ")


def test_a_header_below_a_mebibyte_is_read(server: kds.RunningService) -> None:
    head, tail = b"GET /vcek/v1/Genoa/crl HTTP/1.1\r\nConnection: close\r\nfiller: ", b"\r\n\r\n"
    filler = b"a" * ((1 << 20) - len(head + tail))
    assert said(server, head + filler[1:] + tail).startswith(b"HTTP/1.1 200 ")
    assert said(server, head + filler + b"a" + tail).startswith(b"HTTP/1.1 414 ")


@pytest.mark.parametrize("rubbish", [b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\n\n"])
def test_what_is_no_request_is_a_bad_one(server: kds.RunningService, rubbish: bytes) -> None:
    assert said(server, rubbish).startswith(b"HTTP/1.1 400 ")


def test_a_slow_client_has_its_time_and_no_more(server: kds.RunningService) -> None:
    request = b"GET " + GOOD.encode() + b" HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert said(server, request[:7], request[7:], pause=0.1).startswith(b"HTTP/1.1 200 ")
    start = time.monotonic()
    assert said(server, request[:-1]).startswith(b"HTTP/1.1 408 ")
    assert said(server).startswith(b"HTTP/1.1 408 "), "one that says nothing"
    assert said(server, b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab") == b"", "a body that does not come"
    assert time.monotonic() - start < 5
    assert said(server, request).startswith(b"HTTP/1.1 200 ")


def test_who_does_not_read_is_cut_off(server: kds.RunningService) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect((host, int(port)))
        asked = cycle([b"GET /vcek/v1/Genoa/cert_chain HTTP/1.1\r\n\r\n" * 100])
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            deque(map(client.sendall, asked), maxlen=0)


def test_connections_are_capped_and_come_free_again(
    server: kds.RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kds, "CONNECTIONS", 3)
    monkeypatch.setattr(kds, "TIMEOUT", 10)
    held = [connect(server) for _ in range(3)]
    assert [ask(connection, GOOD)[0] for connection in held] == [200] * 3
    with closing(connect(server)) as one_more:
        assert ask(one_more, GOOD)[0] == 503
    assert [ask(connection, GOOD)[0] for connection in held] == [200] * 3
    for connection in held:
        connection.close()
    time.sleep(0.2)
    with closing(connect(server)) as fresh:
        assert ask(fresh, GOOD)[0] == 200


def test_throttling_is_per_address() -> None:
    with kds.start(KeyService([CHIP], ISSUED, lambda: ISSUED, throttle=2)) as running:
        connection = connect(running)
        assert [ask(connection, GOOD)[0] for _ in range(4)] == [200, 200, 429, 429]
        connection.close()


def test_a_service_ends_with_its_thread_and_its_connections() -> None:
    running = kds.start(KeyService([], ISSUED, lambda: ISSUED))
    connection = connect(running)
    assert ask(connection, "/vcek/v1/Milan/cert_chain")[0] == 200
    assert repr(running) == f"<KDS at {running.url}>"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "kds")
    running.stop()
    running.stop()
    assert repr(running).endswith(", stopped>")
    assert not [thread for thread in threading.enumerate() if thread.name == "kds"]
    with pytest.raises(OSError, match=r"refused|reset|Remote end"):
        ask(connection, "/")
    connection.close()


def test_cells_of_a_notebook_whose_own_loop_runs_can_ask() -> None:
    async def cell() -> int:
        with kds.start(KeyService([CHIP], ISSUED, lambda: ISSUED)) as running, closing(connect(running)) as connection:
            return ask(connection, GOOD)[0]

    assert asyncio.run(cell()) == 200


def test_a_process_may_end_while_it_serves() -> None:
    script = """
import urllib.request
from datetime import UTC, datetime
from snpbook.vendor import kds
from snpbook.vendor.key_service import KeyService
running = kds.start(KeyService([], datetime(2026, 1, 1, tzinfo=UTC), lambda: datetime(2026, 1, 1, tzinfo=UTC)))
with urllib.request.urlopen(running.url + "/vcek/v1/Milan/cert_chain") as answer:
    print(answer.status)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "200\n", "")


def test_a_port_that_is_taken_is_said_at_once(server: kds.RunningService) -> None:
    with pytest.raises(OSError, match="in use"):
        kds.start(KeyService([], ISSUED, lambda: ISSUED), int(server.url.rpartition(":")[2]))


def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        listening = kds.listen(address="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert kds.url_of(listening).startswith("http://[::1]:")
    listening.close()
