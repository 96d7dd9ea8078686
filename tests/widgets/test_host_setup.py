"""The set-up desk, driven from Python: each field reaches the machine, and what cannot be is told."""

from __future__ import annotations

import pytest

from snpbook.labs.host_setup import Lab
from snpbook.spec.msr import Msr
from snpbook.widgets.host_setup import HostDesk


@pytest.fixture(scope="module")
def desk() -> HostDesk:
    return HostDesk()


def test_it_begins_with_a_host_that_is_ready(desk: HostDesk) -> None:
    fresh = HostDesk()
    assert "SEV-SNP enabled (ASIDs 1 - 99)" in fresh.describe()
    assert "17 PASS" in fresh.describe()
    assert "FAIL" not in fresh.describe()


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("smee", False, "memory encryption not enabled by BIOS"),
        ("smm_lock", False, "memory encryption not enabled by BIOS"),
        ("coverage", "none", "has not been reserved by BIOS"),
        ("iommu", False, "SEV-SNP disabled (ASIDs 1 - 99)"),
        ("nbio_snp", False, "IOMMU SNP feature not enabled"),
        ("limit", 1, "SEV-ES disabled (ASIDs 0 - 0)"),
        ("limit", 33, "SEV-SNP enabled (ASIDs 1 - 32)"),
        ("rmp_base", "0x40002000", "SNP_INIT_EX failed rc -5, error 0x3"),
        ("cmdline", "iommu=pt", "configured in passthrough mode"),
        ("kvm_amd", "sev_snp=auto", "`auto' invalid for parameter `sev_snp'"),
        ("product", "rome", "SEV-ES enabled (ASIDs 1 - 99)"),
        ("era", "rfc-v7", "SEV-ES and SEV-SNP supported: 99 ASIDs"),
    ],
)
def test_a_field_reaches_the_host(desk: HostDesk, field: str, value: object, line: str) -> None:
    before = getattr(desk, field).value
    limit = desk.limit.value
    assert line in desk.boot(**{field: value}).text
    assert line in desk.describe()
    assert line.replace("'", "&#x27;") in desk.static().html
    desk.boot(**{field: before})
    desk.limit.value = limit


def test_custom_coverage(desk: HostDesk) -> None:
    assert "(expected 0x1804000 got 0x900000)" in desk.boot(coverage="custom", covered="2 GiB").text
    assert "RMP covers all memory" in desk.checks.static().text
    desk.boot(coverage="all memory")


def test_the_limit_follows_the_processor(desk: HostDesk) -> None:
    desk.boot(product="naples")
    assert (desk.limit.value, desk.limit.max) == (5, 16)
    desk.boot(product="milan")
    assert (desk.limit.value, desk.limit.max) == (100, 510)


def test_what_cannot_be_is_told_and_the_host_stays(desk: HostDesk) -> None:
    kernel = desk.kernel
    for field, value, told in [("rmp_base", "here", "is no address"), ("rmp_base", "0x1001", "multiple of 0x2000")]:
        getattr(desk, field).value = value
        desk.button.click()
        assert told in desk.told.value
        assert desk.kernel is kernel
        with pytest.raises(ValueError, match=told):
            desk.boot()
    desk.rmp_base.value = ""
    desk.button.click()
    assert desk.told.value == ""
    assert desk.kernel is not kernel


def test_the_lab_looks_at_the_desks_host() -> None:
    lab = Lab()
    assert lab.verdict() == "sev_snp reads Y, the firmware is up"
    assert lab.cat("/sys/fs/cgroup/misc.capacity") == "sev 410\nsev_es 99"
    lab.desk.boot(smee=False)
    assert "0x0000000000740000" in lab.msrs().text
    assert "00000064" in lab.cpuid().text
    assert lab.create_vm() == "EINVAL"
    assert lab.checklist().text.count("[ FAIL ]") == 3
    found = lab.broken(1)
    assert found.dmesg[0].startswith("Kernel command line: ")
    assert found.msrs[Msr.SYSCFG.name]
