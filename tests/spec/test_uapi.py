"""The kernel ABI against the headers of Linux 6.12, and the v7 series typed again from its patches."""

from __future__ import annotations

import pytest

from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec import uapi_sev
from snpbook.spec.layout import REGISTRY, Layout
from snpbook.spec.uapi_kvm import Exit, Ioctl
from tests.spec.abi import SOURCE, constants, headers, needs_headers, place
from tests.spec.uapi import BEYOND_6_12, LAYOUTS, NUMBERS, member

COMPILED = [layout for layout in LAYOUTS if SOURCE.exists() and layout.name in headers()["structs"]]
"""Those that the headers' program has read back."""


@needs_headers
@pytest.mark.parametrize("layout", COMPILED, ids=lambda layout: layout.name)
def test_fields_lie_where_the_kernel_has_them(layout: Layout) -> None:
    struct = headers()["structs"][layout.name]
    assert layout.size == struct["size"]
    for name, field in layout.fields.items():
        theirs, index = member(layout, name)
        first, width = place(struct["fields"][theirs])
        if index is not None:
            assert 64 * (index + 1) <= width
            first, width = first + 64 * index, 64
        assert (field.first_bit, field.width) == (first, width), name


@needs_headers
def test_what_is_no_field_is_padding() -> None:
    """A field of the kernel that a layout does not name is called so, or is the other half of a union."""
    unions = {
        "kvm_run": set(headers()["structs"]["kvm_run"]["fields"]),
        "kvm_run.hypercall": {"longmode"},
        "kvm_run.system_event": {"flags"},
    }
    for layout in COMPILED:
        ours = {member(layout, name)[0] for name in layout.fields} | unions.get(layout.name, set())
        rest = set(headers()["structs"][layout.name]["fields"]) - ours
        assert not {name for name in rest if not name.startswith(("pad", "rsvd", "reserved"))}, layout.name


@needs_headers
def test_parts_of_the_union_begin_where_it_does() -> None:
    parts = {name: struct for name, struct in headers()["structs"].items() if name.startswith("kvm_run.")}
    assert parts.keys() <= REGISTRY.keys()
    assert {struct["offset"] for struct in parts.values()} == {structs.RUN_EXIT}


@needs_headers
@pytest.mark.parametrize("name", sorted(NUMBERS.keys() & constants().keys()) if SOURCE.exists() else [])
def test_numbers(name: str) -> None:
    assert NUMBERS[name] == constants()[name]


@needs_headers
def test_numbers_that_the_program_did_not_read_have_another_witness() -> None:
    """The installed headers (test_uapi_installed.py), or the rows below."""
    groups = ("KVM_GET_", "KVM_SET_", "KVM_INTERNAL_ERROR_", "KVM_MSR_EXIT_REASON_", "KVM_MP_STATE_", "KVM_CPUID_FLAG_")
    single = {"KVM_API_VERSION", "KVM_CREATE_IRQCHIP", "KVM_PIO_PAGE_OFFSET", "KVM_X86_QUIRK_SLOT_ZAP_ALL"}
    rest = NUMBERS.keys() - constants().keys() - BEYOND_6_12 - single
    assert not {name for name in rest if not name.startswith(groups)}
    assert not BEYOND_6_12 & constants().keys()


V7: dict[str, tuple[int, str]] = {
    "kvm_userspace_memory_region_ext": (
        160, "0 slot 4; 4 flags 4; 8 guest_phys_addr 8; 16 memory_size 8; 24 userspace_addr 8; "
        "32 restricted_offset 8; 40 restricted_fd 4",
    ),
    "kvm_run.vmgexit": (16, "0 ghcb_msr 8; 8 error 1"),
    "kvm_run.snp_req_certs": (24, "0 gpa 8; 8 npages 8; 16 ret 8"),
    "kvm_snp_init.v7": (8, "0 flags 8"),
    "kvm_sev_snp_launch_start.v7": (40, "0 policy 8; 8 ma_uaddr 8; 16 ma_en 1; 17 imi_en 1; 18 gosvw 16"),
    "kvm_sev_snp_launch_update.v7": (
        32, "0 start_gfn 8; 8 uaddr 8; 16 len 4; 20 imi_page 1; 21 page_type 1; 22 vmpl3_perms 1; 23 vmpl2_perms 1; "
        "24 vmpl1_perms 1",
    ),
    "kvm_sev_snp_launch_finish.v7": (
        56, "0 id_block_uaddr 8; 8 id_auth_uaddr 8; 16 id_block_en 1; 17 auth_key_en 1; 18 host_data 32",
    ),
    "kvm_sev_snp_certs.v7": (16, "0 certs_uaddr 8; 8 certs_len 8"),
    "sev_user_data_ext_snp_config": (24, "0 config_address 8; 8 certs_address 8; 16 certs_len 4"),
}  # fmt: skip
"""Size, then offset, field and size in bytes: what no header of Linux 6.12 has."""


@pytest.mark.parametrize("name", V7)
def test_structures_of_the_series(name: str) -> None:
    size, text = V7[name]
    rows = (row.split() for row in text.split(";"))
    assert REGISTRY[name].size == size
    assert {n: (field.first_bit, field.width) for n, field in REGISTRY[name].fields.items()} == {
        field: (8 * int(offset), 8 * int(width)) for offset, field, width in rows
    }


