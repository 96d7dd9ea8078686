"""SNP_INIT and SNP_INIT_EX: the machine that SNP demands, and the reverse map table that they build.

Only this file writes the whole table. Sources: SNP ABI; the order of checks and of filling is that of firmware 1.55.25.
"""

from __future__ import annotations

import numpy as np

from snpbook.firmware.pages import ADDRESS_LIMIT, check_address, without_c_bit
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.range_list import pages_between, pages_of, read_entries
from snpbook.hardware.msr import bios_settings, first_disagreement
from snpbook.hardware.rmp import U64
from snpbook.spec import rmp as spec
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.memory_map import ASEG, HT_HOLE
from snpbook.spec.msr import (
    HWCR_SMM_LOCK,
    RMP_ALIGNMENT,
    SAME_ON_ALL_CORES,
    SYSCFG_MEM_ENCRYPT,
    SYSCFG_MFDM,
    SYSCFG_MULTI_KEY,
    SYSCFG_SNP_EN,
    SYSCFG_VMPL_EN,
    Msr,
)
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.platform import RANGE_LIST_HEADER, RANGE_LIST_LIMIT, Fault
from snpbook.spec.snp_buffers import SNP_INIT_EX
from snpbook.spec.states import PLATFORM_TRANSITIONS, LegacyPlatformState
from snpbook.spec.status import Status, require

_SYSCFG_ON = SYSCFG_MEM_ENCRYPT | SYSCFG_SNP_EN | SYSCFG_VMPL_EN


def snp_init(psp: SecureProcessor, buffer: Record) -> None:
    """SNP_INIT_EX with INIT_RMP and no range list."""
    snp_init_ex(psp, SNP_INIT_EX.record(init_rmp=1))


