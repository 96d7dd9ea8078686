"""The differences of two products: every pair, both ways."""

from dataclasses import replace
from itertools import permutations

import pytest

from snpbook.spec.products import product, product_names
from snpbook.views.products import comparison, cpuid_differences, differences


@pytest.mark.parametrize(("left", "right"), [*permutations(["naples", "rome", "milan", "genoa", "turin"], 2)])
def test_pairs_mirror_each_other(left: str, right: str) -> None:
    for function in (differences, cpuid_differences):
        there, back = function(product(left), product(right)), function(product(right), product(left))
        assert there == [(name, mine, other) for name, other, mine in back]
        assert there
        assert all(mine != other for _, mine, other in there)


def test_a_product_does_not_differ_from_itself() -> None:
    for name in product_names():
        assert differences(product(name), product(name)) == cpuid_differences(product(name), product(name)) == []


def test_milan_and_genoa() -> None:
    rows = {name: (left, right) for name, left, right in differences(product("milan"), product("genoa"))}
    assert rows == {
        "signature": ("0x00a00f11", "0x00a10f11"),
        "physical_bits": ("48", "52"),
        "address_reduction": ("5", "6"),
        "linear_bits": ("48", "57"),
        "asid_limit": ("509", "1006"),
        "encryption": ("xex-aes-128", "xts-aes-256"),
        "RMPQUERY": ("no", "yes"),
        "firmware": ("1.55.29", "1.55.40"),
        "tcb": ("bl 4 tee 0 snp 24 ucode 0xdb", "bl 10 tee 0 snp 23 ucode 0x54"),
        "memory": ("8 channels, 3200 MT/s, 204.8 GB/s", "12 channels, 4800 MT/s, 460.8 GB/s"),
        "memory.max_tib": ("4 TiB", "6 TiB"),
        "tsc_factor": ("200 ?", "200"),
        "PAGE_FLUSH_MSR": ("yes", "no"),
        **dict.fromkeys(
            [
                "VMPL_SSS", "TSC_AUX_VIRTUALIZATION", "VMGEXIT_PARAMETER", "VIRTUAL_TOM_MSR", "IBS_VIRTUALIZATION",
                "SMT_PROTECTION",
            ],
            ("no", "yes"),
        ),
    }  # fmt: skip


def test_one_setting_is_one_row() -> None:
    milan = product("milan")
    other = replace(milan, min_sev_asid=128)
    assert differences(milan, other) == [("min_sev_asid", "100", "128")]
    assert cpuid_differences(milan, other) == [
        ("8000001F.0", "0101FD3F 00004173 000001FD 00000064", "0101FD3F 00004173 000001FD 00000080")
    ]


def test_table() -> None:
    text = repr(comparison(product("naples"), product("rome")))
    assert text.startswith("EPYC 7001 (Naples) and EPYC 7002 (Rome)\nproperty")
    assert text.endswith("? unconfirmed: no source states it")
    assert "EPYC 7002 (Rome)" in comparison(product("naples"), product("rome"))._repr_html_()
