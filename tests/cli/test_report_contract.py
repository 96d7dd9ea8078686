"""`snpbook report`: policies, nonces, revocation lists, JSON, later versions, and which stage decides."""

import json
from base64 import b64encode
from pathlib import Path

import pytest

from snpbook.spec import guid
from tests.attest.own_chain import CHIP_ID
from tests.attest.test_certs import pem
from tests.attest.test_evidence import answer, table
from tests.cli.report_runs import CHAIN, JUNE, Run, evidence, run

__all__ = ["evidence", "run"]
DEBUG, MIGRATE = 1 << 19, 1 << 18
NONCE = bytes(range(1, 33))


@pytest.fixture
def arguments(evidence: Path) -> list[str]:
    """Verify the folder's report under its own root."""
    files = ["--certs", evidence / "chain.pem", "--roots", evidence / "own.pem"]
    return ["verify", str(evidence / "report.bin"), *map(str, files), *JUNE]


def test_the_policy_is_told_by_name(run: Run, evidence: Path, arguments: list[str]) -> None:
    assert "policy    default: debug and migrate_ma off, nothing else\n" in run(*arguments).output
    assert "policy    none\n" in run(*arguments, "--policy", "none").output
    policy = evidence / "policy.toml"
    policy.write_text(f'name = "strict"\nchip_id = "{CHIP_ID.hex()}"\nvmpl = 0\n')
    ending = run(*arguments, "--policy", policy)
    assert ending.code == 0
    assert "policy    strict\n" in ending.output
    assert "  passed   policy.chip_id" in ending.output


@pytest.mark.parametrize(("bit", "option"), [(DEBUG, "allow_debug"), (MIGRATE, "allow_migrate_ma")])
def test_the_built_in_policy(bit: int, option: str, run: Run, evidence: Path, arguments: list[str]) -> None:
    (evidence / "report.bin").write_bytes(CHAIN.report(policy=0x30000 | bit))
    ending = run(*arguments)
    assert (ending.code, f"policy.{option}" in ending.errors) == (4, True)
    assert run(*arguments, "--policy", "none").code == 0
    (evidence / "policy.toml").write_text(f"{option} = true\n")
    assert run(*arguments, "--policy", evidence / "policy.toml").code == 0


def test_every_failed_rule_is_told(run: Run, evidence: Path, arguments: list[str]) -> None:
    (evidence / "policy.toml").write_text('vmpl = 3\nhost_data = "' + "aa" * 32 + '"\n')
    ending = run(*arguments, "--policy", evidence / "policy.toml")
    assert ending.code == 4
    assert "policy.vmpl (expected 3, found 0)" in ending.errors
    assert "policy.host_data" in ending.errors


@pytest.mark.parametrize("text", ["vmpl = 7", "no_such_option = 1", "vmpl = ", "\xff"])
def test_a_policy_that_is_none_is_malformed(text: str, run: Run, evidence: Path, arguments: list[str]) -> None:
    (evidence / "policy.toml").write_bytes(text.encode("latin-1"))
    ending = run(*arguments, "--policy", evidence / "policy.toml")
    assert (ending.code, "policy.toml: " in ending.errors) == (2, True)
    assert run(*arguments, "--policy", evidence / "missing.toml").code == 2


def test_the_nonce(run: Run, evidence: Path, arguments: list[str]) -> None:
    (evidence / "report.bin").write_bytes(CHAIN.report(report_data=NONCE.ljust(64, b"\0")))
    for nonce, code in (
        (NONCE, 0), (NONCE + b"\0", 0), (NONCE.ljust(64, b"\0"), 0), (NONCE[:-1], 4), (NONCE + b"\1", 4), (b"\0", 4),
    ):  # fmt: skip
        for policy in ([], ["--policy", "none"]):
            ending = run(*arguments, *policy, "--nonce", nonce.hex())
            assert ending.code == code
            assert f"{'passed' if code == 0 else 'failed'}   nonce" in ending.output
    for nonce in ("", "0", "zz", "00" * 65):
        assert run(*arguments, "--nonce", nonce).code == 64
    (evidence / "report.bin").write_bytes(CHAIN.report())
    assert run(*arguments, "--nonce", "00").code == 0


def test_the_lowest_stage_decides(run: Run, evidence: Path, arguments: list[str]) -> None:
    """A report that is wanted by nobody, not genuine either, beside files that are malformed."""
    (evidence / "report.bin").write_bytes(CHAIN.report(policy=0x30000 | DEBUG)[:-1] + b"\1")
    (evidence / "broken.toml").write_text("x")
    (evidence / "broken.pem").write_text("-----BEGIN CERTIFICATE-----")
    (evidence / "strange.pem").write_bytes(pem(b"\x30\x03\x02\x01\x05"))
    assert run(*arguments).code == 3
    assert run(*arguments, "--certs", evidence / "strange.pem").code == 3
    for broken in (
        ["--policy", evidence / "broken.toml"],
        ["--certs", evidence / "broken.pem"],
        ["--certs", evidence / "strange.pem", "--certs", evidence / "broken.pem"],
        ["--certs", evidence / "strange.pem", "--policy", evidence / "broken.toml"],
        ["--certs", evidence / "missing.pem"],
    ):
        assert run(*arguments, *broken).code == 2
    (evidence / "report.bin").write_bytes(CHAIN.report()[:-1])
    assert run(*arguments, "--certs", evidence / "strange.pem").code == 2
    assert run(*arguments, "--certs", evidence / "strange.pem", "--nonce", "x").code == 64