def snp_init_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Build the RMP and turn SNP on: from here on every page has a state.

    Where the checks of the fields that came after 1.55 stand is the model's choice (MODEL), as is that of the list's
    address: behind the machine's. A failed command leaves nothing behind that the next one could find (unconfirmed).
    """
    # CHECKS
    require(Fault.DIAGNOSTIC_MODE not in psp.faults, Status.HWERROR_PLATFORM, "the part is not in diagnostic mode")
    after = PLATFORM_TRANSITIONS.get((psp.state, Command.SNP_INIT_EX))
    legacy = psp.legacy.state
    free = after is not None and legacy is LegacyPlatformState.UNINIT
    found = f"SNP {psp.state.name}, SEV {legacy.name}"
    require(free, Status.INVALID_PLATFORM_STATE, "both platforms are UNINIT", "UNINIT", found)
    require(Fault.OLD_BOOT_LOADER not in psp.faults, Status.UNSUPPORTED, "the boot loader knows SNP")
    require(Fault.UNLOCKED_PART not in psp.faults, Status.HWERROR_UNSAFE, "the part is locked against debugging")
    kept = psp.rmp_tcb == psp.current_tcb
    rule = "the RMP has been built, and the TCB is still the same"
    require(buffer.init_rmp or kept, Status.RMP_INIT_REQUIRED, rule, psp.current_tcb, psp.rmp_tcb)
    listed = buffer.list_paddr_en
    require(buffer.init_rmp or not listed, Status.INVALID_PARAM, "a range list comes with INIT_RMP", 0, 1)
    _check_switches(psp, buffer)
    _check_cores(psp)
    _check_rmp_range(psp)
    require(Fault.NO_ANSWER not in psp.faults, Status.HWERROR_PLATFORM, "the other processors acknowledge")
    hsave = [core.number for core in psp.machine.cores if core.rdmsr(Msr.VM_HSAVE_PA)]
    require(not (buffer.init_rmp and hsave), Status.INVALID_CONFIG, "VM_HSAVE_PA is 0 on all cores", [], hsave)
    fixed = _range_list(psp, buffer.list_paddr) if listed else []
    if buffer.init_rmp:
        _check_build(psp)

    # ACTION
    if buffer.init_rmp:
        _build_rmp(psp, fixed)
        psp.rmp_tcb = psp.current_tcb
    psp.machine.iommu.snp_enabled = True
    for core in psp.machine.cores:
        core.tlb.flush()
    psp.machine.hidden_asids = psp.asids.hidden = buffer.max_snp_asid
    psp.asids.all_dirty()
    psp.rapl_disabled = bool(buffer.rapl_dis)
    psp.vcek_tcb = psp.current_tcb  # quirk: the boot loader's stick, whatever TCB is reported

    # STATE
    assert after is not None
    psp.state, psp.guest_count = after, 0


def _check_switches(psp: SecureProcessor, buffer: Record) -> None:
    """RAPL_DIS, CIPHERTEXT_HIDING_EN and TIO_EN: to firmware that lacks them they are reserved bits."""
    require(not buffer.tio_en, Status.UNSUPPORTED, "trusted I/O is not modelled", 0, 1, "MODEL")
    limit, highest = buffer.max_snp_asid, psp.min_sev_asid - 1
    if buffer.ciphertext_hiding_en:
        rule = "MAX_SNP_ASID is an ASID of SEV-ES and SNP guests"
        require(0 < limit <= highest, Status.INVALID_PARAM, rule, f"1..{highest}", limit, "MODEL")
    else:
        require(limit == 0, Status.INVALID_PARAM, "MAX_SNP_ASID comes with ciphertext hiding", 0, limit, "MODEL")


def _check_cores(psp: SecureProcessor) -> None:
    cores = psp.machine.cores
    require(Fault.NO_UMC_ENCRYPTION not in psp.faults, Status.INVALID_CONFIG, "all memory controllers encrypt")
    for core in cores:
        value = core.rdmsr(Msr.SYSCFG)
        on = value & _SYSCFG_ON == _SYSCFG_ON
        require(on, Status.INVALID_CONFIG, f"SYSCFG of core {core.number}: SME, SNP and VMPL on", _SYSCFG_ON, value)
        multi_key = value & SYSCFG_MULTI_KEY
        require(not multi_key, Status.INVALID_CONFIG, f"SYSCFG of core {core.number}: multi-key SME off", 0, multi_key)
    differs = first_disagreement(cores, SAME_ON_ALL_CORES)
    name, values = differs or (Msr.SYSCFG, [])
    require(differs is None, Status.INVALID_CONFIG, f"{name.name} is the same on all cores", "one value", values)
    for core in cores:
        busy = core.rdmsr(Msr.DEBUG_STATUS)
        require(not busy, Status.INVALID_CONFIG, f"core {core.number} is neither in a guest nor in SMM", 0, busy)
    syscfg, hwcr = cores[0].rdmsr(Msr.SYSCFG), cores[0].rdmsr(Msr.HWCR)
    require(bool(syscfg & SYSCFG_MFDM), Status.INVALID_CONFIG, "SYSCFG.MFDM", 1, 0)
    require(bool(hwcr & HWCR_SMM_LOCK), Status.INVALID_CONFIG, "HWCR.SmmLock", 1, 0)


def _check_rmp_range(psp: SecureProcessor) -> None:
    machine, core = psp.machine, psp.machine.cores[0]
    base, end = core.rdmsr(Msr.RMP_BASE), core.rdmsr(Msr.RMP_END)
    last = without_c_bit(psp, end)
    require(last < ADDRESS_LIMIT, Status.INVALID_ADDRESS, "the RMP is below the address limit", ADDRESS_LIMIT, last)
    aligned = base % RMP_ALIGNMENT == 0 and (end + 1) % RMP_ALIGNMENT == 0 and base < end
    require(aligned, Status.INVALID_CONFIG, "the RMP's base and size are multiples of 1 MB", RMP_ALIGNMENT, base)
    differs = first_disagreement(machine.cores, (Msr.RMP_BASE, Msr.RMP_END))
    name, values = differs or (Msr.RMP_BASE, [])
    require(differs is None, Status.INVALID_CONFIG, f"{name.name} is the same on all cores", "one value", values)
    c_bit = (base | end) >> machine.product.c_bit & 1
    require(not c_bit, Status.UNSUPPORTED, "the RMP's address has no C-bit", 0, c_bit)
    low, top = machine.map.dram[0][1], machine.map.top
    booted = bios_settings(machine.product, low, top, machine.map.tseg, machine.map.rmp)
    for msr in (Msr.TSEG_BASE, Msr.TSEG_MASK):
        now = core.rdmsr(msr)
        require(now == booted[msr], Status.INVALID_CONFIG, f"{msr.name} is as the BIOS set it", booted[msr], now)
    inside = any(start <= base and end < stop for start, stop in machine.map.dram)
    require(inside, Status.INVALID_CONFIG, "the RMP lies inside one DRAM region", "DRAM", base)


def _check_build(psp: SecureProcessor) -> None:
    """The table's own memory is plain DRAM that it covers; ranges that the host lists do not count there."""
    where, end = psp.machine.rmp.where, psp.machine.rmp.entries << PAGE_SHIFT
    covered = where.end < end
    require(covered, Status.RMP_INITIALIZATION_FAILED, "the RMP covers its own memory", hex(where.end + 1), hex(end))
    for name, (start, end) in {"TSEG": psp.machine.map.tseg, "ASEG": ASEG, "the HT hole": HT_HOLE}.items():
        clear = where.end < start or where.base >= end
        require(clear, Status.RMP_INITIALIZATION_FAILED, f"the RMP is not in {name}", "elsewhere", where.base)


