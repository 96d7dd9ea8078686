"""Random instructions on raw registers: the library executes them, the reference tells; registers and table compared.

The guest has no paging: virtual addresses are guest physical ones. Flags and opcodes are typed again on purpose.
"""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from snpbook.hardware import opcodes
from snpbook.hardware.exits import GeneralProtection, GuestException, HostPageFault, InvalidOpcode, Npf
from snpbook.spec.opcodes import decode
from tests.hardware.guests import ASID, PAGE, VMSA_PAGE, Bench
from tests.reference.access import instruction_fault
from tests.reference.rmp import Entry, ReferenceRmp

BYTES = {
    "RMPUPDATE": "f20f01fe", "PSMASH": "f30f01ff", "RMPREAD": "f20f01fd",
    "PVALIDATE": "f20f01ff", "RMPADJUST": "f30f01fe", "RMPQUERY": "f30f01fd",
}  # fmt: skip
HOST, GUEST = ("RMPUPDATE", "PSMASH", "RMPREAD"), ("PVALIDATE", "RMPADJUST", "RMPQUERY")
PRODUCTS = {"milan": {*BYTES} - {"RMPQUERY", "RMPREAD"}, "genoa": {*BYTES} - {"RMPREAD"}, "turin": {*BYTES}}
FLAGS = {0: 0x44, 1: 0, 2: 0, 3: 4, 4: 0, 6: 4, 7: 0}
"""ZF and PF by return code."""
CARRY = 1
UD, GP = ("exception", 6, 0), ("exception", 13, 0)
LARGE_PAGE, FIRST_PAGE, PAGES, OPERAND, MEMORY = 0x600, 0x900, 8, 0x50, 64 << 20
LIBRARY = SimpleNamespace(execute_host=opcodes.execute_host, execute_guest=opcodes.execute_guest)


class Case:
    """A machine with a few pages of a guest in random states, and the same in the reference."""

    def __init__(self, rng: random.Random) -> None:
        self.name, self.snp = rng.choice(list(PRODUCTS)), rng.random() < 0.9
        self.bench = Bench(self.name, snp=self.snp)
        machine = self.bench.machine
        self.model = ReferenceRmp(machine.rmp.entries)
        self.model.table[VMSA_PAGE] = Entry(True, asid=ASID, gfn=0xFFFFFFFFF, vmsa=True, vmpl=[15, 0, 0, 0])
        self.mapped: dict[int, int] = {}
        for gfn in range(PAGES):
            if rng.random() < 0.9:
                self._map(gfn, FIRST_PAGE + gfn)
            self.model.table[FIRST_PAGE + gfn] = self._entry(rng, gfn)
        for gfn in (512, 517):
            self._map(gfn, LARGE_PAGE + gfn - 512)
        large = self.model.table[LARGE_PAGE] = self._entry(rng, 512)
        if large.assigned:
            large.large = rng.random() < 0.7
        for i in range(1, 512):
            self.model.table[LARGE_PAGE + i] = Entry(assigned=large.large)
        if not large.large:
            self.model.table[LARGE_PAGE + 5] = self._entry(rng, 517)
        self.model.recount()
        for page, entry in self.model.table.items():
            machine.rmp.store(range(page, page + 1), np.array([entry.raw()], np.uint64))
        for asid, count in self.model.counters.items():
            machine.dram.write(machine.rmp.where.base + 8 * asid, count.to_bytes(8, "little"))
        self.model.in_use = {rng.choice((FIRST_PAGE, LARGE_PAGE, LARGE_PAGE + 5))} if rng.random() < 0.2 else set()
        machine.in_use = set(self.model.in_use)

    def _map(self, gfn: int, page: int) -> None:
        self.mapped[gfn] = page
        self.bench.map(gfn, page)

    def _entry(self, rng: random.Random, gfn: int) -> Entry:
        if rng.random() < 0.1:
            return Entry()
        return Entry(
            assigned=True,
            asid=ASID if rng.random() < 0.95 else 6,
            gfn=gfn if rng.random() < 0.95 else gfn ^ 1,
            immutable=rng.random() < 0.05,
            validated=rng.random() < 0.8,
            vmsa=rng.random() < 0.3,
            vmpl=[rng.choice((15, rng.randrange(16))) for _ in range(4)],
        )

    def same_table(self) -> bool:
        pages = list(self.model.table)
        found = self.bench.machine.rmp.peek(np.array(pages, np.uint64))
        return [tuple(row) for row in found.tolist()] == [self.model.entry(page).raw() for page in pages]


