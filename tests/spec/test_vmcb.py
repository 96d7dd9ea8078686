"""The VMCB: words with every field at its own value, exit codes by the hardware sheet, who sees which."""

from snpbook.spec.vmcb import (
    ADVANCED_EXITS,
    AUTOMATIC_EXITS,
    EVENT,
    VINTR_CTRL,
    VMCB,
    ExitCode,
    FaultError,
    intercept_bits,
)

NEGATIVE = {"INVALID": -1, "BUSY": -2, "IDLE_REQUIRED": -3, "INVALID_PMC": -4}
AUTOMATIC = {0x52, 0x60, 0x61, 0x62, 0x63, 0x64, 0x77, 0x78, 0x7F, 0x8F, *range(0x90, 0xA0), 0xA5, 0xA6, 0x400, 0x403}
OFFSETS = """
000 intercepts 040 iopm_base_pa 048 msrpm_base_pa 050 tsc_offset 058 asid 05C tlb_control 060 virtual_interrupt
070 exit_code 078 exit_info_1 080 exit_info_2 088 exit_int_info 0A0 ghcb_gpa 0A8 event_injection 0B0 nested_cr3
0C8 next_rip 0D0 instruction_bytes 0E0 avic_backing_page 108 vmsa_pa 110 vmgexit_rax 118 vmgexit_cpl
140 guest_sev_features
"""
BITS = {
    "nested_paging": (0x90, 0), "sev": (0x90, 1), "sev_es": (0x90, 2), "vte": (0x90, 5),
    "lbr_virtualization": (0xB8, 0), "allowed_sev_features_enable": (0x138, 63),
}  # fmt: skip


def test_offsets_of_the_control_area() -> None:
    words = OFFSETS.split()
    table = {name: int(offset, 16) for offset, name in zip(words[::2], words[1::2], strict=True)}
    assert table == {name: VMCB.offset(name) for name in table}
    assert {name: (VMCB.offset(name), VMCB.fields[name].lo) for name in BITS} == BITS


def test_interrupt_control() -> None:
    found = VINTR_CTRL.unpack(0x80000055_841F0FAA.to_bytes(8, "little"))
    assert (found.tpr, found.irq, found.gif, found.int_shadow, found.nmi) == (0xAA, 1, 1, 1, 1)
    assert (found.nmi_mask, found.priority, found.ignore_tpr, found.nmi_enable) == (0, 15, 1, 1)
    assert (found.avic_enable, found.vector, found.busy) == (1, 0x55, 1)
    assert VINTR_CTRL.pack(busy=1) == (1 << 63).to_bytes(8, "little")
    assert VINTR_CTRL.pack(int_shadow=1) == (1 << 10).to_bytes(8, "little")


def test_an_injected_event() -> None:
    found = EVENT.unpack(0x1234_80000B0D.to_bytes(8, "little"))
    assert (found.vector, found.kind, found.has_error, found.valid, found.error) == (13, 3, 1, 1, 0x1234)


def test_bits_that_the_model_never_sets_have_names() -> None:
    assert {FaultError(1 << bit).name: bit for bit in (6, 37, 63)} == {
        "SHADOW_STACK": 6, "SUPERVISOR_SHADOW_STACK": 37, "NOT_RESTARTABLE": 63,
    }  # fmt: skip
    assert ExitCode(0x406).name == "NOT_RESTARTABLE"


def test_automatic_exits() -> None:
    assert AUTOMATIC | {n % 2**64 for n in NEGATIVE.values()} == AUTOMATIC_EXITS
    assert {0x77, 0x78, *range(0x8F, 0xA0), 0xA6, 0x403} == ADVANCED_EXITS
    assert {name: ExitCode[name] for name in NEGATIVE} == {name: n % 2**64 for name, n in NEGATIVE.items()}


def test_intercepts_are_bits_numbered_as_exit_codes() -> None:
    """CR writes in the upper half of word 0, exceptions in word 2, then the instruction words 3 and 4."""
    words = intercept_bits(0x10, 0x41, ExitCode.INTR, ExitCode.CPUID, ExitCode.SHUTDOWN, ExitCode.VMRUN, 0xA6)
    assert [int.from_bytes(words[i : i + 4], "little") for i in range(0, 24, 4)] == [
        1 << 16, 0, 1 << 1, 1 << 31 | 1 << 18 | 1, 1, 1 << 6
    ]  # fmt: skip
