"""The launch lab, driven from Python: the stepper's log is the trace, digests are an owner's, guesses are judged."""

from __future__ import annotations

import pytest

from snpbook.attest.measure import snp_digest, vmsa_pages
from snpbook.exercises.launches import CHANGES, Launch, LaunchOptions, parting
from snpbook.host.refusal import KernelError
from snpbook.labs.launch import FILES, Lab
from snpbook.spec.launch import kernel_hash_table
from snpbook.system import sample_image
from snpbook.views.command_line import taken_apart
from snpbook.views.launch_steps import lines
from snpbook.widgets.launch_stepper import LaunchStepper
from snpbook.widgets.parting_desk import ASK, NOWHERE, PartingDesk
from snpbook.widgets.policy_builder import PolicyBuilder


@pytest.fixture(scope="module")
def stepper() -> LaunchStepper:
    return LaunchStepper()


def test_the_digest_at_the_end_is_the_owners(stepper: LaunchStepper) -> None:
    stepper.show(kind="snp", era="mainline", vcpus=2, hashes=True)
    hashes = kernel_hash_table(b"a kernel", b"an initrd", "console=ttyS0")
    image, links = sample_image(), stepper.launch.links
    expected = snp_digest(image, vmsa_pages(image, 2, 0xA00F11), kernel_hashes=hashes)
    assert links[-1].digest == expected
    assert [link.pages for link in links] == [16, 9, 3, 1, 1, 1, 1, 15, 1, 1]
    stepper.show(step=len(stepper.launch.calls))
    assert expected.hex() in stepper.describe()


def test_calls_hold_what_happened_inside(stepper: LaunchStepper) -> None:
    stepper.show(kind="snp", era="mainline", vcpus=2, step=1)
    stepper.find("SNP_LAUNCH_START")
    found = [(line.depth, line.party, line.what.split("(")[0].split()[0]) for line in lines(
        stepper.launch.calls[stepper.step.value - 1])]  # fmt: skip
    assert found == [
        (0, "VMM", "KVM_MEMORY_ENCRYPT_OP:"), (1, "kernel", "RMPUPDATE"), (1, "CCP", "SNP_GCTX_CREATE"),
        (2, "AMD-SP", "SNP_GCTX_CREATE"), (3, "RMP", "FIRMWARE"), (1, "CCP", "SNP_LAUNCH_START"),
        (2, "AMD-SP", "SNP_LAUNCH_START"), (1, "CCP", "SNP_ACTIVATE"), (2, "AMD-SP", "SNP_ACTIVATE"),
    ]  # fmt: skip
    text = stepper.find("SNP_LAUNCH_UPDATE").text
    assert "PRE_GUEST to GUEST_VALID \u00d7 16" in text
    assert stepper.tree.static().text == text


def test_buttons(stepper: LaunchStepper) -> None:
    stepper.show(kind="snp", era="mainline", step=1)
    stepper.next.click()
    stepper.next.click()
    assert stepper.step.value == 3
    stepper.back.click()
    assert stepper.step.value == 2
    seen = []
    for _ in range(10):
        stepper.measured.click()
        seen.append(stepper.step.value)
    assert len(set(seen)) == 9, "eight ranges and the end"
    assert stepper.step.value == len(stepper.launch.calls)
    stepper.next.click()
    assert stepper.step.value == len(stepper.launch.calls)
    with pytest.raises(ValueError, match="no call 'INIT2'"):
        stepper.find("INIT2")


@pytest.mark.parametrize("kind", ["plain", "sev", "sev-es"])
def test_other_guests_have_no_chain(stepper: LaunchStepper, kind: str) -> None:
    stepper.show(kind=kind, era="mainline")
    assert stepper.launch.links == []
    assert ("one SHA-256" if kind != "plain" else "is not measured") in stepper.describe()
    stepper.show(step=stepper.step.max)
    vmm = stepper.launch.vmm
    assert vmm
    assert bool(vmm.measurement) is (kind != "plain")
    assert vmm.measurement[:32].hex() in stepper.describe()


def test_a_launch_that_fails_says_why() -> None:
    failed = Launch(LaunchOptions(properties={"policy": 0}))
    assert isinstance(failed.failure, KernelError)
    assert "refused" in repr(failed)
    assert failed.digest == b""


def test_policies() -> None:
    builder = PolicyBuilder()
    assert builder.value == 0x30000
    assert "accepted" in builder.describe()
    assert builder.build(abi_minor=51, debug=True).text.startswith("Policy 0xb0033")
    for change, verdict in (
        ({"debug": False, "one": False}, "KVM refuses"),
        ({"one": True, "single_socket": True}, "KVM refuses"),
        ({"single_socket": False, "abi_major": 200}, "the firmware refuses"),
    ):
        assert verdict in builder.build(**change).text
    assert builder.build(kind="SEV, SEV-ES").text.startswith("Policy 0x1\n")
    assert "accepted: the guest's LAUNCH_START succeeds (sev-es)" in builder.build(es=True).text


def test_a_guess_comes_first() -> None:
    desk = PartingDesk()
    desk.button.click()
    assert desk.describe().startswith("Guess first")
    assert desk.intended.digest.hex() not in desk.static().html
    verdict = desk.predict("a third vCPU", "VMSA of vCPU 1")
    assert verdict.text.startswith("Not so: with a third vCPU, they part at: VMSA of vCPU 2.")
    assert desk.intended.digest.hex() in verdict.html
    desk.change.value = "more memory"
    assert desk.guess.value == ASK
    assert desk.describe().startswith("Guess first"), "another change asks again"
    assert desk.predict("more memory", NOWHERE).text.startswith("Right")


def test_where_changes_part() -> None:
    """By hand, from the order of the chain."""
    expected = {
        "a third vCPU": "VMSA of vCPU 2",
        "another command line": "kernel hashes",
        "features: debug-swap=on": "VMSA of vCPU 0",
        "the host swaps two sections": "memory at 0x80a000",
        "another vCPU model": "VMSA of vCPU 0",
        "no kernel hashes": "kernel hashes",
        "another policy": "nowhere",
        "other host data": "nowhere",
        "more memory": "nowhere",
    }
    meant = Launch(LaunchOptions())
    assert {name: parting(meant, Launch(change)) for name, change in CHANGES.items()} == expected


def test_the_lab() -> None:
    lab = Lab()
    line = (
        "qemu-system-x86_64 -machine q35,confidential-guest-support=s -cpu EPYC-Milan -m 12M -bios sample.fd "
        "-object sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1,kernel-hashes=on -kernel vmlinuz"
    )
    first = lab.start(line)
    again = lab.start(line.replace("-m 12M", "-m 16M"))
    assert lab.system.guests == [again]
    assert first.vmm.process is not again.vmm.process
    assert lab.complaint(line) == ""
    assert "colour" in lab.complaint(line.replace("cbitpos", "colour"))
    assert "cbitpos=51" in lab.command_line(again)
    assert set(FILES) == {"sample.fd", "vmlinuz", "initrd.img"}
    rows = taken_apart(line + " -device virtio-blk-pci").text.splitlines()
    assert any("kernel-hashes" in row and "ZERO page" in row for row in rows)
    assert any("not part of the model" in row for row in rows)
