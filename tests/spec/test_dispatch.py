"""How command buffers and pages are treated, against the dispatch rules typed here a second time; the registers."""

from __future__ import annotations

import pytest

from snpbook.spec import commands
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import (
    BUFFER_CLASSES,
    BUFFERS,
    RUN_BOUNDARY,
    TIO_COMMANDS,
    WRITES_COMMAND_BUFFER,
    WRITTEN_PAGES,
    BufferClass,
)

NO_BUFFER = "SHUTDOWN PLATFORM_RESET PEK_GEN PDH_GEN DF_FLUSH NOP SNP_INIT SNP_SHUTDOWN SNP_DF_FLUSH"
ANSWERS_LENGTH = (
    "PEK_CSR PDH_CERT_EXPORT GET_ID LAUNCH_MEASURE ATTESTATION SEND_START SEND_UPDATE_DATA SEND_UPDATE_VMSA SWAP_OUT"
)
ON_SUCCESS = "GUEST_STATUS LAUNCH_START RECEIVE_START"
RULE_3 = (
    "PLATFORM_STATUS PEK_CSR PDH_CERT_EXPORT GET_ID GUEST_STATUS LAUNCH_START LAUNCH_MEASURE SEND_START "
    "SEND_UPDATE_DATA SEND_UPDATE_VMSA RECEIVE_START SWAP_OUT"
)


def named(names: str) -> set[Command]:
    return {Command[name] for name in names.split()}


def of(kind: BufferClass) -> set[Command]:
    return {command for command, found in BUFFER_CLASSES.items() if found is kind}


def test_classes() -> None:
    assert of(BufferClass.IGNORE) == named(NO_BUFFER) == {c for c in BUFFERS if BUFFERS[c] is None} - TIO_COMMANDS
    assert of(BufferClass.OUT) == {Command.PLATFORM_STATUS}
    assert of(BufferClass.IN_OUT) == named(ON_SUCCESS)
    assert of(BufferClass.IN_OUT_LENGTH) == named(ANSWERS_LENGTH)
    assert BUFFER_CLASSES.keys() == set(Command) - TIO_COMMANDS


def test_commands_that_write_their_buffer() -> None:
    assert named(RULE_3) == WRITES_COMMAND_BUFFER
    assert not any(command.name.startswith("SNP_") for command in WRITES_COMMAND_BUFFER)


# Rule 4, the pages that each names: "field of the address, field of the length".
PAGES = """
INIT tmr_paddr tmr_len; INIT_EX nv_paddr nv_len tmr_paddr tmr_len; PEK_CSR paddr len;
PDH_CERT_EXPORT pdh_cert_paddr pdh_cert_len cert_chain_paddr cert_chain_len; GET_ID paddr len; COPY dst_paddr len;
LAUNCH_UPDATE_DATA paddr len; LAUNCH_UPDATE_VMSA paddr len; LAUNCH_MEASURE paddr len;
LAUNCH_SECRET guest_paddr guest_len; ATTESTATION paddr len; SEND_START session_paddr session_len;
SEND_UPDATE_DATA hdr_paddr hdr_len trans_paddr trans_len; SEND_UPDATE_VMSA hdr_paddr hdr_len trans_paddr trans_len;
RECEIVE_UPDATE_DATA guest_paddr guest_len; RECEIVE_UPDATE_VMSA guest_paddr guest_len; DBG_DECRYPT dst_paddr len;
DBG_ENCRYPT dst_paddr len; SWAP_OUT dst_paddr page_size mdata_paddr 64; SWAP_IN dst_paddr page_size;
RING_BUFFER queue_lo_sts_paddr 4096 queue_hi_sts_paddr 4096
"""


def test_pages_that_legacy_commands_write() -> None:
    expected = {}
    for part in PAGES.split(";"):
        name, *words = part.split()
        lengths = [int(word) if word.isdecimal() else word for word in words[1::2]]
        expected[Command[name]] = tuple(zip(words[::2], lengths, strict=True))
    assert expected == WRITTEN_PAGES


@pytest.mark.parametrize("command", WRITTEN_PAGES, ids=lambda command: command.name)
def test_written_pages_are_fields_of_the_buffer(command: Command) -> None:
    layout = BUFFERS[command]
    assert layout is not None
    for address, length in WRITTEN_PAGES[command]:
        assert layout.fields[address].size == 8
        assert isinstance(length, int) or layout.fields[length].size == 4


def test_registers() -> None:
    """Offsets in the PSP's BAR by generation: command, address low and high, features, interrupts."""
    second = [*commands.MailboxRegister, *commands.PspRegister]
    first = [*commands.FirstMailboxRegister, *commands.FirstPspRegister]
    assert [*map(int, second)] == [0x10980, 0x109E0, 0x109E4, 0x10690, 0x10694, 0x109FC]
    assert [*map(int, first)] == [0x10580, 0x105E0, 0x105E4, 0x105FC, 0x10610, 0x10614]
    assert (commands.RESPONSE_DONE, commands.STATUS_MASK, commands.COMMAND_SHIFT) == (1 << 31, 0xFFFF, 16)
    assert commands.INTERRUPT_DONE == 2
    assert RUN_BOUNDARY == 64 * 1024 * 1024


def test_ids_fit_what_the_firmware_decodes() -> None:
    assert max(Command) < 1 << commands.DECODED_COMMAND_BITS
    assert 0xCC not in list(Command), "internal to the firmware"
    assert [int(command) for command in sorted(TIO_COMMANDS)] == [*range(0xD0, 0xD6)]
