"""Every sub-command of /dev/sev: structure, permission, order of checks, errnos, and what is copied back."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from snpbook.hardware.bios import BiosSetup
from snpbook.host.refusal import KernelError
from snpbook.host.steps import finish
from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from snpbook.vendor.vlek import provider_sticks, wrapped_vlek
from tests.firmware import legacy_owner as owner
from tests.host.sev_device import (
    COMMIT,
    GET_EXT_CONFIG,
    GET_ID,
    GET_ID2,
    ISSUE_CMD,
    MARK,
    PDH_EXPORT,
    PDH_GEN,
    PEK_CSR,
    PEK_GEN,
    PEK_IMPORT,
    RESET,
    SET_CONFIG,
    SET_EXT_CONFIG,
    SNP_STATUS,
    STATUS,
    VLEK_LOAD,
    Host,
    check_pages,
)

CERT, CHAIN = 2084, 3 * 2084
BLOB_LIMIT = 0x4000
BRING_UP = ["SNP_INIT_EX", "SNP_DF_FLUSH", "INIT", "DF_FLUSH"]
SHUTDOWN = ["SHUTDOWN", "SNP_SHUTDOWN_EX"]


@pytest.fixture
def host() -> Host:
    """SNP and SEV-ES are up."""
    return Host()


@pytest.fixture
def lazy() -> Host:
    """SNP is up, SEV waits for its first use."""
    return Host(lazy=True)


# The ioctl.


@pytest.mark.parametrize("number", [0, ISSUE_CMD + 1, 0x5300])
def test_another_number_is_einval(host: Host, number: int) -> None:
    with pytest.raises(KernelError) as refused:
        host.process.ioctl(host.fd, number, bytearray(16))
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(("era", "beyond"), [("mainline", 13), ("rfc-v7", 12), ("mainline", 0xFFFFFFFF)])
def test_a_command_beyond_the_table_is_einval_and_not_copied_back(era: str, beyond: int) -> None:
    assert Host(era).issue(beyond) == (errno.EINVAL, MARK)


def test_a_structure_that_is_not_there_is_efault(host: Host) -> None:
    for argument in (0, 0x1234, host.memory + (1 << 20) - 15):
        with pytest.raises(KernelError) as refused:
            host.process.ioctl(host.fd, ISSUE_CMD, argument)
        assert refused.value.errno == errno.EFAULT


def test_the_structure_lies_in_the_callers_memory_too(host: Host) -> None:
    at = host.put(struct.pack("<IQI", STATUS, host.memory + 64, MARK))
    assert host.process.ioctl(host.fd, ISSUE_CMD, at) == 0
    assert struct.unpack("<IQI", host.get(16)) == (STATUS, host.memory + 64, 0)


def test_without_a_sev_device_everything_is_enodev() -> None:
    host = Host(bios=BiosSetup(smee=False))
    assert "ccp 0000:22:00.1: SEV: memory encryption not enabled by BIOS" in host.kernel.log.lines
    for number in (ISSUE_CMD, 0):
        with pytest.raises(KernelError) as refused:
            host.process.ioctl(host.fd, number, bytearray(16))
        assert refused.value.errno == errno.ENODEV


def test_calls_run_one_at_a_time(host: Host) -> None:
    first = host.process.calling(host.fd, ISSUE_CMD, bytearray(struct.pack("<IQI", COMMIT, 0, 0)))
    next(first)
    next(first)  # it holds the mutex
    second = host.process.calling(host.fd, ISSUE_CMD, bytearray(struct.pack("<IQI", COMMIT, 0, 0)))
    assert next(second).blocked
    host.commands()
    finish(first)
    assert host.commands() == ["SNP_COMMIT"]
    finish(second)
    assert host.commands() == ["SNP_COMMIT"]


# Permissions.

WRITES = {RESET, PEK_GEN, PEK_CSR, PDH_GEN, PEK_IMPORT, SET_CONFIG, VLEK_LOAD}


@pytest.mark.parametrize("command", range(13))
def test_which_need_a_descriptor_for_writing(host: Host, command: int) -> None:
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    number, error = host.issue(command, host.memory, reader)
    assert (number == errno.EPERM) == (command in WRITES)
    if command in WRITES:
        assert error == MARK


def test_the_export_needs_one_where_it_must_initialise(lazy: Host) -> None:
    reader = lazy.process.open("/dev/sev", os.O_RDONLY)
    assert lazy.issue(PDH_EXPORT, lazy.memory, reader) == (errno.EPERM, MARK)
    assert lazy.issue(PDH_EXPORT, lazy.memory) == (errno.EIO, Status.INVALID_LENGTH)


# Legacy commands.


def test_platform_status(host: Host) -> None:
    assert host.issue(STATUS, host.memory) == (0, 0)
    major, minor, state, flags, build, guests = struct.unpack("<BBBIBI", host.get(12))
    assert (major, minor, state, build, guests) == (1, 55, 1, 29, 0)
    assert flags & 0x100, "SEV-ES is configured"
    assert not flags & 1, "nobody owns it"
    assert host.issue(STATUS, 0) == (errno.EFAULT, 0)


def test_platform_status_does_not_initialise(lazy: Host) -> None:
    assert lazy.issue(STATUS, lazy.memory) == (0, 0)
    assert lazy.get(12)[2] == 0
    assert lazy.commands()[-1] == "PLATFORM_STATUS"


def test_factory_reset_shuts_sev_down_first(host: Host) -> None:
    before = host.board.psp.legacy.flash
    host.commands()
    assert host.issue(RESET) == (0, 0)
    assert host.commands() == ["PLATFORM_STATUS", "SHUTDOWN", "PLATFORM_RESET"]
    assert before is not None
    assert host.board.psp.legacy.flash is None
    assert host.issue(RESET) == (0, 0)
    assert host.commands() == ["PLATFORM_STATUS", "PLATFORM_RESET"]


def test_factory_reset_with_a_guest_is_ebusy(host: Host) -> None:
    host.ccp.command(Command.LAUNCH_START, policy=0)
    assert host.issue(RESET) == (errno.EBUSY, 0)
    assert host.board.psp.legacy.guests


@pytest.mark.parametrize("command", [PEK_GEN, PDH_GEN])
def test_new_keys(host: Host, command: int) -> None:
    old = host.board.psp.legacy.identity
    assert host.issue(command) == (0, 0)
    new = host.board.psp.legacy.identity
    assert old is not None
    assert new is not None
    assert old.pdh != new.pdh
    assert (old.pek == new.pek) == (command == PDH_GEN)


@pytest.mark.parametrize("command", [PEK_GEN, PDH_GEN])
def test_a_temporary_init_ends_in_the_full_shutdown(lazy: Host, command: int) -> None:
    """SNP goes down as well, although it was up before."""
    before = lazy.kernel.memory.allocated - 1  # the list of ranges goes with the shutdown
    lazy.commands()
    assert lazy.ccp.snp_initialised
    assert lazy.issue(command) == (0, 0)
    name = "PEK_GEN" if command == PEK_GEN else "PDH_GEN"
    assert lazy.commands() == ["INIT", "DF_FLUSH", name, *SHUTDOWN]
    assert not lazy.ccp.snp_initialised
    check_pages(lazy, before)
    assert lazy.issue(command) == (0, 0)
    assert lazy.commands() == [*BRING_UP, name, *SHUTDOWN]
    check_pages(lazy, before)


def csr(host: Host, address: int, length: int) -> tuple[int, int, int]:
    result = host.issue(PEK_CSR, host.put(struct.pack("<QI", address, length)))
    found, length = struct.unpack("<QI", host.get(12))
    assert found == address
    return (*result, length)


def test_pek_csr(host: Host) -> None:
    blob = host.memory + 0x1000
    for address, length in ((0, 0), (0, 5000), (blob, 0)):
        assert csr(host, address, length) == (errno.EIO, Status.INVALID_LENGTH, CERT)
    assert csr(host, blob, CERT) == (0, 0, CERT)
    identity = host.board.psp.legacy.identity
    assert identity is not None
    assert host.get(0x414, 0x1000) == identity.pek[:0x414]
    assert csr(host, blob, BLOB_LIMIT) == (0, 0, CERT)
    assert csr(host, blob, BLOB_LIMIT + 1) == (errno.EFAULT, MARK, BLOB_LIMIT + 1)
    assert csr(host, 0x1234, CERT) == (errno.EFAULT, 0, CERT), "the length is there, the request is not"
    assert host.issue(PEK_CSR, 0) == (errno.EFAULT, MARK)


def test_pek_csr_gives_more_than_was_asked_for(host: Host) -> None:
    """As many bytes as the firmware names are copied, also when it refused."""
    host.put(b"\xaa" * CERT, 0x1000)
    assert csr(host, host.memory + 0x1000, 100) == (errno.EIO, Status.INVALID_LENGTH, CERT)
    assert b"\xaa" not in host.get(CERT, 0x1000)


def export(host: Host, *fields: int) -> tuple[int, int, int, int]:
    result = host.issue(PDH_EXPORT, host.put(struct.pack("<QIQI", *fields)))
    found = struct.unpack("<QIQI", host.get(24))
    assert (found[0], found[2]) == (fields[0], fields[2])
    return (*result, found[1], found[3])


def test_pdh_cert_export(host: Host) -> None:
    pdh, chain = host.memory + 0x1000, host.memory + 0x2000
    good = (pdh, CERT, chain, CHAIN)
    for index in range(4):
        query = (*good[:index], 0, *good[index + 1 :])
        assert export(host, *query) == (errno.EIO, Status.INVALID_LENGTH, CERT, CHAIN)
    assert export(host, *good) == (0, 0, CERT, CHAIN)
    owner.verify(host.get(CERT, 0x1000), owner.PEK, owner.public_of(host.get(CERT, 0x2000)))
    identity = host.board.psp.legacy.identity
    assert identity is not None
    assert host.get(CERT, 0x1000) == identity.pdh
    assert host.get(CERT, 0x2000) == identity.pek
    for lengths in ((BLOB_LIMIT + 1, CHAIN), (CERT, BLOB_LIMIT + 1)):
        assert export(host, pdh, lengths[0], chain, lengths[1]) == (errno.EFAULT, MARK, *lengths)
    assert export(host, 0x1234, CERT, chain, CHAIN)[:2] == (errno.EFAULT, 0)
    assert export(host, pdh, CERT, 0x1234, CHAIN)[:2] == (errno.EFAULT, 0)
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    assert host.issue(PDH_EXPORT, host.put(struct.pack("<QIQI", *good)), reader) == (0, 0)


def owned(host: Host) -> tuple[bytes, bytes]:
    """The PEK as an owner signs it, and his certificate."""
    assert csr(host, host.memory + 0x1000, CERT)[0] == 0
    key = owner.key(1)
    oca = owner.body(owner.OCA, key.public_key())
    return owner.cert(host.get(0x414, 0x1000), (owner.OCA, key)), owner.cert(oca, (owner.OCA, key))


def test_pek_cert_import(host: Host) -> None:
    pek, oca = owned(host)
    at = host.put(pek, 0x1000), host.put(oca, 0x2000)
    good = (at[0], CERT, at[1], CERT)
    for index in range(4):
        for value in (0, BLOB_LIMIT + 1 if index % 2 else 0):
            bad = (*good[:index], value, *good[index + 1 :])
            assert host.issue(PEK_IMPORT, host.put(struct.pack("<QIQI", *bad))) == (errno.EINVAL, MARK)
    for index in (0, 2):
        bad = (*good[:index], 0x1234, *good[index + 1 :])
        assert host.issue(PEK_IMPORT, host.put(struct.pack("<QIQI", *bad))) == (errno.EFAULT, MARK)
    assert host.issue(PEK_IMPORT, host.put(struct.pack("<QIQI", *good))) == (0, 0)
    assert host.issue(STATUS, host.memory) == (0, 0)
    assert host.get(12)[3] & 1, "externally owned"
    assert host.issue(PEK_IMPORT, host.put(struct.pack("<QIQI", *good))) == (errno.EIO, Status.ALREADY_OWNED)


def test_get_id(host: Host) -> None:
    chip_id = host.board.psp.chip.chip_id
    assert host.issue(GET_ID, host.memory) == (0, 0)
    assert host.get(128) == chip_id + bytes(64)
    blob = host.memory + 0x1000
    for address, length in ((0, 64), (blob, 0), (blob, 10)):
        at = host.put(struct.pack("<QI", address, length))
        assert host.issue(GET_ID2, at) == (errno.EIO, Status.INVALID_LENGTH)
        assert struct.unpack("<QI", host.get(12)) == (address, 64)
    assert host.issue(GET_ID2, host.put(struct.pack("<QI", blob, 4096))) == (0, 0)
    assert struct.unpack("<QI", host.get(12)) == (blob, 64)
    assert host.get(64, 0x1000) == chip_id
    assert host.issue(GET_ID2, host.put(struct.pack("<QI", blob, 0xFFFFFFFF))) == (errno.ENOMEM, MARK)


def test_get_id_does_not_initialise_and_old_firmware_has_none(lazy: Host) -> None:
    lazy.commands()
    assert lazy.issue(GET_ID, lazy.memory) == (0, 0)
    assert lazy.commands() == ["GET_ID"]
    lazy.ccp.version = (0, 15, 1)
    for command in (GET_ID, GET_ID2):
        assert lazy.issue(command, 0) == (524, MARK), "ENOTSUPP before EFAULT"


# SNP commands.


def test_snp_platform_status(host: Host) -> None:
    before = host.kernel.memory.allocated
    assert host.issue(SNP_STATUS) == (errno.EINVAL, MARK)
    assert host.issue(SNP_STATUS, host.memory) == (0, 0)
    major, minor, state, rmp, build, masks, guests, current, reported = struct.unpack("<BBBBIIIQQ", host.get(32))
    assert (major, minor, state, rmp & 1, build, masks & 7, guests) == (1, 55, 1, 1, 29, 0, 0)
    assert current == reported == int(host.board.psp.current_tcb)
    assert host.issue(SNP_STATUS, 0x1234) == (errno.EFAULT, 0)
    check_pages(host, before)
    host.ccp.shutdown()
    assert host.issue(SNP_STATUS, host.memory) == (0, 0)
    assert host.get(32)[2] == 0


def test_commit_asks_for_nothing(host: Host) -> None:
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    host.ccp.shutdown()
    assert host.issue(COMMIT, 0, reader) == (0, 0)
    assert host.commands()[-1] == "SNP_COMMIT"


CONFIG = struct.pack("<QI52s", 0, 3, bytes(52))


def test_set_config_in_order(host: Host) -> None:
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    assert host.issue(SET_CONFIG, host.put(CONFIG)) == (0, 0)
    assert host.board.psp.mask_chip_id
    assert host.board.psp.mask_chip_key
    assert host.issue(SET_CONFIG, host.put(CONFIG[:-1] + b"\1")) == (errno.EIO, Status.INVALID_PARAM)
    host.ccp.shutdown()
    assert host.issue(SET_CONFIG, 0, reader) == (errno.EINVAL, MARK)
    assert host.issue(SET_CONFIG, 0x1234, reader) == (errno.EPERM, MARK)
    assert host.issue(SET_CONFIG, 0x1234) == (errno.ENODEV, MARK)
    host.ccp.platform_init()
    assert host.issue(SET_CONFIG, 0x1234) == (errno.EFAULT, MARK)


def test_vlek_load_in_order(host: Host) -> None:
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    psp = host.board.psp
    blob = host.put(wrapped_vlek("cloud", psp.chip, psp.reported_tcb, b"i" * 12), 0x1000)

    def load(length: int = 16, version: int = 0, address: int = blob) -> tuple[int, int]:
        return host.issue(VLEK_LOAD, host.put(struct.pack("<IB3xQ", length, version, address)))

    assert load() == (0, 0)
    assert psp.vlek == provider_sticks("cloud", psp.reported_tcb)[7]
    assert load(15) == load(version=1) == load(address=0) == (errno.EINVAL, MARK)
    assert load(address=0x1234) == (errno.EFAULT, MARK)
    assert load(address=host.put(bytes(432), 0x2000)) == (errno.EIO, Status.BAD_SVN)
    host.ccp.shutdown()
    assert host.issue(VLEK_LOAD, 0, reader) == (errno.EINVAL, MARK)
    assert host.issue(VLEK_LOAD, 0x1234, reader) == (errno.EPERM, MARK)
    assert host.issue(VLEK_LOAD, 0x1234) == (errno.ENODEV, MARK)
    host.ccp.platform_init()
    assert host.issue(VLEK_LOAD, 0x1234) == (errno.EFAULT, MARK)


def test_the_series_has_other_meanings_for_ten_and_eleven() -> None:
    host = Host("rfc-v7")
    certs, room = host.put(b"c" * 0x5000, 0x1000), host.memory + 0x8000
    config = host.put(CONFIG, 0x800)

    def ext(command: int, *fields: int) -> tuple[int, int]:
        return host.issue(command, host.put(struct.pack("<QQI4x", *fields)))

    assert ext(SET_EXT_CONFIG, config, certs, 0x5000) == (0, 0)
    assert host.board.psp.mask_chip_id
    assert ext(GET_EXT_CONFIG, host.memory + 0x900, room, 0x5000) == (0, MARK)
    assert host.get(0x5000, 0x8000) == b"c" * 0x5000
    assert host.get(64, 0x900) == CONFIG
    assert ext(GET_EXT_CONFIG, 0, room, 0x4000) == (errno.ENOSR, MARK)
    assert struct.unpack("<QQI", host.get(20))[2] == 0x5000
    for length in (0, 100, 0x6000):
        assert ext(SET_EXT_CONFIG, 0, certs, length) == (errno.EINVAL, MARK)
    assert ext(SET_EXT_CONFIG, 0, 0x1000, 0x1000) == ext(SET_EXT_CONFIG, 0x1000, 0, 0) == (errno.EFAULT, MARK)
    assert host.ccp.certificates == b"c" * 0x5000, "a call that failed changes nothing"
    assert ext(SET_EXT_CONFIG, 0, 0, 0) == (0, MARK)
    assert host.ccp.certificates == b""
    assert host.issue(SET_EXT_CONFIG, 0) == host.issue(GET_EXT_CONFIG, 0) == (errno.EINVAL, MARK)
    reader = host.process.open("/dev/sev", os.O_RDONLY)
    assert host.issue(SET_EXT_CONFIG, 0x1234, reader) == (errno.EPERM, MARK)
    host.ccp.shutdown()
    assert host.issue(SET_EXT_CONFIG, host.memory) == host.issue(GET_EXT_CONFIG, host.memory) == (errno.EINVAL, MARK)
