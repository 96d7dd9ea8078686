"""Each row of the documents' tables of requests has its tests, on the guest's side and on the host's.

A row is a number and the places of its tests, which are written without `test_`: file, function and, where a function
has many cases, the case. A row that is new has none, and fails here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from snpbook.guest import vc
from snpbook.guest.tsm import ReportEntry
from snpbook.spec import ghcb
from snpbook.spec.ghcb import GhcbError, MsrCode, Nae, PageOperation, VmmError
from snpbook.spec.uapi_sev_guest import GuestIoctl
from snpbook.spec.vmcb import AUTOMATIC_EXITS, ExitCode
from tests.guest.test_requests_by_page import LISTS

TESTS = Path(__file__).parent.parent
NOTHING = ""
"""That side has no part in it: `WHY` says why."""

MSR = {
    0x001: ("guest/msr_protocol::request_and_answer[version]", "host/ghcb_msr::the_value_at_reset"),
    0x002: ("guest/start::what_it_asks", "host/ghcb_msr::what_the_kernel_answers"),
    0x004: ("guest/cpuid::early_by_the_msr_protocol", "host/ghcb_msr::cpuid"),
    0x005: ("guest/cpuid::lies_by_the_msr_protocol", "host/ghcb_msr::cpuid"),
    0x006: ("guest/msr_protocol::request_and_answer[reset hold, started]", "host/ghcb_msr::ap_reset_hold"),
    0x007: (
        "guest/msr_protocol::request_and_answer[reset hold, not started]",
        "host/ghcb_msr::ap_reset_hold_that_ends_without_a_sipi",
    ),
    0x010: ("guest/msr_protocol::request_and_answer[preferred GPA]", "host/ghcb_msr::what_the_kernel_answers"),
    0x011: ("guest/msr_protocol::request_and_answer[no preferred GPA]", "host/ghcb_msr::what_the_kernel_answers"),
    0x012: ("guest/msr_protocol::request_and_answer[registration]", "host/ghcb_msr::what_the_kernel_answers"),
    0x013: ("guest/msr_protocol::lies[registration refused]", "host/ghcb_msr::what_the_kernel_answers"),
    0x014: ("guest/msr_protocol::request_and_answer[private]", "host/ghcb_msr::page_state"),
    0x015: ("guest/msr_protocol::lies[page not changed]", "host/ghcb_msr::another_page_state_fails"),
    0x016: (
        "guest/msr_protocol::request_and_answer[run VMPL]",
        "host/svsm_events::a_guest_runs_its_lower_level_and_comes_back",
    ),
    0x017: ("guest/msr_protocol::request_and_answer[run VMPL refused]", "host/ghcb_msr::run_vmpl_without_a_save_area"),
    0x080: ("guest/start::what_it_asks", "host/ghcb_msr::what_the_kernel_answers"),
    0x081: ("guest/msr_protocol::lies[no feature of SNP]", "host/ghcb_msr::what_the_kernel_answers"),
    0x100: ("guest/hostile/reasons::what_a_host_reaches", "host/ghcb_msr::termination"),
}  # fmt: skip
NAE = {
    0x27: ("guest/vc::dr7_is_what_the_guest_wrote", "host/instructions::what_changes_nothing"),
    0x37: ("guest/vc::each_event[write DR7]", "host/instructions::a_write_of_dr7"),
    0x6E: ("guest/vc::each_event[RDTSC]", "host/instructions::rdtsc_is_an_unexpected_exit"),
    0x6F: ("guest/vc::each_event[RDPMC]", "host/instructions::an_exception_comes_with_the_next_entry"),
    0x72: ("guest/cpuid::by_the_page", "host/instructions::cpuid_by_ghcb"),
    0x76: ("guest/vc::what_no_handler_does_ends_the_guest[invd]", "host/instructions::what_changes_nothing"),
    0x7B: ("guest/vc::each_event[IN 8]", "host/ghcb_io::in"),
    0x7C: ("guest/vc::each_event[RDMSR]", "host/instructions::registers_of_an_encrypted_guest"),
    0x81: ("guest/vc::each_event[VMMCALL]", "host/instructions::a_hypercall_of_the_guests_userspace"),
    0x87: ("guest/vc::each_event[RDTSCP]", "host/instructions::an_exception_comes_with_the_next_entry"),
    0x89: ("guest/vc::each_event[WBINVD]", "host/instructions::what_changes_nothing"),
    0x8A: ("guest/vc::monitor_tells_nothing[monitor]", "host/instructions::what_changes_nothing"),
    0x8B: ("guest/vc::monitor_tells_nothing[mwait]", "host/instructions::what_changes_nothing"),
    0x80000001: ("guest/vc::each_event[MMIO read]", "host/ghcb_io::mmio"),
    0x80000002: ("guest/vc::each_event[MMIO write]", "host/ghcb_io::mmio_lengths"),
    0x80000003: ("guest/msr_protocol::small_events[NMI complete]", "host/ghcb::nmi_complete"),
    0x80000004: ("guest/msr_protocol::small_events[reset hold]", "host/ghcb::ap_reset_hold"),
    0x80000005: ("guest/msr_protocol::small_events[get jump table]", "host/ghcb::ap_jump_table"),
    0x80000010: ("guest/requests_by_page::a_list", "host/psc::done"),
    0x80000011: ("guest/requests_by_page::a_guest_request", "host/guest_requests::a_good_message_is_answered"),
    0x80000012: (
        "guest/requests_by_page::an_extended_request_and_the_number_used_up",
        "host/guest_requests::the_vmm_fetches_certificates",
    ),
    0x80000013: ("guest/requests_by_page::creation_and_destruction_of_a_processor", "host/ap_creation::refused"),
    0x80000014: ("guest/interrupts::the_host_must_name_the_same_page", "host/svsm_events::doorbell"),
    0x80000015: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x80000016: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x80000017: ("guest/svsm_hostile::processors_that_the_host_makes_up", "host/svsm_events::apic_ids"),
    0x80000018: ("guest/msr_protocol::small_events[run VMPL]", "host/svsm_events::run_vmpl_by_its_event"),
    0x8000001A: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x8000001B: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x8000001C: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x8000001D: (NOTHING, "host/svsm_events::interrupts_by_the_host_are_refused"),
    0x8000FFFD: ("guest/msr_protocol::small_events[features]", "host/ghcb::features_and_the_bitmap_of_an_answer"),
    0x8000FFFE: ("guest/requests_by_page::termination_by_the_page", "host/ghcb::termination"),
    0x8000FFFF: (NOTHING, "host/ghcb::an_unsupported_event_ends_kvm_run"),
}  # fmt: skip
WHY = {
    Nae.HV_IPI: "no interrupt controller", Nae.HV_TIMER: "no interrupt controller", Nae.SECURE_AVIC: "no Secure AVIC",
    Nae.CONFIGURE_INJECTION: "no APIC protocol", Nae.DISABLE_ALTERNATE_INJECTION: "no APIC protocol",
    Nae.SPECIFIC_EOI: "no APIC protocol", Nae.UNSUPPORTED: "OVMF's: a kernel ends itself instead",
}  # fmt: skip
"""What no guest of the model sends."""
PSC = {
    "header invalid": (
        "guest/requests_by_page::a_wrong_answer_to_a_list[header invalid]",
        "host/psc::more_entries_than_there_is_room",
    ),
    "entry invalid": ("guest/requests_by_page::a_wrong_answer_to_a_list[entry invalid]", "host/psc::as_the_reference"),
    "generic failure": (
        "guest/requests_by_page::a_wrong_answer_to_a_list[generic failure]",
        "host/psc::a_failure_keeps_what_is_done",
    ),
    "PSMASH and UNSMASH": (NOTHING, "host/psc::other_operations_count_as_done"),
    "stops early": (
        "guest/requests_by_page::a_list_that_stops_early_goes_on_where_it_was",
        "host/psc::a_partly_done_large_entry_goes_on_alone",
    ),
    "reserved": ("guest/requests_by_page::a_wrong_answer_to_a_list[reserved]", NOTHING),
    "end grown": (
        "guest/requests_by_page::a_wrong_answer_to_a_list[end_entry grown]",
        "host/psc::a_guest_that_grows_its_list_meanwhile_is_stopped",
    ),
    "moved back": ("guest/requests_by_page::a_wrong_answer_to_a_list[cur_entry back]", "host/psc::nothing_left"),
    "no hypercalls": (NOTHING, "host/psc::a_vmm_that_serves_no_hypercalls"),
}  # fmt: skip
ERRORS = {
    1: (NOTHING, "host/ghcb::an_unregistered_ghcb_ends_kvm_run"),
    2: ("guest/vc::a_refusal_ends_the_guest", "host/ghcb::malformed[usage]"),
    3: ("guest/vc::a_refusal_ends_the_guest", "host/ghcb_io::a_scratch_area_outside_of_the_shared_buffer"),
    4: ("guest/vc::a_refusal_ends_the_guest", "host/ghcb::malformed[no code]"),
    5: ("guest/vc::a_refusal_ends_the_guest", "host/ghcb::malformed[a port access of no size]"),
    6: ("guest/vc::a_refusal_ends_the_guest", "host/ghcb::malformed[unknown event]"),
}  # fmt: skip
VC = {
    "automatic exits": ("hardware/intercepts::who_answers", "spec/vmcb::automatic_exits"),
    "all others": ("hardware/intercepts::who_answers", "hardware/intercepts::intercepted_exceptions"),
    "0x404": (
        "guest/boot::the_vc_has_the_code_for_a_page_that_is_not_validated",
        "guest/vc::what_no_handler_does_ends_the_guest[not validated]",
    ),
    "reserved bit": ("hardware/intercepts::memory_mapped_devices", "guest/vc::encrypted_memory_is_no_mmio"),
    "before a GHCB": (
        "guest/vc::before_there_is_a_ghcb_only_cpuid_is_served",
        "guest/cpuid::early_by_the_msr_protocol",
    ),
    "opcode": ("guest/vc::an_injected_vc_at_another_instruction_ends_the_guest", NOTHING),
    "#DB": ("guest/vc::an_injected_debug_exception_goes_to_its_own_handler", NOTHING),
    "MSR C001_F000": ("guest/vc::the_calling_areas_address_stays_inside", NOTHING),
    "DR7, upper half": ("guest/vc::the_upper_half_of_dr7_is_gp_without_an_exit", NOTHING),
    "Secure TSC": ("guest/vc::a_secure_counter_that_is_intercepted_ends_the_guest", NOTHING),
    "strings": (
        "guest/vc::strings_go_by_as_much_as_the_buffer_holds",
        "host/ghcb_io::outs_and_ins_of_the_whole_buffer",
    ),
    "version 1": (
        "guest/msr_protocol::request_and_answer[an older version]",
        "host/ghcb_io::version_1_has_scratch_areas_elsewhere",
    ),
}  # fmt: skip
IOCTL = {
    0xC0205300: ("guest/sev_guest::report", "guest/sev_guest::the_users_errors_cost_nothing"),
    0xC0205301: ("guest/sev_guest::derived_keys", "guest/sev_guest::the_users_errors_cost_nothing"),
    0xC0205302: ("guest/sev_guest::extended_report", "guest/sev_guest::too_few_pages_for_certificates"),
    "wiped": ("guest/sev_guest::a_host_that_stays_busy", NOTHING),
    "busy": ("guest/sev_guest::a_busy_host_gets_the_same_message_again", "host/guest_requests::throttling"),
    "invalid length": (
        "guest/sev_guest::too_few_pages_for_certificates",
        "host/guest_requests::the_vmm_fetches_certificates",
    ),
    "other errors": (
        "guest/sev_guest::any_other_refusal_wipes_the_key",
        "host/guest_requests::a_refused_message_is_told_with_the_firmwares_status",
    ),
    "no answer to it": ("guest/attestation::a_changed_answer_is_found", NOTHING),
    "numbers used up": ("guest/sev_guest::without_numbers_left", NOTHING),
    "tsm": (
        "guest/sev_guest::what_an_entry_refuses",
        "guest/sev_guest::an_entry_keeps_its_report_until_it_is_written_to",
    ),
    "tsm, counter": ("guest/tsm_errors::a_counter_that_comes_round", NOTHING),
    "tsm, statuses": ("guest/tsm_errors::statuses_of_the_firmware", NOTHING),
}  # fmt: skip
TABLES = {"MSR": MSR, "NAE": NAE, "PSC": PSC, "errors": ERRORS, "#VC": VC, "ioctl": IOCTL}
PLACES = sorted({place for table in TABLES.values() for row in table.values() for place in row if place})


@cache
def source(file: str) -> str:
    return (TESTS / file).read_text()


@pytest.mark.parametrize("place", PLACES)
def test_the_test_is_there(place: str) -> None:
    found = re.fullmatch(r"(\w+)/((?:\w+/)?)(\w+)::(\w+)(?:\[(.+)\])?", place)
    assert found, place
    side, folder, file, function, case = found.groups()
    text = source(f"{side}/{folder}test_{file}.py")
    assert re.search(rf"^def test_{function}\(", text, re.MULTILINE), place
    if case:
        assert f'"{case}"' in text, place


def test_no_request_is_forgotten() -> None:
    assert MSR.keys() == set(MsrCode)
    assert NAE.keys() == set(Nae)
    assert {code for code, (guest, _) in NAE.items() if not guest} == WHY.keys()
    assert ERRORS.keys() == set(GhcbError)
    assert {key for key in IOCTL if isinstance(key, int)} == set(GuestIoctl)


HANDLED = {0x27, 0x37, 0x6E, 0x6F, 0x72, 0x7B, 0x7C, 0x81, 0x87, 0x89, 0x8A, 0x8B, 0x400}
"""Exit codes of #VC that a kernel serves; 0x41 and 0x51 become #DB and #AC. All others end it."""
OPERATIONS = {1: "private", 2: "shared"}
FAILURES = {"header invalid": 1 << 32 | 1, "entry invalid": 1 << 32 | 2, "generic failure": 0x100 << 32}
WRITTEN = {"inblob", "privlevel", "service_provider", "service_guid", "service_manifest_version"}
READ = {"outblob", "auxblob", "manifestblob", "provider", "generation", "privlevel_floor"}
"""Attributes of a report's directory, which are for the one or for the other."""


