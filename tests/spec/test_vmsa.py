"""The VMSA: offsets by the hardware sheet's table, reset states and vCPU types against an independent computation."""

import pytest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vcpu_types import CPU_SIGS
from sevsnpmeasure.vmm_types import VMMType
from sevsnpmeasure.vmsa import VMSA as PEER

from snpbook.spec.vmsa import (
    BSP_RESET_EIP,
    GUEST_FIELDS_AT_LAUNCH,
    LOADABLE_REGISTERS,
    SEGMENT,
    UNMEASURED_FROM,
    UNMEASURED_TO,
    VCPU_TYPES,
    VMSA,
    CpuidSignature,
    Vmm,
    reset_vmsa,
)
from tests.sampling import sampled

OFFSETS = """
000 es 010 cs 020 ss 030 ds 040 fs 050 gs 060 gdtr 070 ldtr 080 idtr 090 tr 0A0 pl0_ssp 0B8 pl3_ssp 0C0 u_cet
0CA vmpl 0CB cpl 0D0 efer 140 xss 148 cr4 150 cr3 158 cr0 160 dr7 168 dr6 170 rflags 178 rip 180 dr0 198 dr3
1A0 dr0_addr_mask 1B8 dr3_addr_mask 1D8 rsp 1E0 s_cet 1E8 ssp 1F0 isst_addr 1F8 rax 200 star 208 lstar 210 cstar
218 sfmask 220 kernel_gs_base 228 sysenter_cs 230 sysenter_esp 238 sysenter_eip 240 cr2 268 g_pat 270 dbgctl
278 br_from 280 br_to 288 last_excp_from 290 last_excp_to 2E0 spec_ctrl 2E8 pkru 2EC tsc_aux 2F0 guest_tsc_scale
2F8 guest_tsc_offset 300 reg_prot_nonce 308 rcx 310 rdx 318 rbx 320 secure_avic_control 328 rbp 330 rsi 338 rdi
340 r8 378 r15 390 guest_exitinfo1 398 guest_exitinfo2 3A0 guest_exitintinfo 3A8 guest_nrip 3B0 sev_features
3B8 vintr_ctrl 3C0 guest_exitcode 3C8 virtual_tom 3D0 tlb_id 3D8 pcpu_id 3E0 eventinj 3E8 xcr0
400 x87_dp 408 mxcsr 40C x87_ftw
40E x87_fsw 410 x87_fcw 412 x87_fop 414 x87_ds 416 x87_cs 418 x87_rip 420 x87_registers 470 xmm 570 ymm_hi
980 opmask 9C0 zmm_hi BC0 hi16_zmm 3F0 xsave_valid_bitmap 670 lbr_stack 770 lbr_select 778 ibs_fetch_ctl
780 ibs_fetch_linaddr 788 ibs_op_ctl 790 ibs_op_rip 798 ibs_op_data 7A0 ibs_op_data2 7A8 ibs_op_data3 7B0 ibs_dc_linaddr
7B8 bp_ibstgt_rip 7C0 ic_ibs_extd_ctl 900 guest_intercepts 920 guest_msr_intercepts
"""
SIZES = """
xsave_valid_bitmap 16 x87_registers 80 xmm 256 ymm_hi 256 lbr_stack 256 guest_intercepts 32 guest_msr_intercepts 32
opmask 64 zmm_hi 512 hi16_zmm 1024 pkru 4 tsc_aux 4 vmpl 1 cpl 1
"""


