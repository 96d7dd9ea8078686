"""Guests of the legacy commands under VMRUN: not before their launch is finished, nor once tampered with."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Exit, Invalid, Npf
from snpbook.hardware.vmrun import vmrun
from snpbook.spec.commands import Command
from snpbook.spec.vmcb import SAVE_AREA_OFFSET, VMCB, intercept_bits
from snpbook.spec.vmsa import SAVE_AREA, VMSA
from tests.firmware.legacy_board import ES_ASID, PAGE, PLAIN_ASID, C, LegacyBoard
from tests.machines import MIB

VMCB_AT, TABLE, MEMORY = 26 * MIB, 27 * MIB, 28 * MIB
RESET = {"cr0": 0x10, "efer": 0x1000, "rip": 0xFFF0, "rflags": 2}


def run(board: LegacyBoard, asid: int, es: bool) -> Exit:
    """Enter the guest, which reads its first page and then one that is not there."""
    control = {"nested_paging": 1, "sev": 1, "sev_es": es, "asid": asid, "nested_cr3": TABLE, "vmsa_pa": C}
    intercepts = intercept_bits(0x78, 0x7F, 0x80)
    board.write(VMCB_AT, VMCB.pack(**control, lbr_virtualization=es, intercepts=intercepts))
    board.write(VMCB_AT + SAVE_AREA_OFFSET, SAVE_AREA.pack(**RESET))
    executor, seen = CoroutineExecutor(), []

    async def program(cpu: Any) -> None:
        seen.append(await cpu.read(0, 6))
        await cpu.read(MIB, 1)

    executor.start(program)
    left = vmrun(board.machine, VMCB_AT, executor, "vcpu0")
    if isinstance(left, Npf):
        assert (left.gpa, seen) == (MIB, [b"kernel"]), "private memory, read with the guest's key"
    return left


@pytest.mark.parametrize("name", ["naples", "rome", "milan"])
@pytest.mark.parametrize("es", [False, True])
def test_a_launched_guest_runs(name: str, es: bool) -> None:
    board = LegacyBoard(name).start()
    for level in range(3):
        board.write(TABLE + level * PAGE, (TABLE + (level + 1) * PAGE | 7).to_bytes(8, "little"))
    board.write(TABLE + 3 * PAGE, (MEMORY | 7).to_bytes(8, "little"))
    asid = ES_ASID if es else PLAIN_ASID if name != "naples" else 9
    handle = board.launch(4 * es, asid)
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(MEMORY, b"kernel".ljust(PAGE)), len=PAGE)
    if es:
        board.ok(Command.LAUNCH_UPDATE_VMSA, handle=handle, paddr=board.write(C, VMSA.pack(**RESET)), len=PAGE)
    assert isinstance(run(board, asid, es), Invalid), "the launch is not finished"
    board.finish_launch(handle)
    assert isinstance(run(board, asid, es), Npf)
    assert isinstance(run(board, asid, es), Npf), "what #VMEXIT stored has a new checksum"
    if es:
        held = board.machine.dram.read(C, 16)
        board.write(C, bytes(16))
        assert isinstance(run(board, asid, es), Invalid), "the host wrote the registers"
        board.write(C, held)
    board.ok(Command.DEACTIVATE, handle=handle)
    assert isinstance(run(board, asid, es), Invalid), "no ASID"
