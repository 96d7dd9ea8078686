"""The pytest plugin, as somebody else's test suite uses it."""

import os
import subprocess
import sys
from pathlib import Path

SUITE = """
import pytest
from snpbook.attest.roots import named_roots
from snpbook.testing.evidence import defect_names

@pytest.mark.parametrize("defect", [None, *defect_names("vlek")[:1]])
def test_our_verifier(snp_evidence, defect):
    kit, verdict = snp_evidence(defect, product="milan", signer="vlek")
    assert kit.judge(named_roots("toy")) == verdict
    assert (verdict.check is None) == (defect is None or defect.startswith("report-") or defect.startswith("crl"))
"""


def test_a_suite_elsewhere_uses_the_fixture(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["snpbook.testing.evidence"]\n')
    (tmp_path / "test_verifier.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."]
    told = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "2 passed" in told.stdout, told.stdout + told.stderr
