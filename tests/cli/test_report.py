"""`snpbook report`: exit codes and messages over real evidence, toy evidence, and files that are none."""

import os
import subprocess
import sys
from base64 import b64encode
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from snpbook.spec import guid
from snpbook.spec.resources import resource
from tests.attest.own_chain import CHIP_ID
from tests.attest.test_certs import pem
from tests.attest.test_evidence import table
from tests.attest.vectors import VECTORS, chain_file, needs_vectors, real_report, report_file, vcek_file
from tests.cli.report_runs import CHAIN, JUNE, Run, evidence, run

__all__ = ["evidence", "run"]

DEBUG = 1 << 19


@needs_vectors
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_real_reports_are_accepted(name: str, run: Run) -> None:
    ending = run("verify", report_file(name), "--certs", vcek_file(name), "--certs", chain_file(name), *JUNE)
    assert ending.code == 0
    assert ending.output.endswith("verdict   accepted\n")
    assert "roots     amd\n" in ending.output
    assert f"product   {name}\n" in ending.output
    assert "  skipped  chain.revocation" in ending.output


@needs_vectors
def test_a_report_may_come_on_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = ["--certs", vcek_file("milan"), "--certs", chain_file("milan"), *JUNE]
    for command, code in ((["show", "-"], 0), (["verify", "-", *certificates], 0), (["verify", "-"], 3)):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(report_file("milan").read_bytes())))
        assert run(*command).code == code
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"")))
    assert run("show", "-").code == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in run("show", "-").errors


@needs_vectors
def test_who_refuses_is_told(run: Run, tmp_path: Path) -> None:
    report = [report_file("milan"), "--certs", vcek_file("milan"), "--certs", chain_file("milan"), *JUNE]
    (tmp_path / "own.toml").write_text("vmpl = 3\n")
    for options, told in (
        (["--nonce", "00"], "refused for the nonce: nonce"),
        (["--nonce", "00", "--policy", "none"], "refused for the nonce: nonce"),
        (["--nonce", "00", "--policy", tmp_path / "own.toml"], "own.toml: policy.vmpl (expected 3, found 0), nonce"),
    ):
        ending = run("verify", *report, *options)
        assert (ending.code, told in ending.errors) == (4, True)


@needs_vectors
def test_a_real_report_with_debugging_on_is_refused_by_policy(run: Run) -> None:
    name = "milan-debug"
    ending = run("verify", report_file(name), "--certs", vcek_file(name), "--certs", chain_file(name), *JUNE)
    assert ending.code == 4
    assert ending.output.endswith("verdict   genuine, refused by policy\n")
    assert "refused by policy default: policy.allow_debug (expected debug off, found debug on)" in ending.errors


@needs_vectors
def test_a_flipped_byte_is_not_genuine(run: Run, tmp_path: Path) -> None:
    """The two damages that the publishers of the vectors name, and one in the signature."""
    report, vcek = real_report("milan"), vcek_file("milan").read_bytes()
    chain = ["--certs", chain_file("milan"), *JUNE]
    for offset in (21, 0x2A0):
        damaged = bytearray(report)
        damaged[offset] ^= 0x80
        (tmp_path / "report.bin").write_bytes(damaged)
        ending = run("verify", tmp_path / "report.bin", "--certs", vcek_file("milan"), *chain)
        assert ending.code == 3
        assert ending.output.endswith("verdict   not genuine\n")
        assert "the report's signature is not by the VEK" in ending.errors
    (tmp_path / "vcek.der").write_bytes(vcek[:40] + bytes([vcek[40] ^ 0xFF]) + vcek[41:])
    assert run("verify", report_file("milan"), "--certs", tmp_path / "vcek.der", *chain).code == 3


@needs_vectors
def test_a_folder_of_certificates(run: Run, tmp_path: Path) -> None:
    for path in (*(VECTORS / "chains").iterdir(), vcek_file("genoa"), vcek_file("milan")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "crl.der").write_bytes(b"\x30\x03\x02\x01\x00")
    (tmp_path / "notes.pem").write_text("no certificate")
    (tmp_path / "deeper.pem").mkdir()
    for name in ("milan", "genoa"):
        ending = run("verify", report_file(name), "--certs", tmp_path, *JUNE)
        assert ending.code == 0
        assert [line.split()[2] for line in ending.output.splitlines() if line.startswith("left out")] == [
            f"{tmp_path / left}:" for left in ("crl.der", "notes.pem")
        ]


