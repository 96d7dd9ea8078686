"""Row A4: one verification beside tinfoil's, which makes the checks of ours that both make and some of the others.

tinfoil lives in an environment of its own, whose Python `SNPBOOK_TINFOIL_PYTHON` names, and judges at the clock's time.
Its process is kept, and verifies a batch for each line that it is sent. Both start from bytes with nothing remembered.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from snpbook.attest.certs import Certificate
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import verify
from snpbook.evidence.make import make
from snpbook.evidence.maker import Recipe
from snpbook.tools.bench.measure import Comparison, NotMeasurableError, Row, at_most
from snpbook.tools.bench.verification import forget

PYTHON = "SNPBOOK_TINFOIL_PYTHON"
BATCH = 20
"""Verifications for each line, so that sending it counts for nothing."""
_PEER = """
import base64, sys
from pathlib import Path
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tinfoil.attestation import attestation_sev, verify_sev
from tinfoil.attestation.validate_sev import ValidationOptions
folder, batch = Path(sys.argv[1]), int(sys.argv[2])
for name in ("ark", "ask"):
    root = x509.load_der_x509_certificate((folder / "certs" / f"{name}.der").read_bytes())
    setattr(verify_sev, f"{name.upper()}_CERT", root.public_bytes(Encoding.PEM))
document = base64.b64encode((folder / "report.bin").read_bytes()).decode()
vcek = (folder / "certs" / "vcek.der").read_bytes()
for _ in sys.stdin:
    for _ in range(batch):
        attestation_sev.verify_sev_report(document, False, ValidationOptions(), vcek)
    print("verified", flush=True)
"""


class _Peer:
    """tinfoil in its own process, with the toy roots in place of its own."""

    def __init__(self, python: str, files: dict[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for name, data in files.items():
            path = Path(self._folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        command = [python, "-c", _PEER, self._folder.name, str(BATCH)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> None:
        sent, told = self._process.stdin, self._process.stdout
        assert sent is not None
        assert told is not None
        try:
            sent.write("go\n")
            sent.flush()
        except OSError as error:
            raise NotMeasurableError(f"{PYTHON} is no Python with tinfoil: {error}") from None
        if told.readline() != "verified\n":
            raise NotMeasurableError("tinfoil did not accept the evidence; what it said is above")


def beside_tinfoil() -> Comparison:
    """Ours : theirs, on good Genoa evidence with its chain."""
    python = os.environ.get(PYTHON)
    if not python:
        raise NotMeasurableError(f"{PYTHON} names no Python that has tinfoil")
    now = datetime.now(UTC).replace(microsecond=0)
    kit, verdict = make(Recipe(now, "genoa", seed="bench"))
    files, roots = kit.files(None, verdict), named_roots("toy")
    ders = [files[f"certs/{name}.der"] for name in ("vcek", "ask", "ark")]

    def ours() -> None:
        forget()
        verify(files["report.bin"], [Certificate.read(der) for der in ders], roots, now)

    return Comparison(_Peer(python, files), ours, reference_units=BATCH)


ROWS = [Row("A4", "a first report and its chain : tinfoil", at_most(1), beside_tinfoil, optional=True)]
