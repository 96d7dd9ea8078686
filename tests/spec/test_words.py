"""Small facts: TCB versions, PEM, sizes, vCPU signatures, reset states, kernel hashes; refusals explain themselves."""

from __future__ import annotations

import ssl
from hashlib import sha256, sha384
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.spec.cite import DOCUMENTS, Cite
from snpbook.spec.launch import VMSA_TWEAK_BITMAP, kernel_hash_page, kernel_hash_table
from snpbook.spec.pem import der_from_pem, pem_from_der
from snpbook.spec.policy import DEFAULT_POLICY, POLICY, Tcb
from snpbook.spec.refusal import Refusal
from snpbook.spec.report import reserved_ranges
from snpbook.spec.resources import resource
from snpbook.spec.sizes import format_size, parse_size
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.spec.vmsa import VCPU_TYPES, VMSA, CpuidSignature, Vmm, reset_vmsa

BYTE = st.integers(0, 255)


@given(BYTE, BYTE, BYTE, BYTE, st.none() | BYTE)
def test_tcb_round_trip(bootloader: int, tee: int, snp: int, microcode: int, fmc: int | None) -> None:
    tcb = Tcb(bootloader, tee, snp, microcode, fmc)
    assert Tcb.from_int(int(tcb), turin=fmc is not None) == tcb


def test_tcb_byte_orders() -> None:
    """Real reports: Milan 1.55.35 and Turin 1.55.65."""
    assert Tcb.from_int(0xDE1B000000000004) == Tcb(bootloader=4, tee=0, snp=27, microcode=0xDE)
    assert Tcb.from_int(0x5100000004010101, turin=True) == Tcb(1, 1, 4, 0x51, fmc=1)
    assert str(Tcb(1, 1, 4, 0x51, fmc=1)) == "fmc 1 bl 1 tee 1 snp 4 ucode 0x51"


@given(st.lists(BYTE, min_size=4, max_size=4), st.lists(BYTE, min_size=4, max_size=4))
def test_tcb_is_compared_by_component(mine: list[int], least: list[int]) -> None:
    assert Tcb(*mine).at_least(Tcb(*least)) == all(a >= b for a, b in zip(mine, least, strict=True))


def test_default_policy() -> None:
    assert dict(POLICY.unpack(DEFAULT_POLICY.to_bytes(8, "little"))) == {
        name: int(name in ("smt", "one")) for name in POLICY.fields
    }


@given(st.binary(min_size=1, max_size=200))
def test_pem(der: bytes) -> None:
    pem = pem_from_der(der)
    assert pem == ssl.DER_cert_to_PEM_cert(der)
    assert der_from_pem(f"a comment\n{pem}more") == der


@pytest.mark.parametrize(
    ("text", "size"),
    [("4K", 4096), ("512M", 512 << 20), ("2G", 2 << 30), ("512 MiB", 512 << 20), ("1t", 1 << 40), ("8192", 8192)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "3K", "-1G", "1.5G", "0", "M", "12Q", "4096 bytes", "\uff11G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


SIGNATURES = {
    "EPYC": 0x800F12, "EPYC-v4": 0x800F12, "EPYC-IBPB": 0x800F12, "EPYC-Rome-v3": 0x830F10,
    "EPYC-Milan": 0xA00F11, "EPYC-Milan-v2": 0xA00F11, "EPYC-Genoa-v1": 0xA10F10, "EPYC-Turin": 0xB00F00,
}  # fmt: skip


def test_vcpu_signatures() -> None:
    assert {name: int(VCPU_TYPES[name]) for name in SIGNATURES} == SIGNATURES
    assert int(CpuidSignature(6, 0x2A, 7)) == 0x206A7 & ~(2 << 16) | 2 << 16


BSP = "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a"
AP = "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"


@pytest.mark.parametrize(("eip", "digest"), [(0xFFFFFFF0, BSP), (0x80B004, AP)])
def test_reset_state_of_qemu(eip: int, digest: str) -> None:
    assert sha384(bytes(reset_vmsa(eip, 0x800F12, 1))).hexdigest() == digest


VMM_STATES: dict[Vmm, dict[str, Any]] = {
    Vmm.EC2: {"rdx": 0x600, "mxcsr": 0, "x87_fcw": 0, "g_pat": 0x0007040600070406},
    Vmm.GCE: {"rdx": 0x600, "mxcsr": 0, "x87_fcw": 0, "g_pat": 0x70106},
}


@pytest.mark.parametrize("vmm", VMM_STATES)
def test_reset_states_of_others(vmm: Vmm) -> None:
    state = reset_vmsa(0xFFFFFFF0, 0x800F12, 1, vmm)
    assert {name: getattr(state, name) for name in VMM_STATES[vmm]} == VMM_STATES[vmm]
    assert (state.cs.attrib, state.ss.attrib, state.tr.attrib) == (
        (0x9A, 0x92, 0x83) if vmm is Vmm.EC2 else (0x9B, 0x93, 0x8B)
    )
    assert VMSA.unpack(bytes(state)) == state


def test_kernel_hashes() -> None:
    table = kernel_hash_table(b"", b"", "console=ttyS0 loglevel=7")
    assert sha256(table).hexdigest() == "9b8d003b7deacde5e1e4e53ffdeaeefcfeec67cdf0f7362fafe984996f03b59d"
    page = kernel_hash_page(table, 0x810C00)
    assert len(page) == 4096
    assert page[0xC00 : 0xC00 + 176] == table
    assert not any(page[:0xC00])
    assert not any(page[0xC00 + 176 :])
    with pytest.raises(ValueError, match="leaves its page"):
        kernel_hash_page(table, 0xFFF)


def test_tweak_bitmap() -> None:
    assert VMSA_TWEAK_BITMAP.hex().startswith("0000000000800088")
    assert len(VMSA_TWEAK_BITMAP) == 64


def test_reserved_ranges_follow_the_version() -> None:
    assert (0x188, 0x1A0) in reserved_ranges(2)
    assert (0x18B, 0x1A0) in reserved_ranges(3)
    assert (0x1F8, 0x2A0) in reserved_ranges(4)
    assert (0x208, 0x2A0) in reserved_ranges(5)


def test_refusals_explain_themselves() -> None:
    refusal = Refusal("a rule", 16, b"\x01\x02", "SNP 8.1")
    assert str(refusal) == "a rule (expected 0x10, found 0102)"
    assert refusal.explain() == "a rule (expected 0x10, found 0102) [SNP 8.1]"
    assert "<caption>a rule" in refusal._repr_html_()
    assert "&lt;b&gt;" in Refusal("<b>")._repr_html_()
    with pytest.raises(FirmwareRefusal, match=r"BAD_SVN \(0x21\): the version") as caught:
        require(False, Status.BAD_SVN, "the version")
    assert caught.value.status is Status.BAD_SVN
    require(True, Status.BAD_SVN, "the version")


def test_documents_and_resources() -> None:
    assert all(Cite(key).title for key in DOCUMENTS)
    assert str(Cite("APM2", "15.36")) == "APM2 15.36"
    with pytest.raises(FileNotFoundError, match="data/nothing is neither in"):
        resource("data", "nothing")
