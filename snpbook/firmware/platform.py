"""Commands on the platform: SNP_INIT_EX, SNP_PLATFORM_STATUS, SNP_DF_FLUSH, SNP_PAGE_RECLAIM.

One function for each command: checks in the order of the specification, then the action. Source: SNP
ABI; the checks of SNP_INIT_EX on the machine's state are those of firmware 1.55.25.
"""

from __future__ import annotations

import numpy as np

from snpbook.firmware.pages import check_address, check_run, first_refusal, look_up, reclaim, writable
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.dram import page_numbers
from snpbook.hardware.msr import first_disagreement
from snpbook.hardware.rmp import U64
from snpbook.spec import rmp as spec
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.memory_map import ASEG, HT_HOLE
from snpbook.spec.msr import (
    HWCR_SMM_LOCK,
    RMP_ALIGNMENT,
    SAME_ON_ALL_CORES,
    SYSCFG_MEM_ENCRYPT,
    SYSCFG_MFDM,
    SYSCFG_SNP_EN,
    SYSCFG_VMPL_EN,
    Msr,
)
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, PageState
from snpbook.spec.platform import PLATFORM_STATUS, RANGE_ENTRY, RANGE_LIST_HEADER, RANGE_LIST_LIMIT
from snpbook.spec.states import PlatformState
from snpbook.spec.status import FirmwareRefusal, Status, require

_SYSCFG_ON = SYSCFG_MEM_ENCRYPT | SYSCFG_SNP_EN | SYSCFG_VMPL_EN