@needs_vectors
def test_a_missing_certificate_is_named_with_its_address(run: Run) -> None:
    ending = run("verify", report_file("genoa"), "--certs", chain_file("genoa"))
    assert ending.code == 3
    assert "no VCEK certificate" in ending.errors
    assert "https://kdsintf.amd.com/vcek/v1/Genoa/b1e24a27" in ending.errors
    ending = run("verify", report_file("genoa"), "--certs", vcek_file("genoa"))
    assert ending.code == 3
    assert "ARK-Genoa" in ending.errors
    assert "https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain" in ending.errors
    either = run("verify", report_file("milan")).errors
    assert "https://kdsintf.amd.com/vcek/v1/Milan/" in either
    assert "https://kdsintf.amd.com/vcek/v1/Genoa/" in either
    assert "https://kdsintf.amd.com/vcek/v1/Milan/" in run("verify", report_file("milan"), "--product", "Milan").errors


def test_own_roots_from_a_file(run: Run, evidence: Path) -> None:
    arguments = ["verify", evidence / "report.bin", "--certs", evidence / "chain.pem", *JUNE]
    ending = run(*arguments, "--roots", evidence / "own.pem")
    assert ending.code == 0
    assert f"roots     {evidence / 'own.pem'}\n" in ending.output
    for roots in ("amd", "toy"):
        ending = run(*arguments, "--certs", evidence / "own.pem", "--roots", roots)
        assert ending.code == 3
        assert "not one of the pinned roots" in ending.errors
    assert run(*arguments, "--roots", evidence / "chain.pem").code == 2
    assert run(*arguments, "--roots", evidence / "report.bin").code == 2
    assert run(*arguments, "--roots", evidence / "missing.pem").code == 2


def test_toy_evidence_says_that_it_is_toy(run: Run, evidence: Path) -> None:
    """The VCEK is our own, signed with the toy ASK's key, which everybody knows."""
    toy = [resource("data", "roots", "toy", f"toy_milan_{name}.pem") for name in ("ask", "ark")]
    (evidence / "vcek.der").write_bytes(CHAIN.vek.der)
    arguments = ["verify", evidence / "report.bin", *JUNE]
    for path in (evidence / "vcek.der", *toy):
        arguments += ["--certs", path]
    ending = run(*arguments, "--roots", "toy")
    assert ending.code == 0
    assert ending.output.startswith("roots     toy: keys that everybody knows")
    assert run(*arguments).code == 3


def test_certificates_of_the_reports_own_table(run: Run, evidence: Path) -> None:
    entries = [(guid.CERT_VCEK, CHAIN.vek.der), (guid.CERT_ASK, CHAIN.ask.der), (guid.CERT_ARK, CHAIN.ark.der)]
    path = evidence / "extended.bin"
    path.write_bytes(CHAIN.report() + table(entries))
    assert run("verify", path, "--roots", evidence / "own.pem", *JUNE).code == 0
    ending = run("verify", path, *JUNE)
    assert (ending.code, "pinned roots of amd" in ending.errors) == (3, True)
    assert "3 in the report's own table" in run("show", path).output
    path.write_bytes(CHAIN.report() + table(entries)[:-1])
    assert run("verify", path, *JUNE).code == 2
    path.write_bytes(CHAIN.report() + table([(guid.CERT_VCEK, CHAIN.vek.der[:-1])]))
    assert run("verify", path, *JUNE).code == 2
    path.write_bytes(CHAIN.report() + table([(guid.CERT_VCEK, b"\x30\0")]))
    assert run("verify", path, *JUNE).code == 3


