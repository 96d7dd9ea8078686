"""The legacy platform as a whole: INIT, INIT_EX, SHUTDOWN, PLATFORM_RESET, PLATFORM_STATUS, and what little is left.

Both platforms may run at once: SNP is initialised first, and then the legacy one. That the host cannot reach a trusted
memory region (TMR) is not modelled: nothing is kept there (MODEL). Sources: SEV API, firmware 1.55.25.
"""

from __future__ import annotations

from snpbook.firmware.configuration import commit
from snpbook.firmware.legacy_buffers import ShortBuffer, check_output
from snpbook.firmware.legacy_keys import is_owned, keep_identity, load_identity, new_identity
from snpbook.firmware.pages import check_address, without_c_bit
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.updates import load_image, run
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.legacy_buffers import INIT_EX
from snpbook.spec.legacy_launch import CHIP_ID_SIZE, NV_SIZE, TMR_SIZE, TMR_SIZE_SNP
from snpbook.spec.msr import SYSCFG_MEM_ENCRYPT, SYSCFG_SNP_EN, Msr
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.platform import Fault
from snpbook.spec.status import FirmwareRefusal, Status, require


def init(psp: SecureProcessor, buffer: Record) -> None:
    """Initialise SEV, and SEV-ES if asked for; persistent data is in the chip's flash."""
    # CHECKS
    after = psp.legacy.after(Command.INIT)
    _check_part(psp)
    tmr = _check_tmr(psp, buffer)

    # ACTION
    _start(psp, load_identity(psp, None), tmr)

    # STATE
    psp.legacy.state = after


def init_ex(psp: SecureProcessor, buffer: Record) -> None:
    """INIT with persistent data in memory that the host keeps on disk; an address of 0 means the chip's flash.

    Where the checks on that area stand among those of INIT is unconfirmed.
    """
    # CHECKS
    require(buffer.length == INIT_EX.size, Status.INVALID_LENGTH, "length of the buffer", INIT_EX.size, buffer.length,
            "SEV")  # fmt: skip
    after = psp.legacy.after(Command.INIT_EX)
    _check_part(psp)
    nv_area = _check_nv_area(psp, buffer)
    identity = load_identity(psp, nv_area)
    if nv_area is not None and buffer.es:
        tmr_start = without_c_bit(psp, buffer.tmr_paddr)
        apart = tmr_start >= nv_area + NV_SIZE or tmr_start + buffer.tmr_len <= nv_area
        require(apart, Status.INVALID_ADDRESS, "the NV area does not meet the TMR", "apart", nv_area, "SEV")
    tmr = _check_tmr(psp, buffer)

    # ACTION
    psp.legacy.nv_area = nv_area
    _start(psp, identity, tmr)

    # STATE
    psp.legacy.state = after


def _check_part(psp: SecureProcessor) -> None:
    """What INIT asks of the part: a boot loader that is new enough, encryption on, and no SNP without an RMP."""
    old = Fault.OLD_BOOT_LOADER in psp.faults
    require(not old, Status.UNSUPPORTED, "the boot loader is new enough", "a newer one", Fault.OLD_BOOT_LOADER, "SEV")
    settings = [core.rdmsr(Msr.SYSCFG) for core in psp.machine.cores]
    bare = [number for number, value in enumerate(settings) if not value & SYSCFG_MEM_ENCRYPT]
    encrypts = not bare and Fault.NO_UMC_ENCRYPTION not in psp.faults
    require(encrypts, Status.HWERROR_PLATFORM, "memory encryption is on for all cores", [], bare, "SEV")
    snp = any(value & SYSCFG_SNP_EN for value in settings)
    require(psp.rmp_built or not snp, Status.INVALID_PLATFORM_STATE, "the RMP of SNP-enabled cores is initialised",
            "SNP_INIT first", "no RMP", "SEV")  # fmt: skip


def _check_tmr(psp: SecureProcessor, buffer: Record) -> tuple[int, int] | None:
    """The trusted memory region of SEV-ES: as large as it must be, and aligned to that."""
    if not buffer.es:
        return None
    size, spa = TMR_SIZE_SNP if psp.rmp_built else TMR_SIZE, without_c_bit(psp, buffer.tmr_paddr)
    try:
        check_output(psp, spa, max(buffer.tmr_len, 1), "the TMR")
    except FirmwareRefusal as refusal:
        if refusal.status is Status.INVALID_PAGE_STATE:  # a bad address answers below
            raise
    require(spa % size == 0, Status.INVALID_ADDRESS, "alignment of the TMR", size, spa % size, "SEV")
    require(buffer.tmr_len == size, Status.INVALID_LENGTH, "size of the TMR", size, buffer.tmr_len, "SEV")
    check_address(psp, spa, size, "tmr_paddr", lookup=False)
    return spa, spa + size


