"""VMRUN: each consistency check by itself, what goes back into save area and VMCB, and what is left alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from snpbook.hardware import consistency
from snpbook.hardware.core import GuestCore
from snpbook.hardware.encryption import MissingKeyError
from snpbook.hardware.exits import Exit, GeneralProtection, Hlt, Invalid, Npf, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.save_area import seal
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.msr import Msr
from snpbook.spec.vmcb import ExitCode
from snpbook.spec.vmsa import VMSA
from tests.hardware.guests import ASID, PAGE, VMCB_PAGE, VMSA_PAGE, Bench
from tests.hardware.kinds import ES_VMSA_PAGE, AnyBench

INVALID, BUSY, IDLE_REQUIRED = -1 % 2**64, -2 % 2**64, -3 % 2**64
RESTRICTED, ALTERNATE, PREVENT_IBS, SSS, SMT = 1 << 3, 1 << 4, 1 << 6, 1 << 8, 1 << 15
AVIC = 1 << 31
EVENT = 1 << 31


async def nothing(cpu: GuestCpu) -> None:
    await cpu.load(rbx=7)


def entry(bench: Bench, clear: int = 0, add: int = 0) -> None:
    """Change bits of the VMSA page's entry."""
    raw = bench.machine.rmp.load(range(VMSA_PAGE, VMSA_PAGE + 1)).copy()
    raw[0, 0] = int(raw[0, 0]) & ~clear | add
    bench.machine.rmp.store(range(VMSA_PAGE, VMSA_PAGE + 1), raw)


def bios(bench: Bench, **values: int) -> None:
    for core in bench.machine.cores:
        core.set_by_bios({Msr[name]: value for name, value in values.items()})


def set_core(bench: Bench, **values: bool) -> None:
    for name, value in values.items():
        setattr(bench.machine.cores[0], name, value)


def allow(bench: Bench, features: int) -> None:
    """A processor with ALLOWED_SEV_FEATURES, and a VMCB that uses it."""
    product = bench.machine.product
    capabilities = product.capabilities | SevCapability.ALLOWED_SEV_FEATURES
    bench.machine.product = replace(product, capabilities=capabilities)
    bench.set_vmcb(allowed_sev_features=features, allowed_sev_features_enable=1)


def own(bench: Bench, page: int) -> None:
    """Give a page to another guest."""
    bench.assign(page, 0x77, asid=6)


def spoil_vmsa(bench: Bench) -> None:
    """Flip one bit of the ciphertext at the last byte that the checksum covers."""
    at = ES_VMSA_PAGE * PAGE + 0xFBF
    byte = bench.machine.dram.read(at, 1)[0]
    bench.machine.dram.write(at, bytes([byte ^ 1]))


def uncover(bench: Bench) -> None:
    """The RMP's end as other firmware would have it, so that the VMSA page lies behind."""
    base = bench.machine.cores[0].rdmsr(Msr.RMP_BASE)
    bios(bench, RMP_END=base + 0x3FFF + 16 * VMSA_PAGE)
    bench.machine.locate_rmp(bench.machine.cores[0])


def set_busy(bench: Bench) -> None:
    """VINTR_CTRL.BUSY in the VMSA of a SEV-ES guest, as its firmware would have launched it."""
    bench.machine.encryption.write(ASID, ES_VMSA_PAGE * PAGE + 0x3B8, (1 << 63).to_bytes(8, "little"))
    seal(bench.machine, ASID, ES_VMSA_PAGE)


