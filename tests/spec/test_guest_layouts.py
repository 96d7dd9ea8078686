"""Structures between guest, hypervisor and firmware, field by field against offsets typed from the documents."""

from __future__ import annotations

import pytest

from snpbook.spec import ghcb, launch, messages, payloads
from snpbook.spec import uapi_sev_guest as uapi
from snpbook.spec.layout import Layout

GENERAL = {f"r{n}": (0x340 + 8 * (n - 8), 8) for n in range(8, 16)}
BYTES: dict[str, tuple[Layout, int, dict[str, tuple[int, int]]]] = {
    "GHCB": (ghcb.GHCB, 4096, {
        "cpl": (0xCB, 1), "xss": (0x140, 8), "dr7": (0x160, 8), "rax": (0x1F8, 8), "rcx": (0x308, 8), "rdx": (0x310, 8),
        "rbx": (0x318, 8), "rbp": (0x328, 8), "rsi": (0x330, 8), "rdi": (0x338, 8), **GENERAL,
        "sw_exit_code": (0x390, 8),
        "sw_exit_info_1": (0x398, 8), "sw_exit_info_2": (0x3A0, 8), "sw_scratch": (0x3A8, 8), "xcr0": (0x3E8, 8),
        "valid_bitmap": (0x3F0, 16), "x87_state_gpa": (0x400, 8), "shared_buffer": (0x800, 2032),
        "protocol_version": (0xFFA, 2), "usage": (0xFFC, 4),
    }),
    "page state header": (ghcb.PSC_HEADER, 8, {"cur_entry": (0, 2), "end_entry": (2, 2)}),
    "secrets": (launch.SECRETS_PAGE, 4096, {
        "version": (0, 4), "fms": (8, 4), "gosvw": (0x10, 16), "vmpck0": (0x20, 32), "vmpck1": (0x40, 32),
        "vmpck2": (0x60, 32), "vmpck3": (0x80, 32), "msg_seqno_0": (0xA0, 4), "msg_seqno_1": (0xA4, 4),
        "msg_seqno_2": (0xA8, 4), "msg_seqno_3": (0xAC, 4), "ap_jump_table_pa": (0xB0, 8), "guest_usage": (0xE0, 32),
        "vmsa_tweak_bitmap": (0x100, 64), "svsm_base": (0x140, 8), "svsm_size": (0x148, 8), "svsm_caa": (0x150, 8),
        "svsm_max_version": (0x158, 4), "svsm_guest_vmpl": (0x15C, 1), "tsc_factor": (0x160, 4),
    }),
    "CPUID page": (launch.CPUID_PAGE, 4096, {"count": (0, 4), "entries": (0x10, 64 * 48)}),
    "CPUID entry": (launch.CPUID_ENTRY, 48, {
        "eax_in": (0, 4), "ecx_in": (4, 4), "xcr0_in": (8, 8), "xss_in": (16, 8), "eax": (24, 4), "ebx": (28, 4),
        "ecx": (32, 4), "edx": (36, 4),
    }),
    "message": (messages.MESSAGE_HEADER, 0x60, {
        "authtag": (0, 32), "msg_seqno": (0x20, 8), "algo": (0x30, 1), "hdr_version": (0x31, 1), "hdr_size": (0x32, 2),
        "msg_type": (0x34, 1), "msg_version": (0x35, 1), "msg_size": (0x36, 2), "msg_vmpck": (0x3C, 1),
    }),
    "request_ioctl": (uapi.REQUEST_IOCTL, 32, {
        "msg_version": (0, 1), "req_data": (8, 8), "resp_data": (16, 8), "fw_error": (24, 4), "vmm_error": (28, 4),
    }),
    "report_req": (payloads.REPORT_REQUEST, 96, {"report_data": (0, 64), "vmpl": (64, 4)}),
    "report_resp": (payloads.REPORT_RESPONSE, 32 + 1184, {
        "status": (0, 4), "report_size": (4, 4), "report": (32, 1184),
    }),
    "derived_key_req": (payloads.KEY_REQUEST, 32, {
        "guest_field_select": (8, 8), "vmpl": (16, 4), "guest_svn": (20, 4), "tcb_version": (24, 8),
    }),
    "derived_key_resp": (payloads.KEY_RESPONSE, 64, {"status": (0, 4), "derived_key": (0x20, 32)}),
    "ext_report_req": (uapi.EXT_REPORT_REQUEST, 112, {
        "data": (0, 96), "certs_address": (96, 8), "certs_len": (104, 4),
    }),
}  # fmt: skip
"""Size, and offset and size of each field."""
BITS: dict[str, tuple[Layout, dict[str, tuple[int, int]]]] = {
    "SEV info": (ghcb.SEV_INFO, {"max_version": (63, 48), "min_version": (47, 32), "c_bit": (31, 24), "code": (11, 0)}),
    "CPUID by MSR": (ghcb.MSR_CPUID, {"value": (63, 32), "register": (31, 30), "code": (11, 0)}),
    "run VMPL": (ghcb.MSR_RUN_VMPL, {"vmpl": (39, 32), "code": (11, 0)}),
    "terminate": (ghcb.TERMINATE, {"reason": (23, 16), "reason_set": (15, 12), "code": (11, 0)}),
    "page state entry": (ghcb.PSC_ENTRY, {
        "page_size": (56, 56), "operation": (55, 52), "gfn": (51, 12), "cur_page": (11, 0),
    }),
    "AP creation": (ghcb.AP_CREATION, {"apic_id": (63, 32), "vmpl": (19, 16), "request": (15, 0)}),
    "IOIO": (ghcb.IOIO, {
        "port": (31, 16), "segment": (12, 10), "address_64": (9, 9), "address_32": (8, 8), "address_16": (7, 7),
        "size_32": (6, 6), "size_16": (5, 5), "size_8": (4, 4), "rep": (3, 3), "is_string": (2, 2), "is_in": (0, 0),
    }),
    "derived_key_req": (payloads.KEY_REQUEST, {"root_key_select": (0, 0), "key_sel": (2, 1)}),
}  # fmt: skip
"""The highest and the lowest bit of each field, of the first 8 bytes."""