def test_the_configured_folder(run: Run, evidence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", evidence / "report.bin", "--roots", evidence / "own.pem", *JUNE]
    assert run(*arguments).code == 3
    monkeypatch.setenv("SNPBOOK_CERTS", str(evidence))
    assert run(*arguments).code == 0
    monkeypatch.setenv("SNPBOOK_CERTS", str(evidence / "nowhere"))
    ending = run(*arguments)
    assert (ending.code, "SNPBOOK_CERTS" in ending.errors) == (2, True)


def test_time_and_product_are_the_callers(run: Run, evidence: Path) -> None:
    arguments = ["verify", evidence / "report.bin", "--certs", evidence / "chain.pem", "--roots", evidence / "own.pem"]
    for now in ("2025-01-01", "2026-06-01T12:00:00Z", "2026-06-01T12:00:00+02:00", "2032-01-01T00:00:00"):
        assert run(*arguments, "--now", now).code == 0
    for now in ("2024-12-31T23:59:59Z", "2032-01-01T00:00:01Z", "2025-01-01T00:00:00+02:00"):
        assert "not valid at this time" in run(*arguments, "--now", now).errors
    for now in ("yesterday", "2026-13-01", ""):
        assert run(*arguments, "--now", now).code == 64
    assert run(*arguments, *JUNE, "--product", "milan").code == 0
    assert run(*arguments, *JUNE, "--product", "Genoa").code == 3
    assert run(*arguments, *JUNE, "--product", "Naples").code == 64
    assert run("verify").code == 64
    assert run("verify", evidence / "report.bin", "surplus").code == 64


def test_policy_comes_after_genuineness(run: Run, evidence: Path) -> None:
    debug = CHAIN.report(policy=0x30000 | DEBUG)
    (evidence / "report.bin").write_bytes(debug)
    arguments = ["verify", evidence / "report.bin", "--certs", evidence / "chain.pem", *JUNE]
    assert run(*arguments, "--roots", evidence / "own.pem").code == 4
    assert run(*arguments).code == 3


NO_REPORT = {
    "nothing": b"",
    "five bytes": b"hello",
    "text": b"This is a text file.\n" * 100,
    "truncated": CHAIN.report()[:-1],
    "truncated hex": CHAIN.report().hex().encode()[:-2],
    "odd hex": CHAIN.report().hex().encode()[:-1],
    "a byte too many": CHAIN.report() + b"\n",
    "cut base64": b64encode(CHAIN.report())[:-4],
    "a certificate": pem(CHAIN.vek.der),
}


@pytest.mark.parametrize("name", NO_REPORT)
def test_files_that_are_no_report(name: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.bin"
    path.write_bytes(NO_REPORT[name])
    for command in ("show", "verify"):
        ending = run(command, path)
        assert (ending.code, ending.output) == (2, "")
        assert ending.errors.startswith(f"snpbook: {path}: ")
    path.unlink()
    assert run("verify", path).code == 2
    assert run("show", tmp_path).code == 2


NO_CERTIFICATE = {
    "text": (b"no certificate", 2),
    "another PEM": (pem(CHAIN.vek.der, "PUBLIC KEY"), 2),
    "broken armour": (pem(CHAIN.vek.der)[:-20], 2),
    "PEM of noise": (pem(b"noise"), 2),
    "truncated": (CHAIN.vek.der[:-1], 2),
    "PEM of something else": (pem(b"\x30\x03\x02\x01\x05"), 3),
    "DER of something else": (b"\x30\x03\x02\x01\x05", 3),
}


@pytest.mark.parametrize("name", NO_CERTIFICATE)
def test_files_that_are_no_certificate(name: str, run: Run, evidence: Path) -> None:
    content, code = NO_CERTIFICATE[name]
    path = evidence / "vcek.pem"
    path.write_bytes(content)
    ending = run("verify", evidence / "report.bin", "--certs", path, *JUNE)
    assert ending.code == code
    assert ending.errors.startswith(f"snpbook: {path}: ")


def test_show_decodes_and_believes_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.bin"
    body = CHAIN.report(version=3, cpuid_family=0x19, cpuid_model=1, policy=0x30000 | DEBUG, platform_info=5)
    path.write_bytes(body[:0x300] + b"\xff" + body[0x301:0x330] + b"\1" + body[0x331:])
    ending = run("show", path)
    assert ending.code == 0
    shown = {line[:20].strip(): line[21:] for line in ending.output.splitlines()}
    assert shown["policy"] == "0xb0000  smt one debug"
    assert shown["platform_info"] == "0x5  smt_en ecc_en"
    assert shown["reported_tcb"] == "0xde08000000000003  bl 3 tee 0 snp 8 ucode 0xde"
    assert shown["signing_key"] == "VCEK"
    assert shown["chip_id"] == CHIP_ID.hex()
    assert shown["product"] == "milan"
    assert shown["reserved bytes set"] == "0x330"


@needs_vectors
def test_as_a_process() -> None:
    command = [sys.executable, "-W", "error", "-m", "snpbook", "report", "verify", str(report_file("genoa")), *JUNE]
    certificates = ["--certs", str(vcek_file("genoa")), "--certs", str(chain_file("genoa"))]
    environment = {**os.environ, "SNPBOOK_CERTS": ""}
    for arguments, code in ((certificates, 0), (certificates[:2], 3), (["--roots", "nowhere"], 2), (["--what"], 64)):
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == code
        assert "Traceback" not in run.stderr
        assert "\x1b" not in run.stdout
    program = "import sys, snpbook.attest; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@needs_vectors
def test_numpy_is_not_loaded() -> None:
    """Nor rich: both commands, run to their ends."""
    certificates = ["--certs", str(vcek_file("genoa")), "--certs", str(chain_file("genoa")), *JUNE]
    commands = [["report", "show", str(report_file("genoa"))], ["report", "verify", str(report_file("genoa"))]]
    program = """
import sys
from snpbook.cli.main import main
assert main(sys.argv[1:]) == 0
sys.exit('numpy' in sys.modules or 'rich' in sys.modules)
"""
    for command, options in zip(commands, ([], certificates), strict=True):
        arguments = [sys.executable, "-c", program, *command, *options]
        assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
