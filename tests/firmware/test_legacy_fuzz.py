"""Any bytes in the buffers of legacy commands: a status answers, never an exception, whatever state a guest is in."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.status import Status
from tests.firmware.legacy_board import ES_ASID, NV, PAGE, PLAIN_ASID, A, B, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner
from tests.machines import BUFFER, MIB

COMMANDS = [c for c in Command if c < Command.SNP_INIT]
OWNER = Owner()
C_BIT = 1 << 51
PLACES = [0, A, B, C, D, NV, BUFFER, 47 * MIB, 50 * MIB, 64 * MIB - PAGE, 0xA0000, 1 << 46, 2**64 - 1]
NUMBERS = [0, 1, 2, 3, 4, 5, 0x24, 0x34, 0x80, 0xD0, 2084, 3 * 2084, PAGE, 0x5000, 0x8000, MIB, 2**32 - 1, PLAIN_ASID]


@cache
def boards() -> list[tuple[LegacyBoard, Snapshot]]:
    """A guest that launches and one that runs, one that is sent, one that comes; certificates and packets lie about."""
    found = []
    for stage in range(4):
        board = LegacyBoard().start()
        pdh = board.certificates()[0]
        session = OWNER.certificate(), OWNER.session(pdh, 4)
        handle = board.launch(4, ES_ASID, session)
        fields: dict[str, Any] = {"pdh_cert_paddr": A, "pdh_cert_len": 2084, "session_paddr": B, "session_len": 0x80}
        if stage:
            board.finish_launch(handle)
        if stage == 2:
            board.ok(Command.SEND_START, handle=handle, **fields)
        if stage == 3:
            board.ok(Command.RECEIVE_START, handle=0, policy=4, **fields)
        header, body = OWNER.packet(bytes(PAGE), 2)
        board.write(C, header)
        board.write(D, body)
        found.append((board, Snapshot(machine=board.machine, processor=board.psp)))
    return found


def value(size: int) -> st.SearchStrategy[int]:
    """A value of a field of `size` bits: likely ones, and any."""
    limit = (1 << size) - 1
    known = [n for n in (*NUMBERS, *PLACES, *(at | C_BIT for at in PLACES[:8])) if n <= limit]
    places = [n for n in (*PLACES, *(at | C_BIT for at in PLACES[:8])) if size == 64]
    near = st.sampled_from(places or known).flatmap(lambda at: st.integers(max(at - 16, 0), min(at + 16, limit)))
    return st.one_of(st.sampled_from(places or known), near, st.integers(0, limit))


@given(data=st.data(), command=st.sampled_from(COMMANDS), stage=st.integers(0, 3))
def test_any_buffer_gets_a_status(data: st.DataObject, command: Command, stage: int) -> None:
    board, start = boards()[stage]
    start.restore()
    layout = BUFFERS[command]
    fields: dict[str, Any] = {}
    for name, field in layout.fields.items() if layout else ():
        fields[name] = data.draw(st.binary(min_size=field.size, max_size=field.size) if field.kind == "raw" else
                                 st.integers(0, 2) if name == "handle" else value(field.width), name)  # fmt: skip
    assert board.command(command, **fields) in Status


@given(data=st.data(), place=st.sampled_from([A, B, C, D]), stage=st.integers(0, 3))
def test_any_input_gets_a_status(data: st.DataObject, place: int, stage: int) -> None:
    """Certificates, sessions and packets with bytes changed, cut and replaced."""
    board, start = boards()[stage]
    start.restore()
    known = board.machine.dram.read(place, 2084)
    at = data.draw(st.integers(0, 2083))
    board.write(place, (known[:at] + data.draw(st.binary(min_size=1, max_size=64)) + known[at:])[:2084])
    packet = {
        "hdr_paddr": C,
        "hdr_len": 0x34,
        "guest_paddr": NV,
        "guest_len": PAGE,
        "trans_paddr": D,
        "trans_len": PAGE,
    }
    session: dict[str, Any] = {"session_paddr": B, "session_len": 0x80}
    pdh, chain = {"pdh_cert_paddr": A, "pdh_cert_len": 2084}, {"plat_certs_paddr": A, "plat_certs_len": 3 * 2084}
    cases: list[tuple[Command, dict[str, Any]]] = [
        (Command.LAUNCH_START, {"policy": 4, "dh_cert_paddr": A, "dh_cert_len": 2084} | session),
        (Command.RECEIVE_START, {"policy": 4} | pdh | session),
        (Command.SEND_START, {"handle": 1, "amd_certs_paddr": A, "amd_certs_len": 0xC80} | pdh | chain | session),
        (Command.LAUNCH_SECRET, {"handle": 1} | packet),
        (Command.RECEIVE_UPDATE_VMSA, {"handle": 2} | packet),
        (Command.PEK_CERT_IMPORT, {"pek_cert_paddr": A, "pek_cert_len": 2084, "oca_cert_paddr": A,
                                   "oca_cert_len": 2084}),
        (Command.SWAP_IN, {"handle": 1, "src_paddr": NV, "dst_paddr": NV + PAGE, "mdata_paddr": place}),
    ]  # fmt: skip
    for command, fields in cases:
        assert board.command(command, **fields) in Status