@pytest.mark.parametrize("name", list(BYTES))
def test_bytes(name: str) -> None:
    layout, size, fields = BYTES[name]
    assert layout.size == size
    assert {field: (layout.fields[field].offset, layout.fields[field].size) for field in fields} == fields


@pytest.mark.parametrize("name", list(BITS))
def test_bits(name: str) -> None:
    layout, fields = BITS[name]
    found = {each: (layout.fields[each].lo, layout.fields[each].width) for each in fields}
    assert found == {each: (low, high - low + 1) for each, (high, low) in fields.items()}
    assert {layout.fields[each].offset for each in fields} == {0}


VALID = {
    "cpl": 25, "xss": 40, "dr7": 44, "rax": 63, "rcx": 97, "rdx": 98, "rbx": 99, "rbp": 101, "rsi": 102, "rdi": 103,
    **{f"r{n}": 104 + n - 8 for n in range(8, 16)}, "sw_exit_code": 114, "sw_exit_info_1": 115, "sw_exit_info_2": 116,
    "sw_scratch": 117, "xcr0": 125,
}  # fmt: skip


@pytest.mark.parametrize("name", list(VALID))
def test_the_bit_of_a_field(name: str) -> None:
    assert int.from_bytes(ghcb.valid_bitmap(name), "little") == 1 << VALID[name]
    assert ghcb.is_valid(ghcb.valid_bitmap(name), name)
    assert not ghcb.is_valid(bytes(16), name)


def test_every_field_with_a_bit_is_here() -> None:
    assert VALID.keys() == {name for name, field in ghcb.GHCB.fields.items() if field.offset < 0x3F0}


def test_counts() -> None:
    assert ghcb.PSC_ENTRIES == (2032 - 8) // 8 == 253
    assert (uapi.REPORT_RESPONSE_SIZE, uapi.KEY_RESPONSE_SIZE, uapi.CERTIFICATES_LIMIT) == (4000, 64, 0x4000)
    assert {call.name: int(call) for call in uapi.GuestIoctl} == {
        "GET_REPORT": 0xC0205300, "GET_DERIVED_KEY": 0xC0205301, "GET_EXT_REPORT": 0xC0205302,
    }  # fmt: skip