Spoil = Callable[[Any], Any]
ROWS: dict[str, tuple[str, int, Spoil, int, str]] = {
    "ASID 0": ("plain", 0, lambda b: b.set_vmcb(asid=0), INVALID, "ASID is not that of the host"),
    "plain guest without nested paging": ("plain", 0, lambda b: b.set_vmcb(nested_paging=0), INVALID, "nested paging"),
    "SNP guest without nested paging": ("snp", 1, lambda b: b.set_vmcb(nested_paging=0), INVALID, "nested paging"),
    "SEV-ES without SEV": ("es", 0, lambda b: b.set_vmcb(sev=0), INVALID, "SEV-ES needs SEV"),
    "SMM open, SEV": ("sev", 0, lambda b: bios(b, HWCR=0), INVALID, "HWCR.SmmLock"),
    "SMM open, SNP": ("snp", 1, lambda b: bios(b, HWCR=0), INVALID, "HWCR.SmmLock"),
    "ASID too high": ("sev", 0, lambda b: (b.machine.runnable.add(1007), b.set_vmcb(asid=1007)), INVALID, "encrypted"),
    "ASID of no guest": ("snp", 1, lambda b: b.set_vmcb(asid=6), INVALID, "in use by an active guest"),
    "guest gone": ("sev", 0, lambda b: b.machine.runnable.clear(), INVALID, "in use by an active guest"),
    "32-bit host": ("sev", 0, lambda b: set_core(b, long_mode=False), INVALID, "64-bit host"),
    "no LBR virtualization": ("es", 0, lambda b: b.set_vmcb(lbr_virtualization=0), INVALID, "LBR virtualization"),
    "AVIC page of a guest": (
        "plain",
        0,
        lambda b: (own(b, 0x40), b.set_vmcb(virtual_interrupt=AVIC, avic_backing_page=0x40 * PAGE)),
        INVALID,
        "AVIC backing",
    ),
    "VMSA beyond memory": ("snp", 1, lambda b: b.set_vmcb(vmsa_pa=64 << 20), INVALID, "in a page of memory"),
    "VMSA in no page": ("snp", 1, lambda b: b.set_vmcb(vmsa_pa=VMSA_PAGE * PAGE + 8), INVALID, "in a page of memory"),
    "VMSA with a C-bit": (
        "snp",
        1,
        lambda b: b.set_vmcb(vmsa_pa=1 << 51 | VMSA_PAGE * PAGE),
        INVALID,
        "in a page of memory",
    ),
    "VMSA in use": ("snp", 1, lambda b: b.machine.in_use.add(VMSA_PAGE), BUSY, "no core's use"),
    "not covered": ("snp", 1, uncover, INVALID, "covered by the RMP"),
    "no longer assigned": ("snp", 1, lambda b: entry(b, clear=1), INVALID, "VMSA page is the guest's"),
    "another's": ("snp", 1, lambda b: b.assign(VMSA_PAGE, 1, asid=6, vmsa=1), INVALID, "VMSA page is the guest's"),
    "immutable": ("snp", 1, lambda b: entry(b, add=1 << 2), INVALID, "VMSA page is mutable"),
    "no VMSA mark": ("snp", 1, lambda b: entry(b, clear=1 << 61), INVALID, "marked as a VMSA"),
    "SNP not active in a guest's page": ("snp", 0, lambda b: None, INVALID, "without SNPActive"),
    "SEV-ES VMSA of a guest": ("es", 0, lambda b: own(b, ES_VMSA_PAGE), INVALID, "without SNPActive"),
    "SEV-ES VMSA spoilt": ("es", 0, spoil_vmsa, INVALID, "checksum"),
    "SEV-ES VMSA never launched": ("es", 0, lambda b: b.machine.vmsa_checksums.clear(), INVALID, "checksum"),
    "no such VMPL": ("snp", 1, lambda b: b.set_vmsa(vmpl=4), INVALID, "VMPL exists"),
    "feature of a later product": ("snp", 1 | 1 << 16, lambda b: None, INVALID, "known to the processor"),
    "feature without a name": ("snp", 1 | 1 << 40, lambda b: None, INVALID, "known to the processor"),
    "feature not allowed": ("snp", 1 | 1 << 5, lambda b: allow(b, 1), INVALID, "ALLOWED_SEV_FEATURES"),
    "both injections": ("snp", 1 | RESTRICTED | ALTERNATE, lambda b: None, INVALID, "exclude each other"),
    "restricted with AVIC": (
        "snp",
        1 | RESTRICTED,
        lambda b: b.set_vmcb(virtual_interrupt=AVIC),
        INVALID,
        "restricted injection goes without",
    ),
    "alternate with AVIC": (
        "snp",
        1 | ALTERNATE,
        lambda b: b.set_vmcb(virtual_interrupt=AVIC),
        INVALID,
        "alternate injection goes without",
    ),
    "no such event": ("plain", 0, lambda b: b.set_vmcb(event_injection=EVENT | 1 << 8 | 13), INVALID, "event exists"),
    "exception 32": ("plain", 0, lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 32), INVALID, "event exists"),
    "NMI as exception": ("plain", 0, lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 2), INVALID, "event exists"),
    "software interrupt": (
        "snp",
        1,
        lambda b: b.set_vmcb(event_injection=EVENT | 4 << 8 | 0x80),
        INVALID,
        "no software",
    ),
    "#BP": ("es", 0, lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 3), INVALID, "no software interrupt"),
    "#OF": ("es", 0, lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 4), INVALID, "no software interrupt"),
    "restricted: #GP": (
        "snp",
        1 | RESTRICTED,
        lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 13),
        INVALID,
        "#HV alone",
    ),
    "restricted: #HV as an interrupt": (
        "snp",
        1 | RESTRICTED,
        lambda b: b.set_vmcb(event_injection=EVENT | 28),
        INVALID,
        "#HV alone",
    ),
    "restricted: #HV with an error code": (
        "snp",
        1 | RESTRICTED,
        lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 1 << 11 | 28),
        INVALID,
        "#HV alone",
    ),
    "shadow stacks twice": ("snp", 1 | SSS, lambda b: b.set_vmcb(sss_check=1), INVALID, "VmplSSS"),
    "host samples fetches": (
        "snp",
        1 | PREVENT_IBS,
        lambda b: bios(b, IBS_FETCH_CTL=1 << 48),
        INVALID,
        "PreventHostIBS",
    ),
    "host samples ops": ("snp", 1 | PREVENT_IBS, lambda b: bios(b, IBS_OP_CTL=1 << 17), INVALID, "PreventHostIBS"),
    "busy": ("snp", 1, lambda b: b.set_vmsa(vintr_ctrl=1 << 63), BUSY, "BUSY is clear"),
    "busy, SEV-ES": ("es", 0, set_busy, BUSY, "BUSY is clear"),
    "sibling at work": ("snp", 1 | SMT, lambda b: None, IDLE_REQUIRED, "sibling"),
    "sibling in a guest": (
        "snp",
        1 | SMT,
        lambda b: vars(b.machine.cores[1]).update(idle=True, in_guest=True),
        IDLE_REQUIRED,
        "sibling",
    ),
}
CHECKS = [*consistency.CONTROL_CHECKS, *consistency.STATE_CHECKS]


