"""`snpbook demo`: the contract that scripts rely on: keys, values and exit codes, against sev-snp-measure."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from snpbook.cli.main import main
from tests.attest import oracle
from tests.attest.vectors import VECTORS

OVMF = Path("/usr/share/ovmf/OVMF.fd")
CODE_4M = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
AMDSEV = VECTORS / "launch" / "ovmf_AmdSev_suffix.bin"
SAMPLE = Path(__file__).resolve().parents[2] / "data" / "firmware" / "sample.fd"
SMALL = ("--memory", "16M")
COUNTS = {"rmpupdates", "firmware_commands", "ioctls", "exits", "pages_validated"}


class Ending:
    """How one run of `snpbook demo` ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path, command: str = "demo") -> None:
        self.code = main([command, *map(str, arguments)])
        captured = capsys.readouterr()
        self.output, self.errors = captured.out, captured.err

    @property
    def object(self) -> dict[str, Any]:
        found = json.loads(self.output)
        assert isinstance(found, dict)
        return found

    def assert_refused(self, code: int, *words: str) -> None:
        assert self.code == code, self.errors
        assert 1 <= self.errors.count("\n") <= 2
        assert "Traceback" not in self.errors
        for word in words:
            assert word in self.errors, self.errors


def expected(firmware: Path, product: str, vcpus: int, *more: str) -> str:
    name = {"milan": "EPYC-Milan", "genoa": "EPYC-Genoa"}[product]
    arguments = ["--mode", "snp", "--ovmf", str(firmware), "--vcpus", str(vcpus), "--vcpu-type", name, *more]
    output = oracle.measure(arguments)
    assert output is not None
    return output.strip()


@pytest.mark.parametrize(("product", "vcpus"), [("milan", 1), ("genoa", 3)])
@pytest.mark.parametrize("firmware", [None, OVMF, AMDSEV], ids=lambda path: path.name if path else "default")
def test_json(firmware: Path | None, product: str, vcpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    if firmware and not firmware.is_file():
        pytest.skip(f"{firmware.name} is not on this machine")
    given = ("--firmware", firmware) if firmware else ()
    run = Ending(capsys, "--json", "--product", product, "--vcpus", str(vcpus), *SMALL, *given)
    assert (run.code, run.errors) == (0, "")
    found = run.object
    assert found["product"] == product
    assert found["verdict"] == "accepted"
    assert found["measurement"] == found["expected_measurement"] == expected(firmware or SAMPLE, product, vcpus)
    report = base64.b64decode(found["report"], validate=True)
    assert len(report) == 1184
    assert report[0x90:0xC0].hex() == found["measurement"]
    assert [pem.count("BEGIN CERTIFICATE") for pem in found["certificates"]] == [1, 1, 1]
    assert found["counts"].keys() >= COUNTS
    assert all(isinstance(count, int) and count > 0 for count in found["counts"].values())
    assert found["counts"]["pages_validated"] < (16 << 20) // 4096 <= found["counts"]["rmpupdates"]


def test_kernel_hashes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"kernel" * 9)
    (tmp_path / "i").write_bytes(b"initrd" * 9)
    boot = ["--kernel", str(tmp_path / "k"), "--initrd", str(tmp_path / "i"), "--append", "ro quiet"]
    found = Ending(capsys, "--json", *SMALL, *boot).object
    assert found["measurement"] == found["expected_measurement"] == expected(SAMPLE, "milan", 1, *boot)


