"""The checklist against hosts with one known fault each: which row fails, which are skipped, what is to be done."""

from __future__ import annotations

import pytest

from snpbook.exercises.host_faults import FAULTS
from snpbook.exercises.hosts import HostOptions
from snpbook.hardware.bios import BiosSetup
from snpbook.host.checklist import ROWS, Item, State, checklist
from snpbook.host.kernel import Kernel
from snpbook.spec.msr import Msr

FIRST = {
    "encryption off": ("Memory encryption", "SMEE"),
    "SMM open": ("System management mode locked", "SMM Lock"),
    "no table": ("Memory reserved for the RMP", "SNP Memory Coverage"),
    "short table": ("RMP covers all memory", "SNP Memory Coverage"),
    "crooked table": ("RMP in steps of 1 MB", "multiple of 1 MB"),
    "no ASIDs": ("ASIDs for SEV-ES and SEV-SNP", "ASID space limit"),
    "no IOMMU": ("IOMMU running", "BIOS: IOMMU"),
    "IOMMU without SNP": ("IOMMU can enforce the RMP", "SEV-SNP Support"),
    "passthrough": ("Devices translated, not passed through", "iommu=pt"),
    "IOMMU off": ("IOMMU running", "without iommu=off"),
    "AMD IOMMU off": ("IOMMU running", "without amd_iommu=off"),
    "V2 tables": ("IOMMU with V1 page tables", "pgtbl_v2"),
    "no nested paging": ("SEV enabled in KVM", "npt=1"),
    "SEV not wanted": ("SEV enabled in KVM", "sev=1"),
    "SEV-ES not wanted": ("SEV-ES enabled in KVM", "sev_es=1"),
    "SNP not wanted": ("SEV-SNP enabled in KVM", "sev_snp=1"),
    "bad value": ("kvm_amd loaded", "`auto' invalid for parameter `sev_snp'"),
}


def failed(items: tuple[Item, ...]) -> list[Item]:
    return [item for item in items if item.state is State.FAIL]


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_row_that_fails_names_the_remedy(name: str) -> None:
    fault = FAULTS[name]
    first = failed(checklist(HostOptions().changed(fault.setting, fault.value).boot()))[0]
    row, remedy = FIRST[name]
    assert first.name == row
    assert remedy in first.remedy
    assert first.why


def test_a_good_host_passes_everything() -> None:
    for product in ("milan", "genoa"):
        items = checklist(HostOptions(product).boot())
        assert [item.state for item in items] == [State.PASS] * len(ROWS)
        assert not any(item.remedy or item.why for item in items)


def test_a_rome_is_asked_for_sev_and_sev_es_alone() -> None:
    items = {item.name: item.state for item in checklist(HostOptions("rome").boot())}
    assert items["SEV-SNP in the processor"] is State.FAIL
    assert items["SEV-ES enabled in KVM"] is State.PASS
    assert items["SEV-SNP enabled in KVM"] is State.SKIP
    assert sum(state is State.FAIL for state in items.values()) == 1


def test_rows_below_a_failure_are_skipped_and_consequences_say_so() -> None:
    items = checklist(HostOptions(bios=BiosSetup(smee=False)).boot())
    assert next(item.name for item in items if item.state is State.SKIP) == "System management mode locked"
    assert {item.remedy for item in failed(items)[1:]} == {"see the rows above"}


def test_the_form_is_snphosts() -> None:
    """`[ PASS ] - name: message`, two blanks for each level (virtee/snphost, src/ok.rs)."""
    items = checklist(HostOptions().boot())
    assert str(items[0]) == "[ PASS ] - SEV-SNP in the processor: 8000_001F EAX 0x101fd3f"
    assert str(items[4]).startswith("[ PASS ]     - RMP covers all memory: ")


def test_one_core_that_differs_is_named() -> None:
    kernel: Kernel = HostOptions().boot()
    kernel.cpu._machine.cores[1].set_by_bios({Msr.HWCR: 0})
    first = failed(checklist(kernel))[0]
    assert (first.name, first.found) == ("System management mode locked", "HWCR 0x0 on core 1")
