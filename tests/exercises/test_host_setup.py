"""The exercises against numbers of real hosts, and every broken host: broken as it stands, whole with its remedy."""

import pytest

from snpbook.exercises.host_faults import FAULTS, HEALTHY, broken_hosts, diagnose, findings, verdict
from snpbook.exercises.host_setup import limit, missing
from snpbook.exercises.hosts import HostOptions
from snpbook.hardware.bios import BiosSetup
from tests.sampling import sampled


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_alone_breaks_a_host(name: str) -> None:
    fault = FAULTS[name]
    assert verdict(HostOptions().boot()) == HEALTHY
    assert verdict(HostOptions().changed(fault.setting, fault.value).boot()) != HEALTHY


@pytest.mark.parametrize("seed", sampled([f"seed {number}" for number in range(40)], 2))
def test_the_reference_heals_every_host_of_a_seed(seed: str) -> None:
    hosts = broken_hosts(seed)
    assert set(hosts) == set(FAULTS)
    for name, host in hosts.items():
        kernel = host.boot()
        assert verdict(kernel) != HEALTHY, name
        found = findings(kernel)
        setting, value = diagnose(found.dmesg, found.msrs, found.cpuid)
        assert verdict(host.changed(setting, value).boot()) == HEALTHY, (name, setting, value)


def test_seeds_differ_and_repeat() -> None:
    one, other = broken_hosts("a"), broken_hosts("b")
    assert one == broken_hosts("a")
    assert list(one) != list(other)
    assert {host.cmdline for host in one.values()} != {host.cmdline for host in other.values()}


def test_a_fault_has_no_second_remedy_by_another_option() -> None:
    """What heals one host leaves all others as they are: naming the wrong cause does not help."""
    remedies = [("bios.smee", True), ("bios.nbio_snp", True), ("kvm_amd.sev_snp", 1), ("kernel.iommu", None)]
    for name, fault in FAULTS.items():
        host = HostOptions().changed(fault.setting, fault.value)
        for setting, value in remedies:
            if setting != fault.setting:
                assert verdict(host.changed(setting, value).boot()) != HEALTHY, (name, setting)


def test_changes() -> None:
    host = HostOptions(cmdline="ro iommu=pt kvm_amd.sev=0 quiet", modules={"kvm_amd": "sev=1 npt=0"})
    assert host.changed("kernel.iommu", None).cmdline == "ro kvm_amd.sev=0 quiet"
    assert host.changed("kernel.iommu", "nopt").cmdline == "ro kvm_amd.sev=0 quiet iommu=nopt"
    changed = host.changed("kvm_amd.sev", True)
    assert (changed.cmdline, changed.modules["kvm_amd"]) == ("ro iommu=pt quiet", "npt=0 sev=1")
    assert host.changed("bios.min_sev_asid", 7).bios == BiosSetup(min_sev_asid=7)
    for setting in ("smee", "bios.sme", "kvm_amd.snp", "kernel.", "", "vfio.x"):
        with pytest.raises(ValueError, match="is no setting"):
            host.changed(setting, True)


def test_the_size_of_published_tables() -> None:
    """The README of AMDSEV (257.5 GB are covered) and a log of a host with 129.5 GB covered."""
    assert missing(0x35600000, 0x75BFFFFF, 0x405FC00 << 12) == 0
    assert missing(0x35600000, 0x75BFFFFF, 0x405FC01 << 12) == 16
    assert missing(0x88900000, 0xA8EFFFFF, 0x205FC00 << 12) == 0
    assert missing(0x88900000, 0xA8EFFFFF, (0x205FC00 << 12) + (1 << 30)) == (1 << 30) // 256


def test_limits() -> None:
    assert [limit(410, 99, 509), limit(0, 509, 509), limit(509, 0, 509), limit(400, 110, 509)] == [100, 510, 1, 0]
