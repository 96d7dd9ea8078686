"""Checklist and console views of hosts: text as snphost prints it, HTML that says the same, cores that differ apart."""

from __future__ import annotations

from snpbook.exercises.hosts import HostOptions
from snpbook.hardware.bios import BiosSetup
from snpbook.host.checklist import Item, State
from snpbook.spec.msr import Msr
from snpbook.views.checklist import checklist
from snpbook.views.host_state import cpuid, dmesg, files, msrs, state

ITEMS = (
    Item("one", 0, State.PASS, "found <it>"),
    Item("two", 1, State.FAIL, "nothing", "because", "do that"),
    Item("three", 2, State.SKIP),
)


def test_a_checklist() -> None:
    shown = checklist(ITEMS)
    assert shown.text.splitlines() == [
        "[ PASS ] - one: found <it>",
        "[ FAIL ]   - two: nothing",
        "             remedy: do that",
        "[ SKIP ]     - three",
        "1 PASS, 1 FAIL, 1 SKIP",
    ]
    assert "found &lt;it&gt;" in shown.html
    assert "do that; because" in shown.html
    assert "\u2713 PASS" in shown.html
    assert "\u2717 FAIL" in shown.html
    assert "\u2013 SKIP" in shown.html


def test_a_log_is_escaped() -> None:
    assert "a &lt;b&gt;" in dmesg("a <b>").html


def test_cores_that_differ_are_apart() -> None:
    kernel = HostOptions().boot()
    assert "HWCR         0x0000000000000001  all cores" in msrs(kernel).text
    kernel.cpu._machine.cores[1].set_by_bios({Msr.HWCR: 0})
    text = msrs(kernel).text
    assert "HWCR         0x0000000000000001  cores 0" in text
    assert "HWCR         0x0000000000000000  cores 1" in text


def test_leaves_and_files() -> None:
    kernel = HostOptions(bios=BiosSetup(min_sev_asid=7)).boot()
    assert "8000001F  0101fd3f  00004173  000001fd  00000007" in cpuid(kernel).text
    assert "sev 503, sev_es 6" in files(kernel).text
    assert "flags: svm sev sev_es sev_snp" in files(kernel).text
    rome = HostOptions("rome").boot()
    assert "RMP_BASE" not in msrs(rome).text
    without = HostOptions(modules={"kvm_amd": "sev=maybe"}).boot()
    assert files(without).text.count("no such file") == 4
    assert all(part.text in state(rome).text for part in (msrs(rome), cpuid(rome), files(rome)))