def test_exit_codes_of_vc() -> None:
    assert vc._HANDLERS.keys() == HANDLED
    assert vc._FORWARDED == {0x41: 1, 0x51: 17}
    by_page = HANDLED - {0x400} | {0x76}
    assert by_page == {code for code in NAE if code < 1 << 31}, "each has its event; INVD has one that nobody sends"
    assert not HANDLED & AUTOMATIC_EXITS - {0x400}


def test_rows_of_lists() -> None:
    assert {int(operation): operation.name.lower() for operation in PageOperation} == OPERATIONS
    assert {name: LISTS[name].fields["info2"] for name in FAILURES} == FAILURES
    assert FAILURES.keys() < PSC.keys()


def test_attributes_of_a_report() -> None:
    public = {name for name in vars(ReportEntry) if not name.startswith("_")} - {"driver"}
    written = {name.removeprefix("write_") for name in public if name.startswith("write_")}
    assert written == WRITTEN
    assert {name for name in public if not name.startswith("write_")} == READ


def test_numbers_of_failures() -> None:
    failures = ghcb.PSC_INVALID_HEADER, ghcb.PSC_INVALID_ENTRY, ghcb.PSC_FAILURE
    assert failures == (1 << 32 | 1, 1 << 32 | 2, 0x100 << 32)
    assert (VmmError.INVALID_LEN, VmmError.BUSY) == (1, 2)
    assert (ExitCode.NPF, ExitCode.PAGE_NOT_VALIDATED, ExitCode.VMGEXIT) == (0x400, 0x404, 0x403)
    assert ghcb.PAGE_STATE_FAILED == 1 << 63
