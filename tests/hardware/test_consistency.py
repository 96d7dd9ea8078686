"""The consistency checks of VMRUN: each refuses a state that all others let pass, and none can be left out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from snpbook.hardware import consistency
from snpbook.hardware.encryption import MissingKeyError
from snpbook.hardware.exits import Hlt, Invalid
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.save_area import seal
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.msr import Msr
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
    "ASID too high": (
        "sev",
        0,
        lambda b: (b.machine.runnable.update({1007: frozenset({0})}), b.set_vmcb(asid=1007)),
        INVALID,
        "encrypted",
    ),
    "ASID of no guest": ("snp", 1, lambda b: b.set_vmcb(asid=6), INVALID, "in use by an active guest"),
    "guest of another complex": (
        "snp",
        1,
        lambda b: b.machine.runnable.update({ASID: frozenset({1})}),
        INVALID,
        "active on the core's complex",
    ),
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
    "SVM off": ("snp", 1, lambda b: b.set_vmsa(efer=0x400), INVALID, "EFER.SVME"),
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
