"""ASIDs: ranges by type, the lowest free one, the flush before they serve again, the misc cgroup."""

from __future__ import annotations

import errno

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from tests.host.sev_hosts import POLICY, SEV, SEV_ES, SNP, Host, refused

ES_ASIDS = 99
"""Milan with the BIOS's default: 1 to 99 for SEV-ES and SNP, 100 to 509 for SEV."""


def asids_of(host: Host) -> tuple[list[int], list[int]]:
    pool = host.kernel.kvm.asids
    return pool.taken.nonzero()[0].tolist(), pool.reclaimable.nonzero()[0].tolist()


def test_the_lowest_free_asid_is_given_out_and_used_ones_wait() -> None:
    host = Host()
    first, second = host.vm(SNP), host.vm(SEV_ES)
    first.init2()
    second.init2()
    first.close()
    third = host.vm(SNP)
    third.init2()
    assert third.vm.asid == 3
    assert asids_of(host) == ([1, 2, 3], [1])


def test_a_full_range_is_flushed_for_both_kinds_at_once() -> None:
    host = Host()
    guests = [host.vm(SNP) for _ in range(ES_ASIDS)]
    for guest in guests:
        guest.init2()
    plain = host.vm(SEV)
    plain.init2()
    last = host.vm(SNP)
    with refused(errno.EBUSY):
        last.init2()
    plain.close()
    with refused(errno.EBUSY):
        last.init2()
    assert asids_of(host)[1] == [100], "nothing in its own range to reclaim: no flush"
    guests[41].close()
    guests[7].close()
    last.init2()
    assert last.vm.asid == 8
    assert asids_of(host)[1] == []
    assert not host.kernel.kvm.asids.taken[100]
    again = host.vm(SNP)
    again.init2()
    assert again.vm.asid == 42


def test_a_recycled_asid_launches_a_guest_again() -> None:
    host = Host()
    guests = [host.vm(SNP) for _ in range(ES_ASIDS)]
    for guest in guests:
        guest.init2()
    guests[0].snp_start()
    guests[0].snp_finish()
    guests[0].close()
    vm = host.vm(SNP)
    vm.init2()
    assert vm.vm.asid == 1
    vm.snp_start(POLICY)


def test_a_flush_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    guests = [host.vm(SNP) for _ in range(ES_ASIDS)]
    for guest in guests:
        guest.init2()
    guests[3].close()
    before, vm = asids_of(host), host.vm(SNP)
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_DF_FLUSH, Status.WBINVD_REQUIRED)
        with refused(errno.EBUSY):
            vm.init2()
    assert asids_of(host) == before
    assert host.kernel.kvm.asids.charged == {"sev": 0, "sev_es": ES_ASIDS - 1}
    vm.init2()
    assert vm.vm.asid == 4


def test_the_flush_is_df_flush_where_snp_is_off() -> None:
    host = Host(modules={"kvm_amd": "sev_snp=0"})
    guests = [host.vm(SEV_ES) for _ in range(ES_ASIDS)]
    for guest in guests:
        guest.init2()
    guests[0].close()
    recorder = host.system.record()
    host.vm(SEV_ES).init2()
    names = [event.name for event in recorder.events if hasattr(event, "name")]
    assert "DF_FLUSH" in names
    assert "SNP_DF_FLUSH" not in names


def test_the_cgroup_is_charged_by_kind() -> None:
    host = Host()
    pool = host.kernel.kvm.asids
    pool.limits = {"sev": 1, "sev_es": 2}
    plain, es, snp = host.vm(SEV), host.vm(SEV_ES), host.vm(SNP)
    for vm in (plain, es, snp):
        vm.init2()
    assert pool.charged == {"sev": 1, "sev_es": 2}
    for kind in (SEV, SEV_ES, SNP):
        with refused(errno.EBUSY):
            host.vm(kind).init2()
    snp.close()
    assert pool.charged == {"sev": 1, "sev_es": 1}
    host.vm(SEV_ES).init2()


@pytest.mark.parametrize(("minimum", "kind"), [(1, SEV_ES), (1, SNP), (510, SEV)])
def test_a_range_that_the_bios_leaves_empty(minimum: int, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    pool = host.kernel.kvm.asids
    empty = range(1, 1) if kind != SEV else range(510, 510)
    monkeypatch.setattr(type(pool), "range_of", lambda self, es: empty)
    with refused(errno.ENOTTY):
        host.vm(kind).init2()


def test_what_ran_last_on_a_core_is_forgotten_with_the_asid() -> None:
    host = Host()
    one, two = host.vm(SNP), host.vm(SNP)
    one.init2()
    two.init2()
    last = host.kernel.kvm.last_vmcb
    last[0, 1] = last[3, 1] = last[0, 2] = 0x1000
    one.close()
    assert last == {(0, 2): 0x1000}


def test_a_guest_that_is_not_decommissioned_keeps_its_asid(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    vm = host.vm(SNP)
    vm.init2()
    vm.snp_start()
    gctx = vm.sev.gctx
    assert gctx is not None
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_DECOMMISSION, Status.INVALID_PLATFORM_STATE)
        vm.close()
    assert asids_of(host) == ([1], [])
    assert host.kernel.kvm.asids.charged["sev_es"] == 1
    assert gctx >> 12 in host.kernel.ccp.leaks.forgotten[0]
    assert host.system.machine.rmp.state(gctx >> 12).name == "CONTEXT"


def test_the_end_of_a_guest_writes_caches_back() -> None:
    host = Host()
    vm = host.vm(SEV)
    vm.init2()
    for core in host.system.machine.cores:
        core.wbinvd_done = False
    vm.close()
    assert all(core.wbinvd_done for core in host.system.machine.cores)