def compare(rng: random.Random, library: Any = LIBRARY) -> None:
    """One random machine and one instruction on it, by the host or by the guest."""
    case = Case(rng)
    name = rng.choice(list(BYTES))
    instruction = decode(bytes.fromhex(BYTES[name]) + rng.randbytes(3))
    assert instruction is not None
    if rng.random() < (0.6 if name in HOST else 0.1):
        _host(rng, case, name, instruction, library)
    else:
        _guest(rng, case, name, instruction, library)
    assert case.same_table()


def _host(rng: random.Random, case: Case, name: str, instruction: Any, library: Any) -> None:
    page = rng.choice((FIRST_PAGE, FIRST_PAGE + 1, LARGE_PAGE, LARGE_PAGE, LARGE_PAGE + 5, 0x3000, 1 << 30))
    gpa, assigned, size = rng.choice((page, 3)) * PAGE, rng.randrange(2), rng.randrange(2)
    immutable, asid = int(rng.random() < 0.3), rng.choice((0, ASID, 6, 1024))
    operand = gpa.to_bytes(8, "little") + bytes([assigned, size, immutable, 0]) + asid.to_bytes(4, "little")
    where = rng.choice((OPERAND, OPERAND, LARGE_PAGE + 7)) * PAGE + 8 * rng.randrange(16)
    case.bench.machine.dram.write(where, operand)
    beyond = rng.random() < 0.1
    rcx = rng.choice((MEMORY - 15, MEMORY, 1 << 63)) if beyond else where
    rax, rdx = page * PAGE + rng.choice((0, 5)), rng.getrandbits(64)
    outcome: Any
    try:
        done = library.execute_host(case.bench.cpu, instruction, rax, rcx, rdx)
        outcome = (done.rax, done.rcx, done.rdx, int(done.flags))
    except InvalidOpcode:
        outcome = UD
    except GeneralProtection:
        outcome = GP
    except HostPageFault as fault:
        outcome = ("#PF", fault.spa, int(fault.error))
    stored = case.bench.machine.dram.read(where, 16)
    if not case.snp or name not in PRODUCTS[case.name] or name in GUEST:
        assert (outcome, stored) == (UD, operand)
        return
    if beyond and name != "PSMASH":
        assert (outcome, stored) == (GP, operand)
        return
    if name == "RMPREAD":
        code, answer = case.model.rmpread(page)
        if code == 0 and case.model.answering(where // PAGE)[0].assigned:
            assert outcome == ("#PF", where // PAGE * PAGE, 0x80000003)
            return
        assert stored == (answer or operand)
    elif name == "PSMASH":
        code = case.model.psmash(page)
    elif asid == 1024:
        code = 1
    else:
        code = case.model.rmpupdate(page, gpa // PAGE, bool(assigned), asid, bool(immutable), bool(size))
    assert outcome == (code, rcx, rdx, FLAGS[code])


def _guest(rng: random.Random, case: Case, name: str, instruction: Any, library: Any) -> None:
    snp_guest, cpl = rng.random() < 0.9, rng.choice((0,) * 9 + (3,))
    vmpl = rng.choice((0, 0, 1, 2)) if name != "PVALIDATE" else int(rng.random() < 0.1)
    lma, code_segment = rng.random() < 0.9, rng.random() < 0.9
    long = lma and code_segment
    core = case.bench.core(cpl=cpl, vmpl=vmpl, sev_features=int(snp_guest), efer=0x1000 | 0x400 * lma)
    core.registers["cs"] = core.registers["cs"].replace(attrib=0x9B | 0x200 * code_segment)
    gfn = rng.choice((*range(PAGES), 512, 512, 512, 517, 9))
    if name == "PSMASH":
        gfn = rng.choice((LARGE_PAGE, LARGE_PAGE + 1))
    rax = gfn * PAGE + rng.choice((0, 0x123)) | (0 if long else rng.choice((0, 1 << 32)))
    size, target = rng.randrange(2), rng.choice((vmpl + 1, vmpl + 1, vmpl, 3, 4, 200))
    rights = rng.choice((0, 1, 15, rng.randrange(256)))
    vmsa, validate = rng.randrange(2), rng.randrange(2)
    rcx = size | rng.choice((0, 2, 1 << 63))
    rdx = validate | rng.choice((0, 1 << 63)) if name == "PVALIDATE" else target | rights << 8 | vmsa << 16 | 1 << 40
    done = library.execute_guest(core, instruction, rax, rcx, rdx)
    if isinstance(done, Npf):
        outcome: Any = ("NPF", done.gpa, int(done.error))
    elif isinstance(done, GuestException):
        outcome = ("exception", done.vector, int(done.error))
        if done.vector == 29:
            assert done.address == gfn * PAGE
    else:
        outcome = (done.rax, done.rcx, done.rdx, int(done.flags))
    wanted = _told(case, name, gfn, size, target, rights, vmsa, validate, vmpl, cpl, long, snp_guest)
    if isinstance(wanted, int):
        wanted = (wanted, FLAGS[wanted])
    if wanted[0] in ("exception", "NPF"):
        assert outcome == wanted
    elif len(wanted) == 2:
        assert outcome == (wanted[0], rcx, rdx, wanted[1])
    else:
        large, mask, marked = wanted[1:]
        assert outcome == (0, int(large), target | mask << 8 | marked << 16, FLAGS[0])


def _told(
    case: Case, name: str, gfn: int, size: int, target: int, rights: int, vmsa: int, validate: int,
    vmpl: int, cpl: int, long: bool, snp_guest: bool,
) -> Any:  # fmt: skip
    """What the documents say: an exception, an #NPF, a code, a code with flags, or RMPQUERY's findings."""
    if name != "PVALIDATE" and not long:
        return UD
    if name in GUEST and not snp_guest:
        return UD
    if name not in PRODUCTS[case.name] or not case.snp:
        return UD
    if cpl:
        return GP
    if name in HOST:
        return case.model.psmash(gfn, current_asid=ASID) if name == "PSMASH" else 2
    if name == "PVALIDATE" and vmpl:
        return GP
    if name != "RMPQUERY" and size and gfn % 512:
        return 1
    if name == "RMPADJUST" and not vmpl < target < 4:
        return 2 if target <= vmpl else 1
    if name == "RMPQUERY" and not vmpl < target < 4:
        return 2
    if gfn not in case.mapped:
        return "NPF", gfn * PAGE, 0x5_0000_0004
    page = case.mapped[gfn]
    if name == "PVALIDATE":
        code, carry = case.model.pvalidate(page, gfn, ASID, bool(validate), bool(size), gfn)
        found: Any = (code, FLAGS.get(code, 0) | carry)
    elif name == "RMPADJUST":
        code = case.model.rmpadjust(page, gfn, ASID, vmpl, target, rights, bool(vmsa), bool(size), gfn)
        found = code
    else:
        found = case.model.rmpquery(page, gfn, ASID, vmpl, target)
        code = found[0]
    if not isinstance(code, str):
        return found
    kind, error = instruction_fault(code)
    return ("exception", 29, error) if kind == "#VC" else ("NPF", gfn * PAGE, error)
