"""A real `snpbook lab` for a test: started on a free port, asked until it answers, ended by its own process id."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKEN = "test"
PATIENCE = 60


@contextmanager
def lab_server(cwd: Path, **environment: str) -> Iterator[str]:
    """The base address of a `snpbook lab` started in `cwd`; requests carry `?token=` and `TOKEN`."""
    port = free_port()
    with serving(cwd, port, "snpbook", "lab", "--no-browser", "--port", str(port), "--", **environment) as base:
        yield base


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(cwd: Path, port: int, module: str, *arguments: str, **environment: str) -> Iterator[str]:
    """The base address of the Lab that `python -m module arguments` starts in `cwd` on `port`."""
    command = [sys.executable, "-m", module, *arguments]
    command += [f"--IdentityProvider.token={TOKEN}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    log = cwd / "lab.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output, env={**os.environ, **environment})
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                ask(base, "/api")
                break
            except urllib.error.URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield base
    finally:
        process.terminate()
        process.wait(PATIENCE)


def ask(base: str, path: str) -> Any:
    """The JSON that the server answers for a path of its API."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{base}{path}?token={TOKEN}", timeout=PATIENCE) as answer:
        return json.load(answer)
