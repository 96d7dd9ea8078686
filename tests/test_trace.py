"""The trace: events that show themselves briefly, listeners that come and go, counts that are exact."""

import numpy as np

from snpbook.trace import (
    Counts,
    Event,
    FirmwareCommand,
    Instruction,
    Ioctl,
    Message,
    Recorder,
    Trace,
    VmExit,
)

VALIDATED, LARGE = 1 << 62, 2


def pvalidate(pages: range | np.ndarray, before: list[int], after: list[int]) -> Instruction:
    words = [np.array([[word, 0] for word in column], np.uint64) for column in (before, after)]
    return Instruction(
        name="PVALIDATE",
        actor="vcpu0",
        pages=pages,
        status=np.zeros(len(before), np.uint8),
        before=words[0],
        after=words[1],
    )


def test_a_trace_without_listeners_is_false() -> None:
    trace, seen = Trace(), Recorder()
    assert not trace
    stop = trace.subscribe(seen)
    assert trace
    trace.emit(Message(source="kernel", text="hello"))
    stop()
    assert not trace
    trace.emit(Message(source="kernel", text="unheard"))
    assert [event.text for event in seen.of(Message)] == ["hello"]
    assert (len(seen), repr(seen), repr(trace)) == (1, "Recorder(1 events)", "Trace(0 listeners)")


def test_listeners_hear_in_order_of_subscription() -> None:
    trace, heard = Trace(), []
    trace.subscribe(lambda event: heard.append("first"))
    trace.subscribe(lambda event: heard.append("second"))
    trace.emit(Event())
    assert heard == ["first", "second"]


def test_a_recorder_finds_events_by_type_and_name() -> None:
    seen = Recorder()
    for event in (
        FirmwareCommand(name="SNP_INIT_EX", status=0),
        FirmwareCommand(name="SNP_ACTIVATE", status=0x0D),
        Ioctl(device="kvm", name="SNP_ACTIVATE"),
        VmExit(vcpu=0, reason="NPF"),
    ):
        seen(event)
    assert len(seen.of(FirmwareCommand)) == 2
    assert [event.status for event in seen.of(FirmwareCommand, "SNP_ACTIVATE")] == [0x0D]
    assert seen.of(VmExit, "NPF") == []  # exits have a reason, not a name


def test_how_often() -> None:
    pages = range(0x100, 0x140)
    assert FirmwareCommand(name="SNP_LAUNCH_UPDATE", status=0, pages=pages).count == 64
    assert FirmwareCommand(name="SNP_DF_FLUSH", status=0).count == 1
    assert VmExit(vcpu=0, reason="NPF", pages=7).count == 7
    assert pvalidate(pages, [1] * 64, [1] * 64).count == 64


def test_events_show_themselves_in_one_line() -> None:
    event = pvalidate(range(0x900, 0x904), [1] * 4, [1] * 4)
    assert repr(event) == (
        "Instruction(name='PVALIDATE', actor='vcpu0', pages=4 pages from 0x900, status=[4], before=[4], after=[4])"
    )
    assert repr(VmExit(vcpu=1, reason="NPF", pages=64)) == "VmExit(vcpu=1, reason='NPF', detail={}, pages=0x40)"


def test_counts_are_exact() -> None:
    counts = Counts()
    counts(pvalidate(range(4), [1, 1, 1 | VALIDATED, 1], [1 | VALIDATED, 1, 1 | VALIDATED, 1 | VALIDATED]))
    counts(pvalidate(np.array([0, 512, 8], np.uint64), [3, 3 | VALIDATED, 1], [3 | VALIDATED, 3, 1 | VALIDATED]))
    assert (counts.pvalidates, counts.pages_validated) == (7, 2 + 512 + 1)
    empty = np.zeros((3, 2), np.uint64)
    counts(Instruction(name="RMPUPDATE", actor="host", pages=range(3), status=empty[:, 0], before=empty, after=empty))
    counts(FirmwareCommand(name="SNP_LAUNCH_UPDATE", status=0, pages=range(5)))
    counts(FirmwareCommand(name="SNP_LAUNCH_FINISH", status=0x16))
    counts(Ioctl(device="sev", name="SEV_PLATFORM_STATUS", errno=5))
    counts(VmExit(vcpu=1, reason="NPF", pages=3))
    counts(Message(source="guest", text="not counted"))
    assert (counts.rmpupdates, counts.firmware_commands, counts.ioctls, counts.exits) == (3, 6, 1, 3)