def test_revocation_lists(run: Run, evidence: Path, arguments: list[str]) -> None:
    """From a file, in both forms, from a directory, and from the evidence's own table."""
    assert "  skipped  chain.revocation" in run(*arguments).output
    for name, serials, code in (("good", (), 0), ("revoked", (7,), 3)):
        crl = CHAIN.crl(*serials)
        (evidence / f"{name}.crl").write_bytes(crl.der)
        (evidence / f"{name}.pem").write_bytes(pem(crl.der, "X509 CRL"))
        for path in (evidence / f"{name}.crl", evidence / f"{name}.pem"):
            ending = run(*arguments, "--certs", path)
            assert ending.code == code
            assert "skipped  chain.revocation" not in ending.output
        (evidence / "report.bin").write_bytes(CHAIN.report() + table([(guid.CERT_CRL, crl.der)]))
        assert run(*arguments).code == code
    ending = run(*arguments, "--certs", evidence)
    assert (ending.code, "SEV-Milan is revoked" in ending.errors) == (3, True)


def test_forms_of_a_report(run: Run, evidence: Path, arguments: list[str]) -> None:
    report = CHAIN.report()
    for form in (report.hex().encode(), b64encode(report), answer() + report, answer() + report + bytes(2784)):
        (evidence / "report.bin").write_bytes(form)
        assert run(*arguments).code == 0
    (evidence / "report.bin").write_bytes(answer(0x16) + bytes(1184))
    assert run(*arguments).code == 2


def test_a_directory_of_configfs_tsm(run: Run, evidence: Path, arguments: list[str]) -> None:
    folder = evidence / "tsm"
    folder.mkdir()
    (folder / "outblob").write_bytes(CHAIN.report())
    (folder / "auxblob").write_bytes(table([(guid.CERT_VCEK, CHAIN.vek.der)]))
    (folder / "provider").write_text("sev_guest\n")
    (folder / "generation").write_text("1\n")
    (evidence / "chain.pem").write_bytes(pem(CHAIN.ask.der))
    arguments[1] = str(folder)
    assert run(*arguments).code == 0
    assert "1 in the report's own table" in run("show", folder).output
    (folder / "provider").write_text("tdx_guest\n")
    assert run(*arguments).code == 2


NEWER = {"version": 6, "cpuid_family": 0x19, "cpuid_model": 1, "launch_mit_vector": 3}


def test_later_versions(run: Run, evidence: Path, arguments: list[str]) -> None:
    body = bytearray(CHAIN.report(**NEWER))
    body[0x210] = 0xFF
    (evidence / "report.bin").write_bytes(CHAIN.sign(bytes(body)))
    ending = run(*arguments)
    assert (ending.code, "--allow-newer" in ending.errors) == (3, True)
    ending = run(*arguments, "--allow-newer")
    assert ending.code == 0
    assert "skipped  report.unknown" in ending.output
    shown = run("show", evidence / "report.bin").output
    assert "decoded as           version 5" in shown
    assert "reserved bytes set   0x210\n" in shown
    assert "launch_mit_vector    3\n" in shown


def test_what_a_version_lacks_is_not_shown(run: Run, evidence: Path) -> None:
    for version, family, vector in ((2, False, False), (3, True, False), (5, True, True)):
        (evidence / "report.bin").write_bytes(CHAIN.report(version=version))
        shown = run("show", evidence / "report.bin").output
        assert ("cpuid_family" in shown, "launch_mit_vector" in shown) == (family, vector)


def test_verify_as_json(run: Run, evidence: Path, arguments: list[str]) -> None:
    told = json.loads(run(*arguments, "--json", "--nonce", "00").output)
    assert (told["verdict"], told["policy"], told["product"], told["problem"]) == ("accepted", "default", "milan", "")
    assert told["roots"] == str(evidence / "own.pem")
    checks = {check["name"]: check for check in told["checks"]}
    assert {tuple(check) for check in told["checks"]} == {("name", "result", "expected", "found", "cite")}
    assert checks["chain.revocation"]["result"] == "skipped"
    assert checks["nonce"]["result"] == "passed"
    assert checks["policy.allow_debug"]["found"] == "debug off"
    assert checks["binding.chip_id"]["expected"] == CHIP_ID.hex()

    ending = run(*arguments, "--json", "--nonce", "01")
    told = json.loads(ending.output)
    assert (ending.code, told["verdict"], told["checks"][-1]["result"]) == (4, "refused by policy", "failed")
    ending = run(*arguments[:4], *JUNE, "--json")
    told = json.loads(ending.output)
    assert (ending.code, told["verdict"]) == (3, "not genuine")
    assert [check["name"] for check in told["checks"] if check["result"] == "failed"] == ["certificates.root"]
    (evidence / "report.bin").write_bytes(b"hello")
    ending = run(*arguments, "--json")
    told = json.loads(ending.output)
    assert (ending.code, told["verdict"], told["checks"]) == (2, "malformed", [])
    assert told["problem"]


def test_show_as_json(run: Run, evidence: Path) -> None:
    body = CHAIN.report(**{**NEWER, "version": 5}, platform_info=0x65)
    (evidence / "report.bin").write_bytes(body + table([(guid.CERT_VCEK, CHAIN.vek.der)]))
    told = json.loads(run("show", evidence / "report.bin", "--json").output)
    assert told["report"]["chip_id"] == CHIP_ID.hex()
    assert told["report"]["signing_key"] == "VCEK"
    assert told["report"]["launch_mit_vector"] == 3
    assert told["policy"]["smt"] == 1
    assert told["platform_info"]["alias_check_complete"] == 1
    assert told["unknown_bits"] == ["platform_info[6]"]
    assert told["unknown_bytes"] == []
    assert told["tcb"]["reported_tcb"] == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 0xDE}
    assert told["product"] == "milan"
    assert told["table"] == {str(guid.CERT_VCEK): len(CHAIN.vek.der)}