def spoilt(name: str) -> AnyBench:
    kind, features, spoil, _, _ = ROWS[name]
    bench = AnyBench(kind, features=features)
    bench.start(nothing)
    spoil(bench)
    return bench


@pytest.mark.parametrize("name", ROWS)
def test_inconsistent_states_are_refused(name: str) -> None:
    """By the rule that it is about, and nothing but the exit code is written."""
    *_, code, rule = ROWS[name]
    bench = spoilt(name)
    before = bench.machine.dram.read(0, bench.machine.dram.size)
    exit_ = bench.run()
    assert isinstance(exit_, Invalid)
    assert rule in exit_.rule
    assert exit_.code == code
    assert int.from_bytes(bench.machine.dram.read(VMCB_PAGE * PAGE + 0x70, 8), "little") == code
    after = bytearray(bench.machine.dram.read(0, bench.machine.dram.size))
    after[VMCB_PAGE * PAGE + 0x70 : VMCB_PAGE * PAGE + 0x88] = before[VMCB_PAGE * PAGE + 0x70 : VMCB_PAGE * PAGE + 0x88]
    assert after == before
    assert bench.executor.results == []
    assert not bench.machine.cores[0].in_guest


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.rule)
def test_no_check_can_be_left_out(check: consistency.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule has a row that it alone refuses: without it the guest runs, or another rule answers."""
    names = [name for name, row in ROWS.items() if row[4] in check.rule]
    if check.rule.startswith("SEV_FEATURES.SNPActive"):
        names = ["SNP off"]
    assert names
    for table in ("CONTROL_CHECKS", "STATE_CHECKS"):
        rest = tuple(other for other in getattr(consistency, table) if other is not check)
        monkeypatch.setattr(f"snpbook.hardware.vmrun.{table}", rest)
    for name in names:
        bench = AnyBench(snp=False) if name == "SNP off" else spoilt(name)
        bench.start(nothing) if name == "SNP off" else None
        try:
            exit_ = bench.run()
        except (ValueError, LookupError, MissingKeyError):
            continue  # what the check keeps away from the rest of the machine
        assert not isinstance(exit_, Invalid) or exit_.rule != check.rule


def test_snp_active_needs_snp_on() -> None:
    bench = AnyBench(snp=False)
    bench.start(nothing)
    exit_ = bench.run()
    assert isinstance(exit_, Invalid)
    assert "SNPEn" in exit_.rule


PASSING: dict[str, tuple[str, str, int, Spoil]] = {
    "SNP": ("genoa", "snp", 1, lambda b: None),
    "SEV-ES": ("genoa", "es", 0, lambda b: None),
    "SEV": ("genoa", "sev", 0, lambda b: None),
    "plain": ("genoa", "plain", 0, lambda b: None),
    "plain, SMM open": ("genoa", "plain", 0, lambda b: bios(b, HWCR=0)),
    "plain, ASID of no encrypted guest": ("genoa", "plain", 0, lambda b: b.set_vmcb(asid=2000)),
    "32-bit host of a plain guest": ("genoa", "plain", 0, lambda b: set_core(b, long_mode=False)),
    "32-bit host where that may be": ("naples", "sev", 0, lambda b: set_core(b, long_mode=False)),
    "SEV-ES on Naples": ("naples", "es", 0, lambda b: None),
    "bytes that the checksum leaves out": (
        "genoa",
        "es",
        0,
        lambda b: b.machine.dram.write(ES_VMSA_PAGE * PAGE + 0xFC0, b"x"),
    ),
    "restricted: #HV": ("genoa", "snp", 1 | RESTRICTED, lambda b: b.set_vmcb(event_injection=EVENT | 3 << 8 | 28)),
    "alternate: the VMCB's event does not count": (
        "genoa",
        "snp",
        1 | ALTERNATE,
        lambda b: b.set_vmcb(event_injection=EVENT | 4 << 8 | 0x80),
    ),
    "software interrupt without SEV-ES": (
        "genoa",
        "sev",
        0,
        lambda b: b.set_vmcb(event_injection=EVENT | 4 << 8 | 0x80),
    ),
    "an event that is not valid": ("genoa", "snp", 1, lambda b: b.set_vmcb(event_injection=4 << 8 | 0x80)),
    "host IBS without the feature": ("genoa", "snp", 1, lambda b: bios(b, IBS_OP_CTL=1 << 17)),
    "IBS not enabled": ("genoa", "snp", 1 | PREVENT_IBS, lambda b: bios(b, IBS_OP_CTL=1, IBS_FETCH_CTL=1)),
    "features allowed": ("genoa", "snp", 1 | 1 << 5, lambda b: allow(b, 1 | 1 << 5)),
    "sibling idle": ("genoa", "snp", 1 | SMT, lambda b: b.cpu.hlt(1)),
    "busy where nobody knows the bit": ("naples", "es", 0, set_busy),
}


@pytest.mark.parametrize("name", PASSING)
def test_states_that_pass(name: str) -> None:
    product, kind, features, change = PASSING[name]
    bench = AnyBench(kind, product, features=features, snp=product != "naples")

    async def program(cpu: GuestCpu) -> None:
        for vector in (28, 0x80):
            cpu.set_handler(vector, ignore)
        await cpu.load(rax=7)

    async def ignore(cpu: GuestCpu, exception: Any) -> bool:
        return False

    bench.start(program)
    change(bench)
    assert bench.run() == Hlt()
    assert bench.read_registers().rax == 7


@pytest.mark.parametrize("spa", [VMCB_PAGE * PAGE + 8, -PAGE, 64 << 20])
def test_the_vmcb_is_a_page(spa: int) -> None:
    bench = Bench()
    with pytest.raises(GeneralProtection, match="address of a page of memory"):
        bench.cpu.vmrun(spa, bench.executor, "vcpu0")


def test_a_vmcb_in_a_page_of_a_guest() -> None:
    bench = Bench()
    bench.cpu.rmpupdate(range(VMCB_PAGE, VMCB_PAGE + 1), range(1), NewState(assigned=True, asid=6))
    with pytest.raises(GeneralProtection, match="VMCB page is the hypervisor's"):
        bench.run()


@pytest.mark.parametrize(
    ("spa", "core", "error", "text"),
    [
        (1.0, 0, TypeError, r"vmcb_spa = 1\.0: an integer"),
        (VMCB_PAGE * PAGE, 2, ValueError, "core = 2: one of the machine's 2, not in guest mode"),
        (VMCB_PAGE * PAGE, -1, ValueError, "core = -1"),
        (VMCB_PAGE * PAGE, 0.5, TypeError, r"core = 0\.5: an integer"),
    ],
)
def test_operands_that_no_core_has(spa: Any, core: Any, error: type[Exception], text: str) -> None:
    bench = Bench()
    with pytest.raises(error, match=text):
        bench.cpu.vmrun(spa, bench.executor, "vcpu0", core)


def test_exits_in_the_vmcb() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.read(0x5000, 1)
        await cpu.vmgexit()

    bench = Bench()
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Npf)
    vmcb = bench.read_vmcb()
    assert (vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2) == (0x400, int(exit_.error), 0x5000)
    bench.give(5, 0x905)
    assert bench.run() == Vmgexit()
    vmcb = bench.read_vmcb()
    assert (vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2) == (0x403, 0, 0)
    bench.run()
    assert bench.read_vmcb().exit_code == 0x78


@pytest.mark.parametrize("feature", [0, 1 << 10])
def test_vmgexit_parameter(feature: int) -> None:
    """With the feature the hypervisor sees RAX and CPL; the VMCB's own fields stay as they were without it."""

    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rax=0x1234)
        await cpu.vmgexit()

    bench = AnyBench(features=1 | feature)
    bench.set_vmcb(vmgexit_rax=5, vmgexit_cpl=3)
    bench.start(program)
    assert bench.run() == Vmgexit()
    vmcb = bench.read_vmcb()
    assert (vmcb.vmgexit_rax, vmcb.vmgexit_cpl) == ((0x1234, 0) if feature else (5, 3))


