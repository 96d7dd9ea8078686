"""A fleet: the verdicts of thousands of reports are those of each alone, whoever does the work."""

import json
import pickle
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import pytest

from snpbook.attest import bundle
from snpbook.attest.appraise import DEFAULT_POLICY, Policy
from snpbook.attest.fleet import ACCEPTED, MALFORMED, NOT_GENUINE, REFUSED, FleetItem, FleetVerdict, verify_fleet
from snpbook.attest.roots import named_roots
from snpbook.cli.main import main
from snpbook.evidence.maker import Maker, Recipe
from tests.sampling import ALL

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOY = named_roots("toy")
CHIPS, REPORTS = (100, 10_000) if ALL else (10, 500)


@cache
def fleet() -> tuple[FleetItem, ...]:
    """Reports of many guests on a few chips; each tenth has a signature that is not its own."""
    makers = [Maker(Recipe(NOW, "milan", seed=f"chip {number}")) for number in range(CHIPS)]
    files = [tuple(maker.kit().certificates.values()) for maker in makers]
    items = []
    for number in range(REPORTS):
        report = makers[number % CHIPS].report(report_data=number.to_bytes(64, "little"))
        if number % 10 == 9:
            report = report[:0x50] + bytes([report[0x50] ^ 1]) + report[0x51:]
        items.append(FleetItem(f"{number:05}", report, files[number % CHIPS]))
    return tuple(items)


def check(executor: Executor) -> None:
    verdicts = list(verify_fleet(fleet(), TOY, NOW, DEFAULT_POLICY, executor))
    assert [verdict.name for verdict in verdicts] == [item.name for item in fleet()]
    assert [verdict.verdict for verdict in verdicts] == [
        NOT_GENUINE if number % 10 == 9 else ACCEPTED for number in range(REPORTS)
    ]
    assert {verdict.check for verdict in verdicts if verdict.verdict == NOT_GENUINE} == {"report.signature"}
    assert len({verdict.chip for verdict in verdicts if verdict.chip}) == CHIPS * 9 // 10


def test_threads() -> None:
    with ThreadPoolExecutor(2) as executor:
        check(executor)


def test_processes() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        check(executor)


def test_a_dask_cluster() -> None:
    distributed = pytest.importorskip("distributed", reason="dask is not installed: pip install snpbook[fleet]")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        check(executor)


def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    read = bundle.Bundle.read

    def counted(data: bytes) -> bundle.Bundle:
        counts["read"] += 1
        return read(data)

    from snpbook.attest import fleet as module

    module._read.cache_clear()
    monkeypatch.setattr(bundle.Bundle, "read", staticmethod(counted))
    with ThreadPoolExecutor(1) as executor:
        list(verify_fleet(fleet(), TOY, NOW, None, executor))
    assert counts["read"] == CHIPS + 2


def test_what_crosses_can_be_pickled() -> None:
    policy = Policy(minimum_tcb={"snp": 3}, measurements={"a": bytes(48)})
    assert pickle.loads(pickle.dumps((fleet()[0], TOY, policy))) == (fleet()[0], TOY, policy)


def one(item: FleetItem, policy: Policy | None = None) -> FleetVerdict:
    with ThreadPoolExecutor(1) as executor:
        return next(iter(verify_fleet([item], TOY, NOW, policy, executor)))


def test_each_stage_is_told() -> None:
    good = fleet()[0]
    assert one(good).product == "milan"
    assert one(replace(good, report=good.report[:-1])).verdict == MALFORMED
    assert one(good, Policy(vmpl=3)).check == "policy.vmpl"
    assert one(good, Policy(vmpl=3)).verdict == REFUSED
    assert one(replace(good, certificates=())).check == "certificates.vek"
    assert one(replace(good, shared=(b"\x30\x80nonsense",))).verdict == ACCEPTED
    assert one(replace(good, certificates=(*good.certificates, b"\x30\x80nonsense"))).verdict == MALFORMED


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    vcek, *above = fleet()[0].certificates
    (tmp_path / "certs").mkdir()
    for number, der in enumerate(above):
        (tmp_path / "certs" / f"{number}.der").write_bytes(der)
    (tmp_path / "a.bin").write_bytes(fleet()[0].report)
    (tmp_path / "b.hex").write_text(fleet()[0].report.hex())
    for name in "ab":
        (tmp_path / f"{name}.der").write_bytes(vcek)
    return tmp_path


@pytest.mark.parametrize(("spoil", "code"), [("", 0), ("malformed", 2), ("not genuine", 3), ("refused", 4), ("all", 2)])
def test_the_command_ends_with_the_worst(
    directory: Path, capsys: pytest.CaptureFixture[str], spoil: str, code: int
) -> None:
    options = ["--roots", "toy", "--now", NOW.isoformat(), "--workers", "2"]
    if spoil in ("malformed", "all"):
        (directory / "c.bin").write_bytes(b"short")
    if spoil in ("not genuine", "all"):
        (directory / "d.bin").write_bytes(fleet()[1].report)
    if spoil in ("refused", "all"):
        (directory / "policy.toml").write_text("vmpl = 1\n")
        options += ["--policy", str(directory / "policy.toml")]
    assert main(["fleet", "verify", str(directory), *options]) == code
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["name"] for row in rows] == sorted(
        path.name for path in directory.iterdir() if path.suffix in (".bin", ".hex")
    )
    assert captured.err.count("\n") <= 2


def test_the_command_passes_over_no_report(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names in capitals count, and a report that cannot be read is not one less to worry about."""
    (directory / "a.bin").rename(directory / "A.BIN")
    (directory / "a.der").rename(directory / "A.DER")
    options = ["--roots", "toy", "--now", NOW.isoformat()]
    assert main(["fleet", "verify", str(directory), *options]) == 0
    (directory / "gone.bin").symlink_to(directory / "nowhere")
    assert main(["fleet", "verify", str(directory), *options]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["A.BIN", "b.hex", "A.BIN", "b.hex", "gone.bin"]
    assert (rows[-1]["verdict"], "cannot be read" in rows[-1]["reason"]) == (MALFORMED, True)


def test_the_command_refuses_an_empty_directory(tmp_path: Path) -> None:
    assert main(["fleet", "verify", str(tmp_path)]) == 2
    assert main(["fleet", "verify", str(tmp_path / "none")]) == 2
