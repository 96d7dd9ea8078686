"""Every documented reason for which a guest ends itself is reached, by what a host can do or by a bare guest's fate.

A reason is the set and the number in the termination request. Those of an SVSM guest have their tests with the SVSM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.attacks.tampering import attacker
from snpbook.guest.boot import start
from snpbook.guest.termination import Terminated
from snpbook.spec.ghcb import MsrCode, Nae
from snpbook.spec.termination import GeneralReason, Reason
from tests.guest.bare import PLACE, Answer, Bare
from tests.guest.hostile.world import Watch, attempt
from tests.guest.test_start import bare, honest
from tests.machines import booted, launched

Lie = Callable[[Moment], None]


def msr(code: MsrCode, answer: int) -> Lie:
    """Another answer by the MSR."""

    def lie(m: Moment) -> None:
        if m.stage is Stage.ENTRY and m.code is code:
            m.answer_msr(answer)

    return lie


def page(event: Nae, **fields: Any) -> Lie:
    """Another answer in the page."""

    def lie(m: Moment) -> None:
        if m.stage is Stage.ENTRY and m.event is event:
            m.put(**fields)

    return lie


def swap(m: Moment) -> None:
    """Before each entry another page where the guest changes one's side."""
    if m.stage is Stage.ENTRY and m.event is None:
        m.fresh(0x303000)


GP, UD = 0x8000030D, 0x80000306
"""In the form of EVENTINJ."""
BY_THE_HOST: dict[str, tuple[str, Lie, str]] = {
    "another code for the versions": ("early", msr(MsrCode.SEV_INFO_REQUEST, 0x7FF), "0:1"),
    "no version in common": ("early", msr(MsrCode.SEV_INFO_REQUEST, 9 << 48 | 3 << 32 | 51 << 24 | 1), "0:1"),
    "version 1 alone": ("early", msr(MsrCode.SEV_INFO_REQUEST, 1 << 48 | 1 << 32 | 51 << 24 | 1), "0:1"),
    "no SNP": ("early", msr(MsrCode.FEATURES_REQUEST, 2 << 12 | 0x081), "0:2"),
    "another page registered": ("early", msr(MsrCode.REGISTER_GPA_REQUEST, 0x7013), "1:0"),
    "registration refused": ("early", msr(MsrCode.REGISTER_GPA_REQUEST, 0xFFFFFFFFFFFFF013), "1:0"),
    "a list that failed": ("pages", page(Nae.PAGE_STATE_CHANGE, sw_exit_info_2=0x100 << 32), "1:1"),
    "a list that raises #GP": ("pages", page(Nae.PAGE_STATE_CHANGE, sw_exit_info_1=1, sw_exit_info_2=GP), "1:1"),
    "another page to rescind": ("pages", swap, "1:2"),
    "CPUID unmarked": ("instructions", page(Nae.CPUID, valid_bitmap=bytes(16)), "1:5"),
    "CPUID refused": ("instructions", page(Nae.CPUID, sw_exit_info_1=2, sw_exit_info_2=4), "1:5"),
    "a port refused": ("instructions", page(Nae.IOIO, sw_exit_info_1=2, sw_exit_info_2=5), "0:0"),
    "a message that raises #UD": ("messages", page(Nae.GUEST_REQUEST, sw_exit_info_1=1, sw_exit_info_2=UD), "0:0"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BY_THE_HOST))
def test_what_a_host_reaches(name: str) -> None:
    scene, lie, reason = BY_THE_HOST[name]
    outcome, _, _ = attempt(scene, "mainline", lie)
    assert (outcome.kind, outcome.detail) == ("stop", reason)


def without_cpuid(guest: Bare) -> None:
    guest.put(PLACE.cpuid, bytes(4096))


