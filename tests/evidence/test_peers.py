"""Independent verifiers accept what is said to be good and refuse what is said to be bad, as far as they check it.

Each lives in an environment of its own, whose Python an environment variable names: `SNPBOOK_TINFOIL_PYTHON` (tinfoil
0.14) and `SNPBOOK_SEV_ATTEST_TOOL_PYTHON` (sev-attest-tool 0.2.4). They judge at the clock's time.
"""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snpbook.evidence.make import DEFECTS, make
from snpbook.evidence.maker import Recipe

PEERS = Path(__file__).parent / "peers"
SKIPPED_BY_TINFOIL = {"no-vek"}
REFUSED_BY_TINFOIL = {
    "changed-measurement", "critical-extension", "duplicate-extension", "expired", "not-yet-valid", "other-product",
    "policy-bit-17-clear", "policy-reserved-bit", "product-name-type", "report-cut-short",
    "report-version-1", "reserved-byte", "short-hwid", "unsigned", "vek-of-other-product", "vek-rsa-key",
    "vek-signature", "vek-version-1", "wrong-chip-id", "wrong-name", "wrong-signature", "wrong-tcb",
}  # fmt: skip


def answers(variable: str, script: str, *arguments: str | Path) -> dict[str, str]:
    """What the verifier says of each piece, by name."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python that has this verifier")
    command = [python, str(PEERS / script), *map(str, arguments)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split() for line in told.stdout.splitlines() if line.startswith("verdict ")]
    return {name: verdict for _, name, verdict in lines}


def written(folder: Path, defect: str | None = None, version: int | None = None) -> Path:
    recipe = Recipe(datetime.now(UTC).replace(microsecond=0), "genoa", version=version, seed="peers")
    kit, verdict = make(recipe, defect)
    for name, data in kit.files(defect, verdict).items():
        path = folder / (defect or "good") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / (defect or "good")


def test_tinfoil_under_our_roots(tmp_path: Path) -> None:
    names = [name for name, each in DEFECTS.items() if "vcek" in each.signers and name not in SKIPPED_BY_TINFOIL]
    if not os.environ.get("SNPBOOK_TINFOIL_PYTHON"):
        pytest.skip("SNPBOOK_TINFOIL_PYTHON names no Python that has tinfoil")
    folders = [written(tmp_path), *(written(tmp_path, name) for name in names)]
    told = answers("SNPBOOK_TINFOIL_PYTHON", "tinfoil_peer.py", "toy", *folders)
    assert told["good"] == "accepted"
    assert {name for name in REFUSED_BY_TINFOIL if told[name] == "accepted"} == set()


def test_tinfoil_under_amds_roots(tmp_path: Path) -> None:
    assert answers("SNPBOOK_TINFOIL_PYTHON", "tinfoil_peer.py", "real", written(tmp_path)) == {"good": "refused"}


def test_sev_attest_tool(tmp_path: Path) -> None:
    """Its own sample is a real report; ours must be refused, because its roots are AMD's."""
    folder = written(tmp_path, version=2)
    told = answers("SNPBOOK_SEV_ATTEST_TOOL_PYTHON", "sev_attest_tool_peer.py", folder)
    assert told == {"sample": "accepted", "changed-sample": "refused", "good": "refused"}
