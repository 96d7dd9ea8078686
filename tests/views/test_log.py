import numpy as np
import pytest

from snpbook.spec.rmp import RmpCode
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.system import System
from snpbook.trace import (
    CachesWrittenBack,
    Event,
    FirmwareCommand,
    Instruction,
    Ioctl,
    Message,
    NestedMapping,
    PagesCopied,
    PagesMoved,
    PagesPinned,
    SystemCall,
    VmExit,
)
from snpbook.views.log import STEPS, log, rows, steps
from tests.views.reading import read

TIMES = "\u00d7"


def rmpupdate(pages: int, *, failed: int = 0, first: int = 0x800) -> Instruction:
    status = np.zeros(pages, np.uint8)
    status[:failed] = RmpCode.FAIL_INUSE
    words = np.zeros((pages, 2), np.uint64)
    return Instruction(
        name="RMPUPDATE", actor="host", pages=range(first, first + pages), status=status, before=words, after=words
    )


EVENTS: list[Event] = [
    Message(source="kernel", text="SEV-SNP enabled <b>"),
    Ioctl(device="kvm", name="KVM_CREATE_VM", arguments={"asid": 1}),
    rmpupdate(512),
    FirmwareCommand(name="SNP_LAUNCH_UPDATE", status=Status.SUCCESS, pages=range(0x800, 0xA00)),
    FirmwareCommand(
        name="SNP_LAUNCH_FINISH", status=Status.INVALID_PAGE_STATE,
        refusal=FirmwareRefusal(Status.INVALID_PAGE_STATE, "page state", "PRE_GUEST", "FIRMWARE"),
        arguments={"gctx_paddr": 0x5000, "id_block_en": 0, "host_data": bytes(32)},
    ),
    VmExit(vcpu=0, reason="NPF", detail={"gpa": 0x1000}, pages=3),
]  # fmt: skip


def test_a_run_is_one_row() -> None:
    text = log(EVENTS).text.splitlines()
    assert len(text) == 3 + len(EVENTS)
    assert text[5].split() == ["3", "host", "RMP", "RMPUPDATE", TIMES, "512", "pfn", "0x800..0x9ff", "ok"]
    assert f"SNP_LAUNCH_UPDATE  {TIMES} 512" in text[6]
    assert text[7].split(maxsplit=4)[4].split(maxsplit=2) == [
        "gctx_paddr",
        "0x5000",
        "✗ INVALID_PAGE_STATE: page state (expected PRE_GUEST, found FIRMWARE)",
    ]


def test_html_escapes_and_unfolds() -> None:
    html = log(EVENTS).html
    page = read(html)
    assert page.tables == ["Log"]
    assert "SEV-SNP enabled <b>" in page.words
    assert html.count("<details>") == 2
    assert f"and {512 - STEPS} more" in page.words


def test_steps_carry_their_own_answers() -> None:
    single = list(steps(rmpupdate(4, failed=1)))
    assert [row.detail for row in single] == ["pfn 0x800", "pfn 0x801", "pfn 0x802", "pfn 0x803"]
    assert [row.ok for row in single] == [False, True, True, True]
    assert sum(row.count for row in single) == 4
    (row,) = rows([rmpupdate(4, failed=1)])
    assert (row.ok, row.result) == (False, f"SUCCESS {TIMES} 3, FAIL_INUSE {TIMES} 1")


def test_scattered_pages_are_told_by_ends_and_number() -> None:
    event = FirmwareCommand(name="SNP_PAGE_RECLAIM", status=0, pages=np.array([5, 9, 300]))
    assert rows([event])[0].detail == "pfn 0x5..0x12c, 3 pages"


@pytest.mark.parametrize(("event", "words"), [
    (SystemCall(name="fallocate", errno=22, arguments={"fd": 7}), "VMM kernel fallocate fd 7 ✗ errno 22"),
    (
        PagesMoved(file="memfd", offsets=range(0x10, 0x14), resident=np.array([True, False, True, True])),
        f"kernel memory pages {TIMES} 4 memfd: 3 of page 0x10..0x13 have memory",
    ),
    (PagesPinned(owner=None, frames=np.arange(5, 9), pinned=True), f"kernel memory pin {TIMES} 4 pfn 0x5..0x8"),
    (PagesPinned(owner=None, frames=np.arange(5, 6), pinned=False), "kernel memory unpin pfn 0x5"),
    (PagesCopied(pages=16), f"KVM memory copy {TIMES} 16 from the shared to the private side"),
    (CachesWrittenBack(cores=8), "kernel caches WBINVD 8 cores"),
    (NestedMapping(root=1, gfns=range(2, 3), mapped=False), "KVM nested tables unmap gfn 0x2"),
    (NestedMapping(root=1, gfns=range(2, 4), mapped=True), f"KVM nested tables map {TIMES} 2 gfn 0x2..0x3"),
])  # fmt: skip
def test_events_of_memory_have_words(event: Event, words: str) -> None:
    assert " ".join(log([event]).text.splitlines()[3].split()[1:]) == words


def test_every_event_of_a_guests_life_has_words() -> None:
    """From the boot of the host to the end of a registered and of an SNP guest."""
    for kind, era in (("sev", "mainline"), ("snp", "rfc-v7")):
        system = System("milan", "log", installed=64 << 20)
        recorder = system.record()
        system.host.boot(era)
        guest = system.create_vm(kind=kind, memory="10 MiB")
        guest.launch()
        guest.vmm.close()
        assert {type(event) for event in recorder.events} >= {Ioctl, SystemCall, PagesMoved, FirmwareCommand}
        assert len(rows(recorder.events)) == len(recorder)


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(TypeError, match="no words for Event"):
        rows([Event()])