BY_ITS_FATE: dict[str, tuple[dict[str, Any], Callable[[Bare], None], str]] = {
    "no CPUID page": ({}, without_cpuid, "1:4"),
    "no secrets page": ({"version": 0}, lambda guest: None, "1:6"),
    "memory that its bit does not encrypt": ({"c_bit": 55}, lambda guest: None, "0:0"),
    "CPUID that denies SEV": ({"sev": 0}, lambda guest: None, "0:0"),
}


@pytest.mark.parametrize("name", list(BY_ITS_FATE))
def test_what_a_launch_reaches(name: str) -> None:
    options, change, reason = BY_ITS_FATE[name]
    guest = bare(**options)
    change(guest)
    with pytest.raises(Terminated):
        guest.go_on(msr=honest)
    assert "{}:{}".format(*guest.ended_with) == reason


def test_a_leaf_that_is_not_there_denies_sev_too() -> None:
    guest = Bare(cpuid=[(0, 0, 0, 0, 0x10, 0, 0, 0)])
    guest.bench.start(lambda cpu: start(cpu, PLACE))
    with pytest.raises(Terminated, match="denies SEV"):
        guest.go_on(msr=honest)


@pytest.mark.parametrize(
    ("leaf", "register", "value"), [(0x8000001F, 0, 0), (0x80000000, 0, 0x8000001E), (0x8000001F, 1, 55)]
)
def test_a_guest_with_sev_es_is_told_of_no_sev_or_of_another_bit(leaf: int, register: int, value: int) -> None:
    """Its CPUID is the host's word, by four rounds of the MSR; it ends before it has used its memory in the clear."""
    guest, watch = launched(booted(era="mainline"), memory="12 MiB", kind="sev-es"), Watch()

    def lie(m: Moment) -> None:
        watch(m)
        asked = m.value >> 32, m.value >> 30 & 3, m.code
        if m.stage is Stage.ENTRY and asked == (leaf, register, MsrCode.CPUID_REQUEST):
            m.answer_msr(value << 32 | register << 30 | 5)

    tamper(guest, lie)
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        guest.boot()
    assert watch.ended == "0:0"


ELSEWHERE = {
    Reason.NOT_VMPL0: "tests/guest/test_svsm_boot.py",
    Reason.NO_SVSM: "tests/guest/test_svsm_boot.py",
    Reason.SVSM_VMPL0: "tests/guest/test_svsm_boot.py",
    Reason.SVSM_CAA: "tests/guest/test_svsm_boot.py",
    Reason.SVSM_CA_REMAP_FAIL: "tests/guest/test_svsm_boot.py",
    Reason.SECURE_TSC: "tests/guest/test_vc.py",
}
NEVER = {Reason.SAVIC_FAIL}
"""Secure AVIC is not modelled."""


def test_no_reason_is_forgotten() -> None:
    reached = {reason for _, _, reason in (*BY_THE_HOST.values(), *BY_ITS_FATE.values())}
    assert {f"0:{int(reason)}" for reason in GeneralReason} <= reached
    assert {f"1:{int(reason)}" for reason in set(Reason) - ELSEWHERE.keys() - NEVER} <= reached


# What ends a request of the driver, and nothing else.


@pytest.mark.parametrize(
    ("name", "number"),
    [("message replayed", errno.EBADMSG), ("message refused", errno.EIO), ("message dropped", errno.EBADMSG)],
)
def test_errors_of_the_driver(name: str, number: int) -> None:
    hosts = (attacker(name, seed, private=[], shared=[]) for seed in range(20))
    assert any(attempt("messages", "mainline", host)[0].detail == errno.errorcode[number] for host in hosts)


def test_the_guest_never_goes_on_after_it_has_asked_to_be_ended() -> None:
    """By the page, and answered with an exception: VMPL_SSS is on, which the guest would have to know."""
    guest = bare(features=1 | 1 << 8)
    with pytest.raises(Terminated):
        guest.go_on(Answer({"info1": 1, "info2": 1 << 31 | 3 << 8 | 13}), msr=honest)
    assert guest.requests[0].fields["code"] == 0x8000FFFE