def snp_init_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Build the RMP and turn SNP on: from here on every page has a state."""
    # CHECKS
    require(psp.state is PlatformState.UNINIT, Status.INVALID_PLATFORM_STATE, "platform state", "UNINIT", "INIT")
    require(
        buffer.init_rmp or psp.rmp_built, Status.RMP_INIT_REQUIRED, "the RMP has been built before", "INIT_RMP=1", 0
    )
    listed = buffer.list_paddr_en
    require(buffer.init_rmp or not listed, Status.INVALID_PARAM, "a range list comes with INIT_RMP", 0, 1)
    _check_cores(psp)
    _check_rmp_range(psp)
    hsave = [core.number for core in psp.machine.cores if core.rdmsr(Msr.VM_HSAVE_PA)]
    require(not (buffer.init_rmp and hsave), Status.INVALID_CONFIG, "VM_HSAVE_PA is 0 on all cores", [], hsave)
    fixed = _range_list(psp, buffer.list_paddr) if listed else []

    # ACTION
    if buffer.init_rmp:
        _build_rmp(psp, fixed)
    psp.machine.iommu.snp_enabled = True
    psp.asids.all_dirty()

    # STATE
    psp.state, psp.rmp_built, psp.guest_count = PlatformState.INIT, True, 0


def _check_cores(psp: SecureProcessor) -> None:
    cores = psp.machine.cores
    for core in cores:
        value = core.rdmsr(Msr.SYSCFG)
        on = value & _SYSCFG_ON == _SYSCFG_ON
        require(on, Status.INVALID_CONFIG, f"SYSCFG of core {core.number}: SME, SNP and VMPL on", _SYSCFG_ON, value)
    for core in cores:
        busy = core.rdmsr(Msr.DEBUG_STATUS)
        require(not busy, Status.INVALID_CONFIG, f"core {core.number} is neither in a guest nor in SMM", 0, busy)
    differs = first_disagreement(cores, (*SAME_ON_ALL_CORES, Msr.RMP_BASE, Msr.RMP_END))
    name, values = differs or (Msr.SYSCFG, [])
    require(differs is None, Status.INVALID_CONFIG, f"{name.name} is the same on all cores", "one value", values)
    syscfg, hwcr = cores[0].rdmsr(Msr.SYSCFG), cores[0].rdmsr(Msr.HWCR)
    require(bool(syscfg & SYSCFG_MFDM), Status.INVALID_CONFIG, "SYSCFG.MFDM", 1, 0)
    require(bool(hwcr & HWCR_SMM_LOCK), Status.INVALID_CONFIG, "HWCR.SmmLock", 1, 0)


def _check_rmp_range(psp: SecureProcessor) -> None:
    machine = psp.machine
    base, end = machine.cores[0].rdmsr(Msr.RMP_BASE), machine.cores[0].rdmsr(Msr.RMP_END)
    aligned = base % RMP_ALIGNMENT == 0 and (end + 1) % RMP_ALIGNMENT == 0 and base < end
    require(aligned, Status.INVALID_CONFIG, "the RMP's base and size are multiples of 1 MB", RMP_ALIGNMENT, base)
    c_bit = (base | end) >> machine.product.c_bit & 1
    require(not c_bit, Status.UNSUPPORTED, "the RMP's address has no C-bit", 0, c_bit)
    inside = any(start <= base and end < stop for start, stop in machine.map.dram)
    require(inside, Status.INVALID_CONFIG, "the RMP lies inside one DRAM region", "DRAM", base)


def _range_list(psp: SecureProcessor, address: int) -> list[range]:
    """The page ranges that the host wants HV-Fixed: none of a list that is too long, else those before a bad one.

    Firmware 1.55.25 overlooks what is wrong with the list; which entries it finds bad is unconfirmed.
    """
    spa = check_address(psp, address, PAGE_SIZE, "list_paddr", lookup=False)
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, PAGE_SIZE)
    count = RANGE_LIST_HEADER.unpack(data).count
    ranges: list[range] = []
    for i in range(count if count <= RANGE_LIST_LIMIT else 0):
        start = RANGE_LIST_HEADER.size + i * RANGE_ENTRY.size
        entry = RANGE_ENTRY.unpack(data, start)
        if entry.base % PAGE_SIZE or RANGE_ENTRY.reserved_set(data[start : start + RANGE_ENTRY.size]):
            break
        first = entry.base >> PAGE_SHIFT
        ranges.append(range(first, first + entry.page_count))
    return ranges


def _build_rmp(psp: SecureProcessor, listed: list[range]) -> None:
    """HV-Fixed whatever is no DRAM, listed, SMM space or the HT hole; the table's own pages Firmware."""
    machine, rmp = psp.machine, psp.machine.rmp
    machine.dram.zero(rmp.where.base, rmp.where.end + 1 - rmp.where.base)
    fixed = [*listed, _pages(*machine.map.tseg), _pages(*ASEG), _pages(*HT_HOLE)]
    edges = [0, *(edge for region in machine.map.dram for edge in region), rmp.entries << PAGE_SHIFT]
    fixed += [_pages(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    for pages in fixed:
        covered = range(pages.start, min(pages.stop, rmp.entries))
        if len(covered):
            rmp.fill(covered, spec.IMMUTABLE)
    own = _pages(rmp.where.base, rmp.where.end + 1)
    rmp.fill(own, spec.ASSIGNED | spec.IMMUTABLE | spec.LOCK)
    bases = np.arange(own.start & -PAGES_PER_LARGE, own.stop, PAGES_PER_LARGE, dtype=np.int64)
    first, last = np.maximum(bases + 1, own.start), np.minimum(bases + PAGES_PER_LARGE, own.stop)
    heads = rmp.load(bases.astype(U64)).copy()
    heads[:, 0] |= np.maximum(last - first, 0).astype(U64) << U64(spec.SUBPAGE_SHIFT)
    rmp.store(bases.astype(U64), heads)


def _pages(start: int, end: int) -> range:
    return range(start >> PAGE_SHIFT, end >> PAGE_SHIFT)


def snp_platform_status(psp: SecureProcessor, buffer: Record) -> None:
    """Tell the host what the platform is: versions, state, TCBs."""
    # CHECKS
    spa = writable(psp, buffer.status_paddr, PLATFORM_STATUS.size, "status_paddr")

    # ANSWER
    release = psp.release
    status = PLATFORM_STATUS.pack(
        api_major=release.abi.major,
        api_minor=release.abi.minor,
        state=psp.state,
        is_rmp_init=psp.rmp_built,
        alias_check_complete=1,
        build=release.build,
        guest_count=psp.guest_count,
        current_tcb=int(psp.current_tcb),
        reported_tcb=int(psp.reported_tcb),
    )
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, status)


def snp_df_flush(psp: SecureProcessor, buffer: Record) -> None:
    """Write the data fabric's buffers out, so that dirty ASIDs can be used again. No state check."""
    psp.asids.df_flush()


def snp_page_reclaim(psp: SecureProcessor, buffer: Record) -> None:
    """Take a page back from the firmware's or a launch's hold."""
    _, refusal = reclaim_run(psp, buffer, range(buffer.page, buffer.page + 1))
    if refusal is not None:
        raise refusal


def reclaim_run(psp: SecureProcessor, buffer: Record, pages: range) -> tuple[int, FirmwareRefusal | None]:
    """SNP_PAGE_RECLAIM for a run of pages; a page that is not immutable is a success without effect."""
    # CHECKS
    psp.require_initialised()
    step = PAGES_PER_LARGE if buffer.page_size else 1
    pages, bad_address = check_run(psp, pages, step * PAGE_SIZE, "page")
    numbers = page_numbers(pages)
    entries, states = look_up(psp, numbers)
    large = entries[:, 0] & U64(spec.LARGE) != 0
    held = entries[:, 0] & U64(spec.IMMUTABLE) != 0
    takeable = np.isin(states, (PageState.METADATA, PageState.FIRMWARE, PageState.PRE_GUEST, PageState.PRE_SWAP))
    misaligned = numbers % U64(step) != 0
    stop, refusal = first_refusal(
        [
            (FirmwareRefusal(Status.INVALID_PAGE_SIZE, "RMP page size", buffer.page_size), large != (step > 1)),
            (FirmwareRefusal(Status.INVALID_ADDRESS, "a 2 MB page is aligned", 0), misaligned),
            (FirmwareRefusal(Status.INVALID_PAGE_STATE, "page state", "a reclaimable one"), held & ~takeable),
        ],
        len(pages),
    )

    # ACTION
    reclaim(psp, numbers[:stop][held[:stop]])
    return stop, refusal or bad_address
