"""Launches through the firmware model measure what the relying party expects: legacy guests, command by command."""

from __future__ import annotations

from pathlib import Path

import pytest

from snpbook.attest.measure import legacy_runs, vmsa_pages
from snpbook.attest.measure_chain import legacy_digest
from snpbook.spec.commands import Command
from snpbook.spec.image import Image
from snpbook.spec.launch import kernel_hash_table
from snpbook.spec.pages import LaunchPage
from snpbook.spec.resources import resource
from tests.attest import oracle
from tests.firmware.legacy_board import ES_ASID, PLAIN_ASID, A, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner

ES = 4
OWNER = Owner()
SAMPLE = resource("data", "firmware", "sample.fd")
OVMF = Path("/usr/share/ovmf/OVMF.fd")
needs_ovmf = pytest.mark.skipif(not OVMF.is_file(), reason="OVMF.fd is not on this machine")
IMAGES = [SAMPLE, pytest.param(OVMF, marks=needs_ovmf)]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
@pytest.mark.parametrize("boot", [False, True], ids=["firmware", "kernel"])
@pytest.mark.parametrize("vcpus", [0, 1, 3], ids=["SEV", "SEV-ES", "SEV-ES of three"])
def test_a_legacy_launch_measures_what_is_expected(path: Path, boot: bool, vcpus: int, tmp_path: Path) -> None:
    image = Image.parse(path.read_bytes())
    if boot and not image.hash_table_base:
        pytest.skip("this build of OVMF has no area for kernel hashes")
    board = LegacyBoard().start()
    signature = board.machine.product.vcpu_signature
    policy, asid = (ES, ES_ASID) if vcpus else (0, PLAIN_ASID)
    hashes = kernel_hash_table(b"kernel", b"initrd", "quiet") if boot else None
    runs = legacy_runs(image, vmsas=vmsa_pages(image, vcpus, signature, 0) if vcpus else (), kernel_hashes=hashes)

    session = OWNER.certificate(), OWNER.session(board.certificates()[0], policy)
    handle = board.launch(policy, asid, session)
    for run in runs:
        command = Command.LAUNCH_UPDATE_VMSA if run.type is LaunchPage.VMSA else Command.LAUNCH_UPDATE_DATA
        place = board.write(C if run.type is LaunchPage.VMSA else A, run.data)
        board.ok(command, handle=handle, paddr=place, len=len(run.data))
    board.ok(Command.LAUNCH_MEASURE, handle=handle, paddr=D, len=48)
    answer = board.machine.dram.read(D, 48)

    assert answer[:32] == OWNER.measure(board.api, policy, legacy_digest(runs), answer[32:])
    for name, content in (("kernel", b"kernel"), ("initrd", b"initrd")):
        (tmp_path / name).write_bytes(content)
    arguments = ["--mode", "seves" if vcpus else "sev", "--ovmf", str(path)]
    arguments += ["--vcpus", str(vcpus), "--vcpu-sig", hex(signature)] if vcpus else []
    if boot:
        arguments += ["--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd"), "--append", "quiet"]
    assert oracle.measure(arguments) == f"{legacy_digest(runs).hex()}\n"
