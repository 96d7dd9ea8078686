"""The table of differences: its columns typed again from the documents, and what an `Era` makes of it."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

import pytest

from snpbook.spec.era_differences import DIFFERENCES, NAMES, Certificates
from snpbook.spec.eras import OPTIONS, Era, era
from snpbook.spec.layout import Layout
from snpbook.spec.uapi_psp import PspCommand
from snpbook.spec.uapi_sev import SevOp

V7, MAINLINE, SVSM = (era(name) for name in NAMES)

FACTS: list[tuple[str, Any, Any]] = [
    ("private_file", "RESTRICTEDMEM", "GUEST_MEMFD"),
    ("vm_types", {0}, {0, 1, 2, 3, 4}),
    ("capabilities", {225, 240}, {231, 232, 233, 234, 235, 236}),
    ("absent_ioctls", {0x40A0AE49, 0x4020AED2, 0xC040AED4, 0xC040AED5}, {0x8008AED2, 0xC020AED3}),
    ("set_private_region", 0x4020AE46, 0x40A0AE49),
    ("private_region", "kvm_userspace_memory_region_ext", "kvm_userspace_memory_region2"),
    ("set_attributes", 0xC020AED3, 0x4020AED2),
    ("attributes_partial", True, False),
    ("memory_fault_exit", 38, 39),
    ("memory_fault_private", 1, 8),
    ("memory_fault_fails", False, True),
    ("psc_exit", 50, 3),
    ("init_op", "SNP_INIT", "INIT2"),
    (
        "snp_ops",
        {22: "SNP_INIT", 23: "SNP_LAUNCH_START", 24: "SNP_LAUNCH_UPDATE", 25: "SNP_LAUNCH_FINISH",
         26: "SNP_GET_CERTS", 27: "SNP_SET_CERTS"},
        {22: "INIT2", 100: "SNP_LAUNCH_START", 101: "SNP_LAUNCH_UPDATE", 102: "SNP_LAUNCH_FINISH"},
    ),
    (
        "snp_psp_commands",
        {10: "SNP_SET_EXT_CONFIG", 11: "SNP_GET_EXT_CONFIG"},
        {10: "SNP_COMMIT", 11: "SNP_SET_CONFIG", 12: "SNP_VLEK_LOAD"},
    ),
    ("sev_private_memory", True, False),
    ("private_pages_zeroed", False, True),
    ("rmp_at_attributes", True, False),
    ("rmp_2m", True, False),
    ("psmash_retried", False, True),
    ("rmp_fault_checks_size", False, True),
    ("direct_map", "REMOVED", "SPLIT"),
    ("host_rmp_fault_handled", True, False),
    ("ghcb_pinned", True, False),
    ("private_fault_errors", False, True),
    ("snp_only_snp_ops", False, True),
    ("launch_start_checked", False, True),
    ("launch_by_hva", True, False),
    ("launch_type_checked", False, True),
    ("launch_sets_attribute", True, False),
    ("launch_failure", "RANGE_SHARED", "PAGE_RECLAIMED"),
    ("cpuid_page_returned", False, True),
    ("host_data_passed", False, True),
    ("map_gpa_needs_private", True, False),
    ("ghcb_must_map", True, False),
    ("snp_requests_guarded", False, True),
    ("psc_msr_run_fails", True, False),
    ("psc_result_told", False, True),
    ("requests_bounced", False, True),
    ("request_errors_are_status", True, False),
    ("certificates", "BLOB", "EMPTY_TABLE"),
    ("certificates_always", True, False),
    ("ap_creation_error_gp", True, False),
    ("ap_destroy_needs_rax", True, False),
    ("vmsa_features", 0, 1 << 5),
]  # fmt: skip
"""Attribute, rfc-v7, mainline: enums that have no number of the kernel's by name."""

SVSM_FACTS = {
    "hypervisor_features": (1 << 0 | 1 << 1, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5),
    "vmsa_features": (1 << 5, 1 << 3 | 1 << 4 | 1 << 5),
    "run_vmpl": (False, True),
    "ap_creation_vmpl": (False, True),
    "vmsa_per_vmpl": (False, True),
    "hv_doorbell": (False, True),
}
"""Attribute: mainline, svsm-host."""


