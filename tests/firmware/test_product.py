"""Every command against the sheet's rows: each check failing, each two, and the product with the states.

The answers are those of tests/reference/firmware_snp.py and firmware_legacy.py, which share nothing with the firmware.
A refused command leaves machine and processor bit-identical, except where a row names what it leaves.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from snpbook.firmware.table import COMMANDS
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.commands import Command
from snpbook.trace import FirmwareCommand
from tests.firmware.told import expected as told_by
from tests.firmware.told import told
from tests.firmware.worlds import MEMORY, Unrealisable, described, observe, realise
from tests.machines import BUFFER, Board
from tests.reference import firmware_legacy, firmware_snp
from tests.reference.firmware_cases import Case, double, everywhere, neighbours, pairs, single, valid
from tests.reference.firmware_rows import effects
from tests.reference.firmware_world import ABOVE, IN_ASEG, IN_NOTHING, IN_RMP, IN_TSEG, World
from tests.sampling import sampled

SPECS = {**firmware_snp.SPECS, **firmware_legacy.SPECS}
DONE = [name for name in SPECS if Command[name] in COMMANDS]
EXCLUSIVE = {
    ("SNP_ACTIVATE", "ASID without a counter", "pages carry the ASID"): "an entry holds no such ASID",
    ("SNP_LAUNCH_UPDATE", "type of 4K only", "type 0 or 7"): "one type",
    ("SNP_PAGE_SWAP_OUT", "src: another ASID", "metadata: states"): "one type",
    ("SNP_PAGE_SWAP_OUT", "metadata: owner", "type 3"): "one type",
    ("SNP_PAGE_SWAP_IN", "dst not Pre-Guest", "metadata or VMSA in place"): "one type",
    ("SNP_PAGE_SWAP_IN", "metadata: dst not Firmware", "VMSA of 2 MB"): "one type",
    ("INIT", "SNPEn without an RMP", "TMR pages"): "without an RMP no page has a state",
    ("INIT_EX", "NV meets the TMR", "TMR pages"): "the pages are the same",
    ("DECOMMISSION", "bad handle", "ASID still active"): "no guest, no ASID",
    ("DBG_DECRYPT", "bad handle", "NODBG"): "no guest, no policy",
    ("DBG_ENCRYPT", "bad handle", "NODBG"): "no guest, no policy",
    ("SNP_DBG_DECRYPT", "policy without DEBUG", "guest inactive"): "as below",
    ("SNP_DBG_ENCRYPT", "policy without DEBUG", "guest inactive"): "as below",
}
"""Neighbouring checks that cannot both fail."""
UNSEEN = {
    ("SNP_DBG_DECRYPT", "guest inactive"): "a guest's page has an ASID: that of an inactive guest is another one",
    ("SNP_DBG_ENCRYPT", "guest inactive"): "the same",
}
"""Checks that no case can show, an earlier one having answered."""


@pytest.mark.parametrize("command", SPECS)
def test_the_oracle_shows_every_row_and_every_pair(command: str) -> None:
    spec = SPECS[command]
    assert valid(command, spec).row is None, "the valid case is valid"
    shown = {row.name for row, case in single(command, spec) if case.row is row}
    assert {row.name for row in spec.rows} - shown == {row for name, row in UNSEEN if name == command}
    stray = [str(case) for row, case in single(command, spec) if case.row is not row]
    assert len(stray) == len([name for name, _ in UNSEEN if name == command]), stray
    apart = {(command, a.name, b.name) for a, b in neighbours(spec) if double(command, spec, a, b) is None}
    assert apart == {pair for pair in EXCLUSIVE if pair[0] == command}


def test_the_oracle_shares_nothing() -> None:
    files = list((Path(__file__).parents[1] / "reference").glob("firmware*.py"))
    assert len(files) > 10
    for file in files:
        imported = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert all(line.split()[1].split(".")[0] != "snpbook" for line in imported), file.name


@pytest.mark.parametrize("command", [name for name in SPECS if SPECS[name].buffer])
def test_the_oracle_knows_every_bit_of_the_buffer(command: str) -> None:
    spec = SPECS[command]
    bits = Counter(bit for first, last in spec.reserved for bit in range(first, last + 1))
    named = {bit for first, count in spec.buffer.values() for bit in range(first, first + count)}
    assert max(bits.values(), default=1) == 1
    assert not named & bits.keys() or command == "SNP_PAGE_RECLAIM", "a field is not reserved"
    assert max(named | bits.keys()) < 8 * spec.size
    assert Command[command] == spec.number


# The firmware.

NO_STATE = {"machine.rmp"}
"""The number by which caches see that the table may have changed; the table itself is in memory."""


_BOARDS: dict[str, tuple[Board, Snapshot] | str] = {}
"""Boards by what they look like, or why there is none: many cases start from the same one."""


def _prepared(w: World) -> tuple[Board, Snapshot]:
    key = repr(w)
    if key not in _BOARDS:
        if len(_BOARDS) > 64:
            _BOARDS.clear()
        try:
            board = realise(w)
        except Unrealisable as reason:
            _BOARDS[key] = str(reason)
        else:
            _BOARDS[key] = board, Snapshot(machine=board.machine, processor=board.psp)
    found = _BOARDS[key]
    if isinstance(found, str):
        raise Unrealisable(found)
    return found


def difference(case: Case) -> str | None:
    """Where the firmware and the sheet part on a case; nothing if they agree. `Unrealisable` without a board."""
    spec = SPECS[case.command]
    board, start = _prepared(case.world)
    start.restore()
    if case.command in MEMORY:
        MEMORY[case.command](board, case.world, case.request)
    address = 0
    if spec.size:
        address = BUFFER
        board.machine.dram.write(BUFFER, spec.encode(case.request))
    before = Snapshot(machine=board.machine, processor=board.psp)
    status = int(board.send(spec.number, address))
    event = board.log.events[-1]
    assert isinstance(event, FirmwareCommand)
    board.log.events.clear()
    if status != case.status:
        return f"{case}: the firmware answers {status:02X}"
    if case.row and not (case.row.left or case.row.leaves):
        changed = before.differences(Snapshot(machine=board.machine, processor=board.psp))
        changed = [path for path in changed if path not in NO_STATE and "mailbox" not in path]
        changed += [f"the event's states, {event.states}"] if event.states else []
        return f"{case}: and changed {changed}" if changed else None
    after = effects(spec, case.world, case.request)
    wanted, seen = described(after), observe(board, after)
    apart = {key: (value, seen[key]) for key, value in wanted.items() if seen[key] != value}
    if told(event) != told_by(case.world, after):
        apart["the event's states"] = told_by(case.world, after), told(event)
    return f"{case}: should have led to (wanted, found) {apart}" if apart else None


def agree(cases: list[Case]) -> list[Case]:
    """The firmware answers all cases as the sheet does: those that there is a board for, which are returned."""
    parted, shown, impossible = [], [], Counter[str]()
    for case in cases:
        try:
            parted += [found] if (found := difference(case)) else []
            shown.append(case)
        except Unrealisable as reason:
            impossible[str(reason)] += 1
    assert not parted, f"{len(parted)} of {len(cases)}:\n" + "\n".join(parted[:40])
    assert shown, impossible
    return shown


def _needs(command: str) -> None:
    if command not in DONE:
        pytest.skip(f"{command} is not in the firmware's table")


@pytest.mark.parametrize("command", SPECS)
def test_every_check_alone(command: str) -> None:
    """Each row of the sheet fires on a board, in every way to fail it that a board can be brought to."""
    _needs(command)
    spec = SPECS[command]
    shown = agree([valid(command, spec), *(case for _, case in single(command, spec))])
    wanted = [row.name for row in spec.rows if (command, row.name) not in UNSEEN]
    assert [name for name in wanted if not any(case.row and case.row.name == name for case in shown)] == []


@pytest.mark.parametrize("command", SPECS)
def test_every_two_checks(command: str) -> None:
    _needs(command)
    agree(sampled(pairs(command, SPECS[command]), 25) or [valid(command, SPECS[command])])


@pytest.mark.parametrize("command", SPECS)
def test_product_of_states_and_cases(command: str) -> None:
    _needs(command)
    agree(sampled(everywhere(command, SPECS[command]), 30))


# The dispatch.

OTHER_IDS = {0x0F, 0xB2, *range(0xD0, 0xD6)}
"""Ring mode, mitigations and the TIO commands: they have numbers and no rows."""


def test_unknown_ids() -> None:
    """0x11 and nothing is read, wherever the buffer lies; 0xCC is the firmware's own."""
    board = Board().initialise()
    known = {spec.number for spec in SPECS.values()} | OTHER_IDS
    assert 0xCC not in known
    before = Snapshot(machine=board.machine, processor=board.psp)
    for number in sorted(set(range(0x100)) - known):
        assert board.send(number, ABOVE) == 0x11, hex(number)
    changed = before.differences(Snapshot(machine=board.machine, processor=board.psp))
    assert [path for path in changed if "mailbox" not in path] == []


@pytest.mark.parametrize("command", [name for name in SPECS if SPECS[name].size])
def test_the_address_of_the_buffer(command: str) -> None:
    """A buffer is data: 0x09 in the RMP and in forbidden places, 0x03 outside DRAM, whatever else is wrong."""
    _needs(command)
    board = Board().initialise()
    for address, status in ((IN_RMP, 9), (IN_TSEG, 9), (IN_ASEG, 9), (ABOVE, 9), (IN_NOTHING, 3), (1 << 30, 3)):
        before = Snapshot(machine=board.machine, processor=board.psp)
        assert board.send(SPECS[command].number, address) == status, hex(address)
        changed = before.differences(Snapshot(machine=board.machine, processor=board.psp))
        assert [path for path in changed if "mailbox" not in path] == []
