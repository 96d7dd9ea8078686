"""A guest that runs on a bare board, the little that a host does for it, and an agent that carries it elsewhere.

The guest is a program on the hardware's executor, with page tables, a GHCB and the sev-guest driver; it halts in its
middle, where it may be moved. What the agent does is done with its keys, as it would itself inside its guest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from snpbook.guest.attestation import request_report
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.page_tables import enable_paging
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Hlt, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.vmrun import vmrun
from snpbook.spec.commands import Command
from snpbook.spec.ghcb import GHCB, Nae
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.vmcb import VMCB, intercept_bits
from snpbook.spec.vmsa import VMSA
from tests.firmware.test_requests import seal, unseal
from tests.machines import MIB, PAGE, Board, counting_rng

POLICY = DEFAULT_POLICY | 1 << 18
GUEST, AGENT, REQUEST, RESPONSE = 17 * MIB, 17 * MIB + PAGE, 17 * MIB + 2 * PAGE, 17 * MIB + 3 * PAGE
NESTED, VMCB_AT, OUT, MDATA, META_OUT = (17 * MIB + number * 16 * PAGE for number in range(1, 6))
HELPER, TABLES, SECRETS, DATA, SHARED = 0x0000, 0x1000, 0x5000, 0x6000, 0x8000
PRIVATE = [HELPER, *range(TABLES, TABLES + 4 * PAGE, PAGE), SECRETS, DATA]
VMSA_GPA = 0xFFFFFFFFF000
KEY_REQUEST = struct.pack("<IIQIIQ", 1, 0, 0x09, 0, 0, 0)
"""A key from the VMRK, with policy and measurement."""


async def resident(cpu: GuestCpu) -> tuple[Any, ...]:
    """Do something, halt, and tell of it: of memory, registers, message numbers and keys as they are then."""
    place = Layout(tables=TABLES, shared=SHARED, secrets=SECRETS, cpuid=0)
    await enable_paging(cpu, place, 51)
    report = await request_report(cpu, place, b"before the move".ljust(64, b"."))
    await cpu.write(DATA + 100, sha256(report).digest())
    await cpu.load(lstar=0x1234567890AB)
    await cpu.hlt()
    memory = await cpu.read(DATA, PAGE)
    registers = await cpu.look("lstar", "cr3", "cr0")
    after = await request_report(cpu, place, sha256(memory).digest() * 2)
    key = await exchange(cpu, place, 3, KEY_REQUEST)
    secrets = SECRETS_PAGE.unpack(await cpu.read(SECRETS, PAGE))
    said = after[:0x30] + after[0x50:0x140]
    return memory, registers, said, key, secrets.msg_seqno_0


async def exchange(cpu: GuestCpu, place: Layout, kind: int, body: bytes) -> bytes:
    """One guest message with VMPCK0, by the numbers that the secrets page keeps."""
    page = await cpu.read(place.secrets, PAGE)
    key, seqno = page[0x20:0x40], struct.unpack_from("<I", page, 0xA0)[0] + 1
    await cpu.write(place.secrets + 0xA0, struct.pack("<I", seqno + 1))
    await cpu.write(place.request, seal(key, body, seqno=seqno, kind=kind).ljust(PAGE, b"\0"))
    await Ghcb(cpu, place.ghcb).call(Nae.GUEST_REQUEST, place.request, place.response)
    header, answer = unseal(key, await cpu.read(place.response, PAGE))
    assert header[0] == seqno + 1
    return answer


@dataclass
class Home:
    """A board that has an agent, and a guest whose private pages lie from `base` on."""

    board: Board
    base: int
    asid: int = 1
    executor: CoroutineExecutor = field(default_factory=CoroutineExecutor)

    def __post_init__(self) -> None:
        board = self.board.initialise()
        board.psp.rng = counting_rng(struct.pack("<Q", self.base))  # no two boards draw the same keys
        board.start(AGENT, 9)
        board.finish(AGENT)

    # The agent.

    def tell(self, kind: int, body: bytes, size: int, gctx: int = AGENT, vmpck: int = 0) -> bytes:
        """A message of the agent, or of another guest: the payload of the answer."""
        context = self.board.psp.context(gctx)
        key, count = getattr(context, f"vmpck{vmpck}"), getattr(context, f"msg_count{vmpck}")
        message = seal(key, body, seqno=count + 1, kind=kind, vmpck=vmpck)
        self.board.machine.dram.write(REQUEST, message)
        self.board.assign(RESPONSE, FIRMWARE)
        places = {"request_paddr": REQUEST, "response_paddr": RESPONSE}
        self.board.ok(Command.SNP_GUEST_REQUEST, gctx_paddr=gctx, **places)
        header, answer = unseal(key, self.board.cpu.read(RESPONSE, PAGE))
        assert (header[0], header[4], len(answer)) == (count + 2, kind + 1, size)
        self.reclaim(RESPONSE)
        self.board.assign(RESPONSE, HYPERVISOR)
        return answer

    def reclaim(self, spa: int) -> None:
        self.board.ok(Command.SNP_PAGE_RECLAIM, page=spa >> 12)

    def export(self, imi: int = 0, **sender: int) -> tuple[int, bytes]:
        """MSG_EXPORT_REQ: status and context."""
        answer = self.tell(7, struct.pack("<QII", GUEST, imi, 0), 0xFA0, **sender)
        status, size, version = struct.unpack_from("<III", answer)
        assert (size, version) == ((0, 0) if status else (0x300, 3))
        return status, answer[0x20:0x320]

    def incoming(self, kind: int, context: bytes, size: int = 0x300, version: int = 3, **sender: int) -> int:
        """MSG_IMPORT_REQ (9), MSG_ABSORB_REQ (11) or MSG_ABSORB_NOMA_REQ (15): the status."""
        body = struct.pack("<QII16x", 0 if kind == 15 else GUEST, size, version) + context
        status: int = struct.unpack("<I12x", self.tell(kind, body, 0x10, **sender))[0]
        return status

    # The guest.

    def at(self, gpa: int) -> int:
        """Where a private page lies."""
        return self.base + (0x10 * PAGE if gpa == VMSA_GPA else gpa)

    def launch(self) -> None:
        """The guest with its agent, VMRK given, up to LAUNCH_FINISH; its helper page is the migration image."""
        board = self.board
        board.create(GUEST)
        board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GUEST, policy=POLICY, ma_en=1, ma_gctx_paddr=AGENT)
        board.ok(Command.SNP_ACTIVATE, gctx_paddr=GUEST, asid=self.asid)
        assert self.tell(13, struct.pack("<Q24x", GUEST) + b"V" * 32, 0x10) == bytes(0x10)
        self.add_helper()
        board.machine.dram.write(self.at(DATA), b"data of the image" * 200)
        for gpa in PRIVATE[1:]:
            kind = LaunchPage.SECRETS if gpa == SECRETS else LaunchPage.NORMAL
            board.add(self.at(gpa), gpa, kind, asid=self.asid, gctx_paddr=GUEST)
        board.machine.dram.write(self.at(VMSA_GPA), VMSA.pack(sev_features=1, cr0=0x10, efer=0x1000, rip=0xFFF0))
        board.add(self.at(VMSA_GPA), VMSA_GPA, LaunchPage.VMSA, asid=self.asid, gctx_paddr=GUEST)
        board.finish(GUEST, host_data=b"h" * 32)
        self.executor.start(resident)
        self.build()

    def add_helper(self) -> None:
        self.board.machine.dram.write(self.at(HELPER), b"migration helper" * 256)
        self.board.add(self.at(HELPER), HELPER, asid=self.asid, gctx_paddr=GUEST, imi_page=1)

    def build(self) -> None:
        """Nested tables of the first 64 KB and the VMCB."""
        dram = self.board.machine.dram
        for level in range(3):
            dram.write(NESTED + level * PAGE, struct.pack("<Q", NESTED + (level + 1) * PAGE | 7))
        for number in range(16):
            gpa = number * PAGE
            spa = NESTED + (8 + number - SHARED // PAGE) * PAGE if SHARED <= gpa < SHARED + 3 * PAGE else self.at(gpa)
            dram.write(NESTED + 3 * PAGE + 8 * number, struct.pack("<Q", spa | 7))
        control = VMCB.pack(
            nested_paging=1, sev=1, sev_es=1, asid=self.asid, nested_cr3=NESTED, lbr_virtualization=1,
            intercepts=intercept_bits(0x78, 0x7F, 0x80), vmsa_pa=self.at(VMSA_GPA), tlb_control=1,
        )  # fmt: skip
        dram.write(VMCB_AT, control)

    def run(self) -> CoroutineExecutor:
        """Run the guest until it halts, and answer its guest requests."""
        while True:
            exit_ = vmrun(self.board.machine, VMCB_AT, self.executor, "vcpu0")
            if isinstance(exit_, Hlt):
                return self.executor
            assert isinstance(exit_, Vmgexit), exit_
            page = NESTED + 8 * PAGE
            ghcb = GHCB.unpack(self.board.cpu.read(page, PAGE))
            assert ghcb.sw_exit_code == Nae.GUEST_REQUEST
            request, response = (page + gpa - SHARED for gpa in (ghcb.sw_exit_info_1, ghcb.sw_exit_info_2))
            self.board.assign(response, FIRMWARE)
            places = {"request_paddr": request, "response_paddr": response}
            self.board.ok(Command.SNP_GUEST_REQUEST, gctx_paddr=GUEST, **places)
            self.reclaim(response)
            self.board.assign(response, HYPERVISOR)
            self.board.machine.dram.write(page, bytes(ghcb.replace(sw_exit_info_1=0, sw_exit_info_2=0)))

    # Swap.

    def pack(self) -> Luggage:
        """Swap every private page out, then the page with their entries by the root entry."""
        board = self.board
        for spa in (OUT, MDATA, META_OUT):
            self.reclaim(spa)
            board.assign(spa, HYPERVISOR)
            board.assign(spa, FIRMWARE)
        board.ok(Command.SNP_PAGE_MD_INIT, gctx_paddr=GUEST, page_paddr=MDATA)
        pages = {}
        for slot, gpa in enumerate([*PRIVATE, VMSA_GPA]):
            board.assign(self.at(gpa), NewState(assigned=True, asid=self.asid, immutable=True), gpa)
            assert board.state(self.at(gpa)) == PageState.PRE_SWAP
            board.ok(Command.SNP_PAGE_SWAP_OUT, **self.fields(slot, gpa, src_paddr=self.at(gpa), dst_paddr=OUT))
            pages[gpa] = board.cpu.read(OUT, PAGE)
        root = {"gctx_paddr": GUEST, "src_paddr": MDATA, "dst_paddr": META_OUT, "page_type": 1, "root_mdata_en": 1}
        board.ok(Command.SNP_PAGE_SWAP_OUT, **root)
        return Luggage(pages, board.cpu.read(META_OUT, PAGE))

    def fields(self, slot: int, gpa: int, **more: int) -> dict[str, int]:
        kind = 2 if gpa == VMSA_GPA else 0
        return {"gctx_paddr": GUEST, "mdata_paddr": MDATA + 64 * slot, "page_type": kind, **more}

    def take_entries(self, page: bytes, spa: int = MDATA) -> int:
        """Swap the page with the entries in: the status."""
        if self.board.state(spa) != PageState.FIRMWARE:
            self.board.assign(spa, FIRMWARE)
        self.board.machine.dram.write(META_OUT, page)
        root = {"gctx_paddr": GUEST, "src_paddr": META_OUT, "dst_paddr": spa, "page_type": 1, "root_mdata_en": 1}
        return self.board.command(Command.SNP_PAGE_SWAP_IN, **root)

    def take_page(self, slot: int, gpa: int, page: bytes) -> int:
        """Swap a page in for the guest address `gpa`: the status."""
        board, spa = self.board, self.at(gpa)
        if board.state(spa) != PageState.PRE_GUEST:
            board.assign(spa, NewState(assigned=True, asid=self.asid, immutable=True), gpa)
        board.machine.dram.write(OUT, page)
        status = board.command(Command.SNP_PAGE_SWAP_IN, **self.fields(slot, gpa, src_paddr=OUT, dst_paddr=spa))
        if status == 0:
            self.reclaim(spa)
            assert board.state(spa) == PageState.GUEST_VALID
        return status

    def receive(self, how: str, context: bytes, *, activate: bool = True) -> int:
        """Make the exported context a guest here, by IMPORT or by ABSORB into the helper's launch: the status."""
        board = self.board
        board.create(GUEST)
        if how == "import":
            status = self.incoming(9, context)
            if activate and status == 0:
                board.ok(Command.SNP_ACTIVATE, gctx_paddr=GUEST, asid=self.asid)
            return status
        start = {"policy": POLICY, "ma_en": 1, "ma_gctx_paddr": AGENT, "imi_en": 1}
        board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GUEST, **start)
        board.ok(Command.SNP_ACTIVATE, gctx_paddr=GUEST, asid=self.asid)
        self.add_helper()
        return self.incoming(11, context)


@dataclass
class Luggage:
    """Sealed pages by guest address, in the order of their entries, and the sealed page of entries."""

    pages: dict[int, bytes]
    entries: bytes