def _check_nv_area(psp: SecureProcessor, buffer: Record) -> int | None:
    """Where persistent data is to be; the pages at 0 are tested even where it is to be in flash (quirk)."""
    if buffer.nv_paddr:
        aligned = buffer.nv_paddr % PAGE_SIZE == 0
        require(aligned, Status.INVALID_ADDRESS, "nv_paddr is page-aligned", 0, buffer.nv_paddr % PAGE_SIZE, "SEV")
        check_address(psp, buffer.nv_paddr, NV_SIZE, "nv_paddr", lookup=False)
        require(buffer.nv_len == NV_SIZE, Status.INVALID_LENGTH, "nv_len", NV_SIZE, buffer.nv_len, "SEV")
    spa = check_output(psp, buffer.nv_paddr, NV_SIZE, "nv_paddr")
    return spa if buffer.nv_paddr else None


def _start(psp: SecureProcessor, identity: Record | None, tmr: tuple[int, int] | None) -> None:
    """Start with the identity that was stored, or with a new one."""
    psp.legacy.identity, psp.legacy.tmr = identity, tmr
    if identity is None:
        keep_identity(psp, new_identity(psp))
    if not psp.initialised:
        psp.asids.all_dirty()


def shutdown(psp: SecureProcessor, buffer: Record) -> None:
    """End the legacy platform and its guests, in whatever state; SNP's guests stay.

    Checksums of VMSA pages are gone with the TMR.
    """
    # CHECKS
    psp.require_safe()

    # ACTION
    for guest in psp.legacy.guests.values():
        psp.asids.release(guest.asid)
    psp.machine.vmsa_checksums.clear()

    # STATE
    psp.legacy.reset()


def platform_reset(psp: SecureProcessor, buffer: Record) -> None:
    """Factory reset: forget owner, PEK and PDH in flash. A host's NV area is not touched."""
    # CHECKS
    psp.legacy.after(Command.PLATFORM_RESET)

    # ACTION
    psp.legacy.flash = None


def platform_status(psp: SecureProcessor, buffer: Record) -> Record:
    """Tell the host what the platform is."""
    # ANSWER
    legacy, release = psp.legacy, psp.release
    return buffer.replace(
        api_major=release.abi.major,
        api_minor=release.abi.minor,
        state=legacy.state,
        owner=is_owned(legacy.identity),
        es=legacy.es,
        build=release.build,
        guest_count=len(legacy.guests),
    )


def df_flush(psp: SecureProcessor, buffer: Record) -> None:
    """Write the data fabric's buffers out, so that dirty ASIDs can be used again: what SNP_DF_FLUSH does."""
    psp.asids.df_flush()


def download_firmware(psp: SecureProcessor, buffer: Record) -> None:
    """Load another firmware, run it and commit it; neither platform may be initialised."""
    # CHECKS
    psp.legacy.after(Command.DOWNLOAD_FIRMWARE)
    require(not psp.initialised, Status.INVALID_PLATFORM_STATE, "platform state", "UNINIT", psp.state.name, "SEV")
    build = load_image(psp, buffer.paddr, buffer.len)

    # ACTION
    run(psp, build)
    commit(psp)


def get_id(psp: SecureProcessor, buffer: Record) -> Record:
    """The chip's identity, by which AMD's service finds its CEK; with room for exactly two, the second socket's too."""
    # CHECKS
    if buffer.len < CHIP_ID_SIZE:
        raise ShortBuffer(buffer.replace(len=CHIP_ID_SIZE), "the identity fits", CHIP_ID_SIZE, buffer.len)
    sockets = 2 if psp.machine.sockets > 1 and buffer.len == 2 * CHIP_ID_SIZE else 1
    size = sockets * CHIP_ID_SIZE
    spa = check_output(psp, buffer.paddr, size, "paddr")

    # ANSWER
    identities = [psp.chip.on_socket(number).chip_id for number in range(sockets)]
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, b"".join(identities))
    return buffer.replace(len=size)


def nop(psp: SecureProcessor, buffer: Record) -> None:
    """Nothing."""