def test_offsets_of_the_save_area() -> None:
    words = OFFSETS.split()
    table = {name: int(offset, 16) for offset, name in zip(words[::2], words[1::2], strict=True)}
    assert table == {name: VMSA.offset(name) for name in table}
    sizes = dict(zip(SIZES.split()[::2], map(int, SIZES.split()[1::2]), strict=True))
    assert sizes == {name: VMSA.fields[name].size for name in sizes}
    implied = {"pl1_ssp", "pl2_ssp", *(f"dr{i}" for i in (1, 2)), *(f"dr{i}_addr_mask" for i in (1, 2))}
    assert VMSA.fields.keys() - table.keys() == implied | {f"r{i}" for i in range(9, 15)}
    assert [(name, SEGMENT.offset(name)) for name in SEGMENT.fields] == [
        ("selector", 0), ("attrib", 2), ("limit", 4), ("base", 8)
    ]  # fmt: skip
    assert (UNMEASURED_FROM, UNMEASURED_TO) == (0x2F0, 0x300)


def test_the_reset_state_in_words() -> None:
    vmsa = reset_vmsa(BSP_RESET_EIP, 0xA00F11, 1)
    assert (vmsa.cs.selector, vmsa.cs.attrib, vmsa.cs.limit, vmsa.cs.base) == (0xF000, 0x9B, 0xFFFF, 0xFFFF0000)
    assert {vmsa.ds.attrib, vmsa.es.attrib, vmsa.fs.attrib, vmsa.gs.attrib, vmsa.ss.attrib} == {0x93}
    assert (vmsa.ldtr.attrib, vmsa.tr.attrib) == (0x82, 0x8B)
    assert (vmsa.efer, vmsa.cr4, vmsa.cr0, vmsa.dr7, vmsa.dr6) == (0x1000, 0x40, 0x10, 0x400, 0xFFFF0FF0)
    assert (vmsa.rflags, vmsa.rip, vmsa.g_pat, vmsa.rdx) == (2, 0xFFF0, 0x0007040600070406, 0xA00F11)
    assert (vmsa.xcr0, vmsa.mxcsr, vmsa.x87_fcw, vmsa.sev_features) == (1, 0x1F80, 0x37F, 1)


CASES = [
    (vmm, eip, signature, features)
    for vmm in Vmm
    for eip in (0xFFFFFFF0, 0x80B004, 0x12345678)
    for signature in (0x800F12, 0xA00F11, 0xA10F10)
    for features in (0, 1, 0x21)
]


@pytest.mark.parametrize(("vmm", "eip", "signature", "features"), sampled(CASES, 20))
def test_reset_states_equal_an_independent_computation(vmm: Vmm, eip: int, signature: int, features: int) -> None:
    """`sev-snp-measure` takes the address of application processors; the first processor always starts at reset."""
    bsp, ap = PEER(SevMode.SEV_SNP, eip, signature, features, VMMType[vmm.value]).pages(2)
    assert bytes(reset_vmsa(BSP_RESET_EIP, signature, features, vmm)) == bytes(bsp)
    assert bytes(reset_vmsa(eip, signature, features, vmm)) == bytes(ap)


def test_vcpu_types_of_qemu() -> None:
    theirs = {name: value for name, value in CPU_SIGS.items() if name in VCPU_TYPES}
    assert {name: int(VCPU_TYPES[name]) for name in theirs} == theirs
    assert theirs.keys() >= {"EPYC", "EPYC-v4", "EPYC-Rome-v3", "EPYC-Milan-v2", "EPYC-Genoa"}


def test_what_software_may_load() -> None:
    assert VMSA.fields.keys() >= LOADABLE_REGISTERS
    assert LOADABLE_REGISTERS.isdisjoint({"vmpl", "cpl", "rip", "sev_features", "virtual_tom", "vintr_ctrl", "pcpu_id"})


def test_what_the_firmware_writes_at_launch_is_reserved() -> None:
    for offset, data in GUEST_FIELDS_AT_LAUNCH.items():
        mask = (1 << 8 * len(data)) - 1 << 8 * offset
        assert VMSA.reserved_mask & mask == mask


@pytest.mark.parametrize("signature", sorted({int(found) for found in VCPU_TYPES.values()} | {0x00000F61, 0x000006A5}))
def test_signatures_are_read_as_they_are_written(signature: int) -> None:
    assert int(CpuidSignature.from_int(signature)) == signature
