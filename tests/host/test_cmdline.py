"""Kernel command lines and module options: cases from the kernel's documentation and from logs of real hosts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.host.cmdline import Cmdline, boolean, words
from snpbook.host.modules import load, shown


def test_what_is_unknown_is_passed_on_and_told() -> None:
    """Order and words as in the log of a 6.12 host: plain words first."""
    line = Cmdline.parse("BOOT_IMAGE=/boot/vmlinuz-6.12.5-ipu6 root=UUID=7881f7bb ro quiet splash")
    said = 'Unknown kernel command line parameters "splash BOOT_IMAGE=/boot/vmlinuz-6.12.5-ipu6", '
    assert line.complaints == (f"{said}will be passed to user space.",)


@pytest.mark.parametrize(
    ("text", "no_iommu", "passthrough", "amd_off", "v2"),
    [
        ("", False, False, False, False),
        ("iommu=pt", False, True, False, False),
        ("iommu=off", True, False, False, False),
        ("iommu=nopt", False, False, False, False),
        ("iommu=pt iommu=nopt", False, False, False, False),
        ("iommu=force,pt,merge", False, True, False, False),
        ("iommu=on", False, False, False, False),
        ("iommu.passthrough=1", False, True, False, False),
        ("iommu=pt iommu.passthrough=0", False, False, False, False),
        ("amd_iommu=off", False, False, True, False),
        ("amd_iommu=pgtbl_v2", False, False, False, True),
        ("amd_iommu=pgtbl_v2,pgtbl_v1", False, False, False, False),
        ("amd-iommu=off", False, False, True, False),
        ('"iommu=pt" quiet', False, True, False, False),
        ("quiet -- iommu=pt amd_iommu=off", False, False, False, False),
    ],
)
def test_options_of_the_iommu(text: str, no_iommu: bool, passthrough: bool, amd_off: bool, v2: bool) -> None:
    line = Cmdline.parse(text)
    assert (line.no_iommu, line.passthrough, line.amd_iommu_off, line.v2_tables) == (no_iommu, passthrough, amd_off, v2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("amd_iommu=on", "AMD-Vi: Unknown option - 'on'"),
        ("amd_iommu=pt,off", "AMD-Vi: Unknown option - 'pt'"),
        ("iommu", "Malformed early option 'iommu'"),
        ("iommu.passthrough=maybe", "Malformed early option 'iommu.passthrough'"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, complaint: str) -> None:
    assert Cmdline.parse(text).complaints == (complaint,)


def test_a_bad_option_does_not_hide_the_next() -> None:
    assert Cmdline.parse("amd_iommu=pt,off").amd_iommu_off


def test_only_on_turns_sme_on() -> None:
    assert [Cmdline.parse(f"mem_encrypt={value}").sme for value in ("on", "off", "active", "1")] == [
        True, False, False, False,
    ]  # fmt: skip


def test_words_with_quotes_and_modules() -> None:
    assert words('a="b c" d "e f=g h" i= -- j') == (("a", "b c"), ("d", None), ("e f", "g h"), ("i", ""))
    line = Cmdline.parse("kvm-amd.sev=0 kvm_amd.sev_es kvm.mmio_caching=1 foo.bar=1")
    assert line.module("kvm_amd") == (("sev", "0"), ("sev_es", None))
    assert line.module("kvm") == (("mmio_caching", "1"),)
    assert line.complaints == (), "a word with a dot is a module's"


@given(st.lists(st.sampled_from(["iommu", "=", "pt", ",", '"', " ", "amd_iommu=", "kvm_amd.", "--", "off", "x", "\t"])))
def test_no_command_line_is_an_error_and_each_is_read_by_its_words_alone(parts: list[str]) -> None:
    line = Cmdline.parse("".join(parts))
    again = Cmdline.parse(
        " ".join(_quoted(name) if value is None else f'{name}="{value}"' for name, value in line.words)
    )
    for name in ("no_iommu", "passthrough", "amd_iommu_off", "v2_tables", "sme"):
        assert getattr(line, name) == getattr(again, name)


def _quoted(word: str) -> str:
    return f'"{word}"' if word else '""'


def test_truth_values() -> None:
    true, false = ("y", "Y", "yes", "1", "on", "On", "true"), ("n", "N", "no", "0", "off", "oFF", "false")
    assert [boolean(text) for text in true] == [True] * len(true)
    assert [boolean(text) for text in false] == [False] * len(false)
    assert [boolean(text) for text in ("", "maybe", "2", "o", "auto")] == [None] * 5


def test_module_options() -> None:
    log: list[str] = []
    given = [("sev", "0"), ("sev", "1"), ("sev-es", None), ("nrips", "0x0"), ("bogus", "1")]
    values = load("kvm_amd", given, "mainline", log.append)
    assert values is not None
    assert (values["sev"], values["sev_es"], values["nrips"], values["debug_swap"]) == (True, True, 0, True)
    assert log == ["kvm_amd: unknown parameter 'bogus' ignored"]


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("kvm_amd", "sev_snp", "auto"),
        ("kvm_amd", "nrips", "yes"),
        ("ccp", "psp_cmd_timeout", "09"),
        ("kvm_amd", "nrips", None),
    ],
)
def test_a_bad_value_keeps_the_module_out(module: str, name: str, value: str | None) -> None:
    log: list[str] = []
    assert load(module, [(name, value)], "mainline", log.append) is None
    assert log == [f"{module}: `{value or ''}' invalid for parameter `{name}'"]


def test_numbers_and_texts() -> None:
    values = load("ccp", [("psp_cmd_timeout", "010"), ("init_ex_path", "/nv")], "mainline", lambda _: None)
    assert values == {"psp_cmd_timeout": 8, "psp_probe_timeout": 5, "init_ex_path": "/nv", "psp_init_on_probe": True}
    assert [shown(value) for value in (True, False, 5, "", "/nv")] == ["Y", "N", "5", "(null)", "/nv"]