def test_numbers_of_the_series() -> None:
    assert (Ioctl.GET_SUPPORTED_MEMORY_ATTRIBUTES_V10, Ioctl.SET_MEMORY_ATTRIBUTES_V10) == (0x8008AED2, 0xC020AED3)
    assert (Exit.MEMORY_FAULT_V10, Exit.VMGEXIT, Exit.SNP_REQ_CERTS) == (38, 50, 42)
    assert (NUMBERS["KVM_CAP_MEMORY_ATTRIBUTES_V10"], NUMBERS["KVM_CAP_UNMAPPED_PRIVATE_MEM"]) == (225, 240)
    assert [NUMBERS[f"KVM_MEMORY_ATTRIBUTE_{name}"] for name in ("READ", "WRITE", "EXECUTE")] == [1, 2, 4]
    assert NUMBERS["KVM_SEV_SNP_ENABLE_REQ_CERTS"] == 103
    assert {number: op.name for number, op in uapi_sev.V7_OPS.items()} == {
        22: "SNP_INIT", 23: "SNP_LAUNCH_START", 24: "SNP_LAUNCH_UPDATE", 25: "SNP_LAUNCH_FINISH",
        26: "SNP_GET_CERTS", 27: "SNP_SET_CERTS",
    }  # fmt: skip


def test_the_two_region_structures_agree() -> None:
    """Which is why one number of bytes serves both, and the flag alone tells v10 how much to read."""
    ours, theirs = (
        [(field.first_bit, field.width) for field in layout.fields.values()]
        for layout in (structs.USERSPACE_MEMORY_REGION_EXT, structs.USERSPACE_MEMORY_REGION2)
    )
    assert ours == theirs


NONE, WRITE, READ = 0, 1, 2
POINTER_SIZE = 8
CARRIED: dict[str, tuple[int, int, Layout | None]] = {
    "GET_API_VERSION": (NONE, 0x00, None),
    "CREATE_VM": (NONE, 0x01, None),
    "CHECK_EXTENSION": (NONE, 0x03, None),
    "GET_VCPU_MMAP_SIZE": (NONE, 0x04, None),
    "GET_SUPPORTED_CPUID": (READ | WRITE, 0x05, structs.CPUID2),
    "CREATE_VCPU": (NONE, 0x41, None),
    "SET_USER_MEMORY_REGION": (WRITE, 0x46, structs.USERSPACE_MEMORY_REGION),
    "SET_USER_MEMORY_REGION2": (WRITE, 0x49, structs.USERSPACE_MEMORY_REGION2),
    "CREATE_IRQCHIP": (NONE, 0x60, None),
    "RUN": (NONE, 0x80, None),
    "GET_REGS": (READ, 0x81, structs.REGS),
    "SET_REGS": (WRITE, 0x82, structs.REGS),
    "GET_SREGS": (READ, 0x83, structs.SREGS),
    "SET_SREGS": (WRITE, 0x84, structs.SREGS),
    "TRANSLATE": (READ | WRITE, 0x85, structs.TRANSLATION),
    "GET_MSRS": (READ | WRITE, 0x88, structs.MSRS),
    "SET_MSRS": (WRITE, 0x89, structs.MSRS),
    "SET_CPUID2": (WRITE, 0x90, structs.CPUID2),
    "GET_CPUID2": (READ | WRITE, 0x91, structs.CPUID2),
    "GET_MP_STATE": (READ, 0x98, structs.MP_STATE),
    "SET_MP_STATE": (WRITE, 0x99, structs.MP_STATE),
    "SET_GUEST_DEBUG": (WRITE, 0x9B, structs.GUEST_DEBUG),
    "GET_DEBUGREGS": (READ, 0xA1, structs.DEBUGREGS),
    "SET_DEBUGREGS": (WRITE, 0xA2, structs.DEBUGREGS),
    "ENABLE_CAP": (WRITE, 0xA3, structs.ENABLE_CAP),
    "GET_XSAVE": (READ, 0xA4, structs.XSAVE),
    "SET_XSAVE": (WRITE, 0xA5, structs.XSAVE),
    "GET_XCRS": (READ, 0xA6, structs.XCRS),
    "SET_XCRS": (WRITE, 0xA7, structs.XCRS),
    "MEMORY_ENCRYPT_REG_REGION": (READ, 0xBB, structs.ENC_REGION),
    "MEMORY_ENCRYPT_UNREG_REGION": (READ, 0xBC, structs.ENC_REGION),
    "SET_MEMORY_ATTRIBUTES": (WRITE, 0xD2, structs.MEMORY_ATTRIBUTES),
    "SET_MEMORY_ATTRIBUTES_V10": (READ | WRITE, 0xD3, structs.MEMORY_ATTRIBUTES),
    "CREATE_GUEST_MEMFD": (READ | WRITE, 0xD4, structs.CREATE_GUEST_MEMFD),
    "PRE_FAULT_MEMORY": (READ | WRITE, 0xD5, structs.PRE_FAULT_MEMORY),
    "SET_DEVICE_ATTR": (WRITE, 0xE1, structs.DEVICE_ATTR),
    "GET_DEVICE_ATTR": (WRITE, 0xE2, structs.DEVICE_ATTR),
    "HAS_DEVICE_ATTR": (WRITE, 0xE3, structs.DEVICE_ATTR),
}
SCALAR = {"MEMORY_ENCRYPT_OP": (READ | WRITE, 0xBA), "GET_SUPPORTED_MEMORY_ATTRIBUTES_V10": (READ, 0xD2)}


def test_an_ioctl_number_holds_direction_size_and_number() -> None:
    composed = {
        name: direction << 30 | (layout.size if layout else 0) << 16 | 0xAE << 8 | number
        for name, (direction, number, layout) in CARRIED.items()
    }
    composed |= {
        name: direction << 30 | POINTER_SIZE << 16 | 0xAE << 8 | number for name, (direction, number) in SCALAR.items()
    }
    assert {ioctl.name: int(ioctl) for ioctl in Ioctl} == composed
