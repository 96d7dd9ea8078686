"""Whole machines: any release powers on, and two machines of one seed give the same bytes."""

from __future__ import annotations

import pytest

from snpbook.firmware.table import COMMANDS
from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.commands import Command
from snpbook.spec.msr import Msr
from snpbook.spec.products import product
from snpbook.spec.releases import RELEASES, release
from snpbook.spec.status import Status
from snpbook.vendor.images import firmware_image
from snpbook.vendor.vlek import wrapped_vlek
from tests.machines import FREE, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board

SNP_RELEASES = [name for name, each in RELEASES.items() if each.snp]


@pytest.mark.parametrize("name", SNP_RELEASES)
@pytest.mark.parametrize("line", ["milan", "genoa"])
def test_a_machine_powers_on_with_any_release(line: str, name: str) -> None:
    board = Board(line, release=name)
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    old = name == "1.51"
    assert (board.command(Command.SNP_INIT_EX, init_rmp=1) is Status.INVALID_COMMAND) == old
    if old:
        board.ok(Command.SNP_INIT)
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    board.start()
    board.finish()
    missing = {command for command in COMMANDS if command not in board.psp.release.abi.commands}
    assert [board.send(command, 0) for command in missing] == [Status.INVALID_COMMAND] * len(missing)


@pytest.mark.parametrize(("line", "name"), [("milan", "0.17"), ("naples", "1.55"), ("milan", "1.57")])
def test_firmware_that_a_product_cannot_run(line: str, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        product(line).running(name)


def lived(seed: str = "tests") -> Board:
    """A board through most of the platform's commands."""
    board = Board(cores=16).initialise()
    board.start()
    board.add(FREE, 0x1000)
    board.finish()
    board.assign(FREE + PAGE, FIRMWARE, count=3)
    board.assign(24 * MIB, FIRMWARE)
    data = firmware_image("milan", release("1.58"), build=65, svn=25)
    board.machine.dram.write(20 * MIB, data)
    board.ok(Command.SNP_DOWNLOAD_FIRMWARE_EX, fw_paddr=20 * MIB, fw_len=len(data))
    board.ok(Command.SNP_CONFIG, reported_tcb=0, mask_chip_id=1)
    board.machine.dram.write(20 * MIB, wrapped_vlek(seed, board.psp.chip, board.psp.reported_tcb, bytes(12)))
    board.ok(Command.SNP_VLEK_LOAD, length=16, vlek_wrapped_paddr=20 * MIB)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE + PAGE)
    board.ok(Command.SNP_FEATURE_INFO, length=16, feature_info_paddr=FREE + 2 * PAGE)
    board.ok(
        Command.SNP_VERIFY_MITIGATION, length=64, subcommand=1, vector=1, dst_paddr_en=1, dst_paddr=FREE + 3 * PAGE
    )
    board.ok(Command.SNP_PAGE_RECLAIM, page=24 * MIB >> 12)
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    return board


def test_two_machines_of_one_seed_are_the_same_to_the_last_byte() -> None:
    one, other = lived(), lived()
    assert Snapshot(machine=one.machine, psp=one.psp) == Snapshot(machine=other.machine, psp=other.psp)
    third = lived("another provider")
    assert Snapshot(machine=one.machine, psp=one.psp) != Snapshot(machine=third.machine, psp=third.psp)