def plain(value: Any) -> Any:
    """A value without the types of the library."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return {int(each) for each in value}
    return value if isinstance(value, int) else value.name


@pytest.mark.parametrize(("name", "v7", "mainline"), FACTS, ids=[fact[0] for fact in FACTS])
def test_the_eras_differ_as_the_documents_say(name: str, v7: Any, mainline: Any) -> None:
    assert (plain(getattr(V7, name)), plain(getattr(MAINLINE, name))) == (v7, mainline)


@pytest.mark.parametrize("name", SVSM_FACTS)
def test_what_a_host_of_svsm_guests_adds(name: str) -> None:
    assert (getattr(MAINLINE, name), getattr(SVSM, name)) == SVSM_FACTS[name]


def test_nothing_else_differs() -> None:
    """A row is a difference between eras or made by an option; svsm-host differs only where it is doubtful."""
    rows = {row.name: row for row in DIFFERENCES}
    assert len(rows) == len(DIFFERENCES)
    assert {name for name, row in rows.items() if row.values["rfc-v7"] != row.values["mainline"]} == {
        *(name for name, _, _ in FACTS), "snp_payloads",
    }  # fmt: skip
    assert {name for name, row in rows.items() if row.values["svsm-host"] != row.values["mainline"]} == set(SVSM_FACTS)
    same = {name for name, row in rows.items() if len({str(value) for value in row.values.values()}) == 1}
    assert same == {"requests_throttled"}
    assert {name for name, row in rows.items() if row.unconfirmed} == set(SVSM_FACTS)


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.name)
def test_a_row_is_an_attribute_of_its_type_with_a_source(row: Any) -> None:
    hint = get_type_hints(Era)[row.name]
    for value in row.values.values():
        assert isinstance(value, get_origin(hint) or hint)
        items = value.items() if isinstance(value, dict) else [(each,) for each in value] if get_args(hint) else []
        assert all(isinstance(part, kind) for item in items for part, kind in zip(item, get_args(hint), strict=True))
    assert row.cites
    assert row.meaning
    assert row.values.keys() == set(NAMES)


def test_every_attribute_has_a_row() -> None:
    assert list(get_type_hints(Era)) == ["name", *(row.name for row in DIFFERENCES)]


@pytest.mark.parametrize("kernel", [V7, MAINLINE, SVSM], ids=repr)
def test_each_sub_command_has_one_number_and_one_structure(kernel: Era) -> None:
    assert len(set(kernel.ops.values())) == len(kernel.ops)
    assert all(kernel.ops[kernel.op_id(op)] is op for op in kernel.ops.values())
    assert kernel.payloads.keys() <= set(kernel.ops.values())
    assert kernel.snp_payloads.keys() == set(kernel.snp_ops.values())
    assert kernel.init_op in kernel.ops.values()
    assert kernel.private_region.size == 160
    assert list(kernel.psp_commands) == list(range(len(kernel.psp_commands)))


def test_numbers_that_stayed() -> None:
    assert (V7.op_id(SevOp.LAUNCH_START), MAINLINE.op_id(SevOp.LAUNCH_START)) == (2, 2)
    assert V7.psp_commands[9] is MAINLINE.psp_commands[9] is PspCommand.SNP_PLATFORM_STATUS
    with pytest.raises(KeyError):
        MAINLINE.op_id(SevOp.SNP_INIT)


def test_sizes_of_the_structures() -> None:
    sizes = {op.name: layout.size for op, layout in V7.snp_payloads.items()}
    assert sizes == {
        "SNP_INIT": 8, "SNP_LAUNCH_START": 40, "SNP_LAUNCH_UPDATE": 32, "SNP_LAUNCH_FINISH": 56,
        "SNP_GET_CERTS": 16, "SNP_SET_CERTS": 16,
    }  # fmt: skip
    assert [layout.size for layout in MAINLINE.snp_payloads.values()] == [48, 64, 64, 88]


def test_options_change_what_they_name() -> None:
    kernel = era("mainline", *OPTIONS)
    assert kernel.certificates is Certificates.USERSPACE
    assert kernel.requests_throttled
    assert kernel.op_id(SevOp.SNP_ENABLE_REQ_CERTS) == 103
    assert {name for name in get_type_hints(Era) if getattr(kernel, name) != getattr(MAINLINE, name)} == {
        "certificates", "requests_throttled", "snp_ops",
    }  # fmt: skip
    assert era("mainline") is MAINLINE


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="era 'rfc-v6' is not modelled: one of rfc-v7, mainline, svsm-host"):
        era("rfc-v6")
    with pytest.raises(ValueError, match="no option 'magic': one of guest-request-throttling, certificate-exit"):
        era("mainline", "magic")
    with pytest.raises(ValueError, match="option 'certificate-exit' came after mainline: rfc-v7 does not have it"):
        era("rfc-v7", "certificate-exit")


def test_rows_print() -> None:
    shown = {row.name: [row.text(name) for name in NAMES] for row in DIFFERENCES}
    assert shown["memory_fault_exit"] == ["MEMORY_FAULT_V10 38", "MEMORY_FAULT 39", "MEMORY_FAULT 39"]
    assert shown["attributes_partial"] == ["yes", "no", "no"]
    assert shown["set_attributes"][1] == "SET_MEMORY_ATTRIBUTES 0x4020aed2"
    assert shown["vmsa_features"][0] == "none"
    assert shown["snp_psp_commands"][0] == "10 SNP_SET_EXT_CONFIG, 11 SNP_GET_EXT_CONFIG"
    assert shown["private_region"][0] == "kvm_userspace_memory_region_ext"
    assert not any("<" in text or "object" in text for row in shown.values() for text in row)
    assert isinstance(V7.private_region, Layout)
    assert repr(V7) == "Era('rfc-v7')"