def test_what_the_layouts_do_not_name_stays() -> None:
    """Reserved bytes of VMCB and VMSA: nobody knows them here, and nobody loses them."""
    bench = Bench()
    bench.machine.dram.write(VMCB_PAGE * PAGE + 0x3E0, b"\xa5" * 0x20)
    offset = 0x380
    assert VMSA.reserved_mask >> 8 * offset & 1
    bench.machine.encryption.write(ASID, VMSA_PAGE * PAGE + offset, b"\x5a" * 16)
    bench.start(nothing)
    bench.run()
    assert bench.machine.dram.read(VMCB_PAGE * PAGE + 0x3E0, 0x20) == b"\xa5" * 0x20
    assert bench.machine.encryption.read(ASID, VMSA_PAGE * PAGE + offset, 16) == b"\x5a" * 16


class Busybody:
    """An executor that lets a test look at the machine while its guest runs on a core."""

    def __init__(self, act: Callable[[GuestCore], None]) -> None:
        self.act = act

    def run(self, core: GuestCore) -> Exit:
        self.act(core)
        core.registers["rbx"] = 0x77
        return Hlt()


def test_any_executor_runs_from_the_vmsa_and_back() -> None:
    """VMSA in, VMSA out: the hand-over is the page and nothing else."""
    bench = Bench()
    bench.set_vmsa(rax=0x55, rcx=0x66)
    seen = []
    executor = Busybody(lambda core: seen.append((core.registers["rax"], core.registers["rcx"], core.physical.number)))
    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, executor, "vcpu0", 1) == Hlt()
    assert seen == [(0x55, 0x66, 1)]
    assert bench.read_vmsa().rbx == 0x77