def test_the_seed_is_everything(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, other = (Ending(capsys, "--json", *SMALL, "--seed", seed).output for seed in ("a", "a", "b"))
    assert one == two
    assert json.loads(one)["report"] != json.loads(other)["report"]
    assert json.loads(one)["measurement"] == json.loads(other)["measurement"]


@pytest.mark.parametrize("product", ["milan", "genoa"])
def test_report_verify_agrees(product: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = Ending(capsys, "--json", *SMALL, "--product", product).object
    report, certificates = tmp_path / "report.bin", tmp_path / "certificates.pem"
    report.write_bytes(base64.b64decode(found["report"]))
    certificates.write_text("".join(found["certificates"]))
    verify = ("verify", report, "--certs", certificates, "--product", product)
    now = ("--now", "2026-02-01T00:00:00Z")
    toy = Ending(capsys, *verify, "--roots", "toy", *now, command="report")
    assert toy.code == 0, toy.errors
    Ending(capsys, *verify, "--roots", "amd", *now, command="report").assert_refused(3)


def test_tampering_is_refused_and_the_evidence_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run = Ending(capsys, "--json", "--tamper", *SMALL)
    run.assert_refused(4, "measurement")
    found = run.object
    assert found["verdict"] == "refused by policy"
    assert found["expected_measurement"] == expected(SAMPLE, "milan", 1) != found["measurement"]


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    run = Ending(capsys, *SMALL)
    assert (run.code, run.errors) == (0, "")
    text = " ".join(run.output.split())
    for word in ("accepted", "16 MiB", "toy keys", "milan", "measured", "expected"):
        assert word in text


USAGE = {
    "no vCPU": ("--vcpus", "0"),
    "negative vCPUs": ("--vcpus", "-1"),
    "no whole page": ("--memory", "3K"),
    "no size": ("--memory", "lots"),
    "no memory": ("--memory", "0"),
    "too small for the image": ("--memory", "1M"),
    "one page": ("--memory", "4K"),
    "unknown product": ("--product", "rome"),
    "append without kernel": ("--append", "ro"),
    "empty append without kernel": ("--append", ""),
    "initrd without kernel": ("--initrd", str(SAMPLE)),
    "unknown option": ("--fast",),
    "stray argument": ("stray",),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Ending(capsys, "--json", *USAGE[name])
    run.assert_refused(64)
    assert run.output == ""


def damaged(tmp_path: Path, kind: str) -> Path:
    """A file that is no firmware image of a guest."""
    path, sample = tmp_path / f"{kind}.fd", SAMPLE.read_bytes()
    match kind:
        case "missing":
            return path
        case "directory":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("This is a letter, not a firmware image.\n" * 200)
        case "front":
            path.write_bytes(sample[: len(sample) // 2])
        case "one byte short":
            path.write_bytes(sample[:-1])
        case "tail":
            path.write_bytes(sample[-1000:])
        case "zeros":
            path.write_bytes(bytes(8192))
    return path


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "front", "one byte short", "tail", "zeros"])
@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["people", "json"])
def test_malformed_firmware(
    kind: str, json_: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Ending(capsys, "--firmware", damaged(tmp_path, kind), *json_, *SMALL)
    run.assert_refused(2, f"{kind}.fd")
    assert run.output == ""


@pytest.mark.skipif(not CODE_4M.is_file(), reason=f"{CODE_4M.name} is not on this machine")
def test_an_image_without_snp_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    run = Ending(capsys, "--firmware", CODE_4M, "--json")
    run.assert_refused(2, CODE_4M.name, "SEV metadata")
    assert run.output == ""


@pytest.mark.skipif(not OVMF.is_file(), reason=f"{OVMF.name} is not on this machine")
def test_a_kernel_for_an_image_without_a_place_for_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k").write_bytes(b"kernel")
    Ending(capsys, "--json", "--firmware", OVMF, "--kernel", tmp_path / "k").assert_refused(2, "OVMF.fd", "hashes")


@pytest.mark.parametrize("option", ["--kernel", "--initrd"])
def test_files_of_the_boot_that_are_not_there(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k").write_bytes(b"kernel")
    given = {"--kernel": str(tmp_path / "k"), option: str(tmp_path / "absent")}
    Ending(capsys, "--json", *(part for pair in given.items() for part in pair)).assert_refused(2, "absent")


def odd_image(**changes: int) -> bytes:
    """The sample image with fields of its second metadata section changed, or its reset block renamed."""
    image = bytearray(SAMPLE.read_bytes())
    section = len(image) - 0x1000 + 16 + 12
    for name, value in changes.items():
        if name == "reset":
            place = image.index(UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le)
            image[place] ^= value
        else:
            place = section + ("gpa", "size", "type").index(name) * 4
            image[place : place + 4] = value.to_bytes(4, "little")
    return bytes(image)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"gpa": 0x80A100}, "is not whole pages"),
        ({"size": 0}, "is not whole pages"),
        ({"size": 0x800}, "is not whole pages"),
        ({"gpa": 0x808000}, "overlaps another one"),
        ({"type": 9}, "unknown type 0x9"),
        ({"reset": 1}, "no SEV-ES reset block"),
    ],
)
def test_an_image_whose_tables_cannot_be_launched(
    changes: dict[str, int], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "odd.fd"
    file.write_bytes(odd_image(**changes))
    Ending(capsys, "--firmware", file).assert_refused(2, str(file), what)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--vcpus", "1025"],
        ["--memory", "65G"],
        ["--memory", "99999999999999G"],
        ["--seed", "\udcff"],
        ["--seed", "a\nb"],
    ],
)
def test_numbers_and_seeds_beyond_reason_are_usage_errors(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Ending(capsys, *arguments).assert_refused(64)


def test_digests_can_be_read_off_whole_whatever_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    result = Ending(capsys, *SMALL, "--seed", "[bold]x[/nope]")
    assert result.code == 0
    measured = [line.split()[1] for line in result.output.splitlines() if line.startswith(("measured", "expected"))]
    assert measured[0] == measured[1]
    assert len(bytes.fromhex(measured[0])) == 48
    assert "seed [bold]x[/nope]" in result.output
