"""The driver when it is loaded: the device, the firmware's version, and another firmware from the disk."""

from __future__ import annotations

import errno

import pytest

from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp import Parameters
from snpbook.host.kernel import Kernel
from snpbook.spec.bring_up import BRING_UP
from snpbook.spec.msr import Msr
from snpbook.spec.releases import release
from snpbook.vendor.images import firmware_image
from tests.host.sev_device import (
    COMMIT,
    DEVICE,
    MARK,
    Host,
    down,
    fails,
)


def test_a_processor_that_does_not_answer_leaves_no_device() -> None:
    host = Host(boot=False)
    host.board.machine.mailbox._processor = None
    host.boot()
    assert f"{DEVICE}sev command 0x4 timed out, disabling PSP" in host.kernel.log.lines
    assert f"{DEVICE}SEV: failed to get status. Error: 0x0" in host.kernel.log.lines
    assert host.issue(COMMIT) == (errno.ENODEV, MARK)
    with fails(errno.ENODEV):
        host.ccp.platform_init()


NAMES = ("amd/amd_sev_fam19h_model01h.sbin", "amd/amd_sev_fam19h_model0xh.sbin", "amd/sev.fw")


@pytest.mark.parametrize("name", NAMES)
def test_firmware_from_the_disk(name: str) -> None:
    host = Host(boot=False)
    image = firmware_image("milan", release("1.58"), build=65, svn=host.board.psp.committed_tcb.snp)
    for each in NAMES[NAMES.index(name) + 1 :]:
        host.ccp.disk[f"/lib/firmware/{each}"] = b"not this one"
    host.ccp.disk[f"/lib/firmware/{name}"] = image
    host.boot()
    assert host.commands()[:3] == ["PLATFORM_STATUS", "DOWNLOAD_FIRMWARE", "PLATFORM_STATUS"]
    assert f"{DEVICE}SEV firmware updated from 1.55.29 to {host.board.psp.release}" in host.kernel.log.lines
    assert host.ccp.version[2] == 65


def test_firmware_that_is_no_good_is_silently_left_alone() -> None:
    host = Host(boot=False)
    host.ccp.disk["/lib/firmware/amd/sev.fw"] = b"no firmware"
    host.boot()
    assert host.commands()[:3] == ["PLATFORM_STATUS", "DOWNLOAD_FIRMWARE", "SNP_INIT_EX"]
    assert host.ccp.snp_initialised


def test_old_firmware_takes_an_image_twice_and_the_oldest_none() -> None:
    for version, times in (((1, 50, 1), 1), ((1, 49, 1), 2), ((0, 14, 1), 0)):
        host = Host(boot=False)
        image = firmware_image("milan", release("1.58"), build=65, svn=host.board.psp.committed_tcb.snp)
        host.ccp.disk["/lib/firmware/amd/sev.fw"] = image
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(host.ccp), "read_version", lambda self, version=version: version)
            host.ccp.probe(Parameters(), BRING_UP["mainline"])
        assert host.commands() == ["DOWNLOAD_FIRMWARE"] * times


def test_a_second_kernel_after_a_shutdown() -> None:
    host = Host()
    host.ccp.shutdown()
    second = Kernel(HostCpu(host.board.machine))
    second.boot("mainline")
    assert second.ccp.snp_initialised


def test_vm_hsave_pa_is_cleared_on_all_cores() -> None:
    host = down()
    for core in host.board.machine.cores:
        core.wrmsr(Msr.VM_HSAVE_PA, 0x100_0000)
    host.ccp.platform_init()
    assert [core.rdmsr(Msr.VM_HSAVE_PA) for core in host.board.machine.cores] == [0, 0]