def test_pages_are_in_use_while_the_guest_runs() -> None:
    """RMPUPDATE from another core answers FAIL_INUSE for VMCB, VMSA and AVIC page, and no longer after the exit."""
    bench = AnyBench("snp")
    bench.vmcb |= {"virtual_interrupt": AVIC, "avic_backing_page": 0x40 * PAGE}
    bench.set_vmcb()
    codes: list[list[int]] = []
    pages = [VMCB_PAGE, VMSA_PAGE, 0x40, 0x41]

    def update(core: GuestCore | None = None) -> None:
        new = NewState(assigned=True, asid=9)
        codes.append([int(bench.cpu.rmpupdate(range(p, p + 1), range(0x50, 0x51), new)[0]) for p in pages])

    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(update), "vcpu0") == Hlt()
    assert codes == [[3, 3, 3, 0]]
    assert bench.machine.in_use == set()
    update()
    assert codes[1] == [0, 0, 0, 0]


def test_debug_status_tells_of_a_thread_in_a_guest() -> None:
    bench = Bench()
    seen: list[list[int]] = []
    cores = bench.machine.cores
    watch = Busybody(lambda _: seen.append([core.rdmsr(Msr.DEBUG_STATUS) for core in cores]))
    bench.cpu.vmrun(VMCB_PAGE * PAGE, watch, "vcpu0", 1)
    assert seen == [[0, 4]]
    assert [core.rdmsr(Msr.DEBUG_STATUS) for core in cores] == [0, 0]