def _range_list(psp: SecureProcessor, address: int) -> list[range]:
    """The page ranges that the host wants HV-Fixed: none of a list that is too long, else those before a bad one.

    Firmware 1.55.25 overlooks what is wrong with the list; which entries it finds bad is unconfirmed.
    """
    spa = check_address(psp, address, PAGE_SIZE, "list_paddr", lookup=False)
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, PAGE_SIZE)
    count = RANGE_LIST_HEADER.unpack(data).count
    ranges: list[range] = []
    for entry, clear in read_entries(data, count if count <= RANGE_LIST_LIMIT else 0):
        if entry.base % PAGE_SIZE or not clear:
            break
        ranges.append(pages_of(entry))
    return ranges


def _build_rmp(psp: SecureProcessor, listed: list[range]) -> None:
    """HV-Fixed whatever is no DRAM, listed, SMM space or the HT hole; the table's own pages Firmware."""
    machine, rmp = psp.machine, psp.machine.rmp
    machine.dram.zero(rmp.where.base, rmp.where.end + 1 - rmp.where.base)
    fixed = [*listed, *(pages_between(*region) for region in (machine.map.tseg, ASEG, HT_HOLE))]
    edges = [0, *(edge for region in machine.map.dram for edge in region), rmp.entries << PAGE_SHIFT]
    fixed += [pages_between(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    for pages in fixed:
        covered = range(pages.start, min(pages.stop, rmp.entries))
        if len(covered):
            rmp.fill(covered, spec.IMMUTABLE)
    own = pages_between(rmp.where.base, rmp.where.end + 1)
    rmp.fill(own, spec.ASSIGNED | spec.IMMUTABLE | spec.LOCK)
    bases = np.arange(own.start & -PAGES_PER_LARGE, own.stop, PAGES_PER_LARGE, dtype=np.int64)
    first, last = np.maximum(bases + 1, own.start), np.minimum(bases + PAGES_PER_LARGE, own.stop)
    heads = rmp.load(bases.astype(U64)).copy()
    heads[:, 0] |= np.maximum(last - first, 0).astype(U64) << U64(spec.SUBPAGE_SHIFT)
    rmp.store(bases.astype(U64), heads)