def test_vmrun_wakes_its_core() -> None:
    """A thread that runs guests is no idle sibling, even when it was halted before."""
    bench = AnyBench(features=1 | SMT)
    for core in (0, 1):
        bench.cpu.hlt(core)
    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu0", 1) == Hlt()
    exit_ = bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu0", 0)
    assert exit_.code == IDLE_REQUIRED


@pytest.mark.parametrize("name", ["genoa", "turin"])
def test_guest_sev_features_are_told_where_the_field_exists(name: str) -> None:
    bench = AnyBench(name=name, features=1 | 1 << 5)
    bench.set_vmcb(guest_sev_features=0x77)
    bench.start(nothing)
    assert bench.run() == Hlt()
    assert bench.read_vmcb().guest_sev_features == (0x77 if name == "genoa" else 0x21)


def test_tlb_control_reaches_the_core() -> None:
    bench = AnyBench("plain")
    bench.memory(5, 0x905)
    bench.memory(6, 0x906)

    async def read(cpu: GuestCpu) -> Any:
        return await cpu.read(0x5000, 1)

    for page, control in ((0x905, 0), (0x906, 0), (0x906, 3)):
        bench.map(5, page)
        bench.machine.dram.write(page * PAGE, bytes([page & 0xFF]))
        bench.set_vmcb(tlb_control=control)
        bench.start(read)
        bench.run()
        assert bench.executor.outcome == (b"\x05" if not control else b"\x06")


def test_a_core_in_a_guest_enters_no_other() -> None:
    bench = Bench()

    def again(core: GuestCore) -> None:
        with pytest.raises(ValueError, match="core = 0: one of the machine's 2, not in guest mode"):
            bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu1", 0)
        exit_ = bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(lambda _: None), "vcpu1", 1)
        assert isinstance(exit_, Invalid)
        assert exit_.code == ExitCode.BUSY  # the VMSA runs already

    assert bench.cpu.vmrun(VMCB_PAGE * PAGE, Busybody(again), "vcpu0") == Hlt()


def test_a_program_that_breaks_leaves_guest_mode() -> None:
    async def wrong(cpu: GuestCpu) -> None:
        await cpu.load(vmpl=1)

    bench = Bench()
    bench.start(wrong)
    with pytest.raises(ValueError, match="vmpl"):
        bench.run()
    assert bench.machine.in_use == set()
    assert not bench.machine.cores[0].in_guest


def test_the_host_sees_no_register() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rax=0x1122334455667788, rbx=0x1122334455667788)

    bench = Bench()
    bench.start(program)
    bench.run()
    secret = (0x1122334455667788).to_bytes(8, "little")
    whole = bench.cpu.read(0, bench.machine.dram.size)
    assert secret not in whole
    assert secret in bench.machine.encryption.read_pages(ASID, np.array([VMSA_PAGE], np.uint64)).tobytes()
