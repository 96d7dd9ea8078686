"""QEMU command lines: read, refused in QEMU's words, printed and read again, made into guests."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.host.vmm import keyval
from snpbook.host.vmm.command_line import options_of, printed, read
from snpbook.host.vmm.configuration import VmmError
from snpbook.host.vmm.guest import DirectBoot, GuestKind, Vmm
from snpbook.host.vmm.properties import default_object
from snpbook.spec.image import ImageError
from snpbook.system import sample_image
from tests.host.test_vmm_order import host
from tests.machines import MIB

SEV = "-machine q35,confidential-guest-support=sev0 -object sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1"
SNP = (
    "-machine q35,confidential-guest-support=sev0,memory-backend=ram1 -object memory-backend-memfd,id=ram1,size=2G,"
    "share=true,prealloc=false -object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1"
)
REST = " -cpu EPYC-v4 -smp 4 -m 2G -bios OVMF.fd"


def b64(size: int) -> str:
    return b64encode(bytes(size)).decode()


# Read.


def test_the_command_lines_of_the_three_kinds() -> None:
    sev, es, snp = read(SEV + REST), read(f"{SEV},policy=0x5{REST}"), read(SNP + REST)
    assert [one.sev.kind for one in (sev, es, snp) if one.sev] == [GuestKind.SEV, GuestKind.SEV_ES, GuestKind.SNP]
    assert [one.sev.policy for one in (sev, es, snp) if one.sev] == [1, 5, 0x30000]
    assert (snp.memory, snp.vcpus, snp.cpu, snp.firmware) == (2048 * MIB, 4, "EPYC-v4", "OVMF.fd")
    assert not snp.not_modelled


@pytest.mark.parametrize("memory", ["", " -m slots=2", " -m 2G"])
def test_without_m_the_size_is_the_backends(memory: str) -> None:
    assert read(f"{SNP} -cpu EPYC-v4 -bios O{memory}").memory == 2048 * MIB


def test_without_m_and_backend_there_are_128_mib() -> None:
    assert read("-cpu EPYC -bios O").memory == 128 * MIB


def test_a_long_one() -> None:
    """As AMD's script prints it: devices are passed over by name, lines end in backslashes."""
    text = """/usr/local/bin/qemu-system-x86_64 \\
      -enable-kvm -nographic -cpu EPYC-v4,+pcid -machine q35,vmport=off -smp 4,maxcpus=255 \\
      -m 2048M,slots=5,maxmem=10240M -no-reboot -drive if=pflash,format=raw,unit=0,file=/x/OVMF_CODE.fd,readonly=on \\
      -drive if=pflash,format=raw,unit=1,file=g.fd -netdev user,id=vmnic -device e1000,netdev=vmnic,romfile= \\
      -machine memory-encryption=sev0,vmport=off -kernel /boot/vmlinuz -append "root=/dev/sda1 a,b" -initrd /boot/i \\
      -object sev-snp-guest,id=sev0,policy=0x30000,cbitpos=51,reduced-phys-bits=1,kernel-hashes=on -monitor pty disk.img
    """
    found = read(text)
    assert (found.memory, found.vcpus, found.firmware) == (2048 * MIB, 4, "/x/OVMF_CODE.fd")
    assert (found.kernel, found.initrd, found.append) == ("/boot/vmlinuz", "/boot/i", "root=/dev/sda1 a,b")
    assert found.sev
    assert found.sev.kernel_hashes
    named = [each.split()[0] for each in found.not_modelled]
    assert named == ["-nographic", "-cpu", "-no-reboot", "-drive", "-netdev", "-device", "-monitor", "-hda"]


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), st.text(max_size=6), max_size=5))
def test_keys_and_values_survive(values: dict[str, str]) -> None:
    assert keyval.split(keyval.join(values)) == values


def test_the_syntax() -> None:
    assert keyval.split("q35,a=1,,2,a=3,b=", "type") == {"type": "q35", "a": "3", "b": ""}
    assert keyval.split("x,,y,z=,,", "type") == {"type": "x,y", "z": ","}
    for text, message in (("a", "Expected '=' after parameter 'a'"), ("1a=2", "Invalid parameter '1a'")):
        with pytest.raises(VmmError, match=message):
            keyval.split(text)
    assert [keyval.size("size", text, "M") for text in ("3", "3k", "3G", "3B")] == [3 << 20, 3 << 10, 3 << 30, 3]


# Refused.

BAD = [
    (f"{SNP}{REST} -fast", "-fast: invalid option"),
    (f"{SNP}{REST} -kernel", "-kernel: requires an argument"),
    (f"{SNP},foo=1{REST}", "Parameter 'foo' is unexpected"),
    (f"{SNP},dh-cert-file=x{REST}", "Parameter 'dh-cert-file' is unexpected"),
    (f"{SEV},host-data={b64(32)}{REST}", "Parameter 'host-data' is unexpected"),
    (f"{SEV},vcek-disabled=on{REST}", "Parameter 'vcek-disabled' is unexpected"),
    (f"{SNP},policy=yes{REST}", "Parameter 'policy' expects integer"),
    (f"{SEV},handle=4294967296{REST}", "Parameter 'handle' expects uint32_t"),
    (f"{SNP},kernel-hashes=yes{REST}", "Parameter 'kernel-hashes' expects 'on' or 'off'"),
    (f"{SNP},discard=one{REST}", "Parameter 'discard' expects 'both' or 'none'"),
    (f"{SNP},id-block={b64(95)}{REST}", "parameter length of 95 not equal to 96"),
    (f"{SNP},id-block={b64(97)}{REST}", "parameter length of 97 not equal to 96"),
    (f"{SNP},id-auth={b64(4097)}{REST}", "parameter length of 4097 exceeds max of 4096"),
    (f"{SNP},host-data={b64(31)}{REST}", "parameter length of 31 not equal to 32"),
    (f"{SNP},guest-visible-workarounds={b64(17)}{REST}", "parameter length of 17 exceeds max of 16"),
    (f"{SNP},host-data=a_b{REST}", "Base64 data 'a_b' is not valid"),
    (f"{SNP},upm-mode=off{REST}", "an SNP guest has no memory without private memory"),
    (f"-machine q35 -object sev-guest,cbitpos=51{REST}", "Parameter 'id' is missing"),
    (f"-machine q35 -object sev-guest,id=a,cbitpos=51{REST}", "Parameter 'reduced-phys-bits' is missing"),
    (f"-machine q35 -object tdx-guest,id=a{REST}", "Parameter 'qom-type' does not accept value 'tdx-guest'"),
    (f"-object id=a{REST}", "Parameter 'qom-type' is missing"),
    (f"-object memory-backend-ram,id=a{REST}", "Parameter 'size' is missing"),
    (f"{SEV} -object sev-guest,id=sev0,reduced-phys-bits=1{REST}", "attempt to add duplicate property 'sev0'"),
    (f"-machine q35,confidential-guest-support=sev1{REST}", "Device 'sev1' not found"),
    (f"-machine q35,memory-backend=ram1{REST}", "Memory backend 'ram1' not found"),
    (f"{SNP} -cpu EPYC-v4 -m 1G -bios O", "Size specified by -m option must match size of explicitly specified"),
    (f"-machine q35,speed=9{REST}", "Property 'q35-machine.speed' not found"),
    (f"-machine microvm{REST}", "unsupported machine type"),
    (f"-machine q35,accel=tcg{REST}", "invalid accelerator tcg"),
    (f"-machine q35,kernel_irqchip=off{SEV.removeprefix('-machine q35')},policy=5{REST}", "require in-kernel irqchip"),
    (f"-machine q35,smm=on{SNP.removeprefix('-machine q35')}{REST}", "SEV-SNP does not support SMM"),
    (f"-machine q35,smm=on{SEV.removeprefix('-machine q35')},policy=5{REST}", "System Management Mode not supported"),
    ("-cpu EPYC-v9 -bios O", "unable to find CPU model 'EPYC-v9'"),
    ("-cpu EPYC -smp 0 -bios O", "CPU topology parameters must be greater than zero"),
    ("-cpu EPYC -smp 4,cores=3 -bios O", "product of the hierarchy must match maxcpus: 3 != 4"),
    ("-cpu EPYC -smp 4,maxcpus=2 -bios O", "maxcpus must be equal to or greater than smp"),
    ("-cpu EPYC -smp x -bios O", "Parameter 'cpus' expects integer"),
    ("-cpu EPYC -smp 2,hands=1 -bios O", "Parameter 'hands' is unexpected"),
    ("-cpu EPYC -m much -bios O", "Parameter 'size' expects a size value"),
    ("-cpu EPYC -m 1G,speed=1 -bios O", "Invalid parameter 'speed'"),
    ("-cpu EPYC -bios O -append 'x", "No closing quotation"),
    ("-cpu EPYC -bios O -append x", "-append only allowed with -kernel option"),
    ("-cpu EPYC -bios O -initrd x", "-initrd only allowed with -kernel option"),
    ("-cpu EPYC", "QEMU's SeaBIOS is not modelled"),
    ("-bios O", "qemu64 is not modelled"),
    ("-cpu EPYC -drive if=pflash,unit=0", "no file"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_command_lines(text: str, message: str) -> None:
    with pytest.raises(VmmError, match=r"^qemu-system-x86_64: ") as caught:
        read(text)
    assert message in str(caught.value)


REFUSED_HERE = [
    ("mainline", "cbitpos=47", "cbitpos check failed, host '51' requested '47'"),
    ("mainline", "reduced-phys-bits=0", "it should be in the range of 1 to 63, requested '0'"),
    ("mainline", "reduced-phys-bits=64", "it should be in the range of 1 to 63, requested '64'"),
    ("mainline", "upm-mode=on", "Property 'sev-snp-guest.upm-mode' not found"),
    ("mainline", "init-flags=1", "Property 'sev-snp-guest.init-flags' not found"),
    ("rfc-v7", "vcek-disabled=on", "Property 'sev-snp-guest.vcek-disabled' not found"),
]


@pytest.mark.parametrize(("era", "more", "message"), REFUSED_HERE)
def test_what_a_host_belies(era: str, more: str, message: str) -> None:
    system = host(era)
    free = system.host.memory.free
    text = SNP.replace("2G", "12M") + f",{more} -cpu EPYC-Milan -m 12M -bios sample.fd"
    with pytest.raises(VmmError) as caught:
        system.qemu(text)
    assert message in str(caught.value)
    assert system.host.memory.free == free


def test_files_that_are_not_there() -> None:
    system, rest = host(), " -cpu EPYC-Milan -m 12M"
    for text, message in (
        (f"{SEV}{rest} -bios a.fd", "could not load PC BIOS 'a.fd'"),
        (f"{SEV}{rest} -bios sample.fd -kernel k", "could not open kernel file 'k': No such file or directory"),
        (f"{SEV},session-file=s{rest} -bios sample.fd", "failed to read 's' (No such file or directory)"),
        (f"{SEV},sev-device=/dev/null{rest} -bios sample.fd", "Failed to open /dev/null 'No such file or directory'"),
    ):
        with pytest.raises((VmmError, OSError)) as caught:
            system.qemu(text)
        assert message in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))


def test_contradictions_in_python() -> None:
    kernel, image = host().host, sample_image()
    size: dict[str, Any] = {"memory": 12 * MIB, "vcpus": 1, "vcpu_signature": 0xA00F11}
    with pytest.raises(VmmError, match="a sev guest with the properties of a snp guest"):
        Vmm(kernel, image, **size, kind=GuestKind.SEV, sev=default_object(GuestKind.SNP))
    for kind, properties, message in (
        (GuestKind.SEV, {"policy": 5}, "bit 2"),
        (GuestKind.SEV_ES, {"policy": 1}, "bit 2"),
        (GuestKind.SEV, {"id_block": bytes(96)}, "Property 'sev-guest.id-block' not found"),
        (GuestKind.SNP, {"legacy_vm_type": True}, "Property 'sev-snp-guest.legacy-vm-type' not found"),
        (GuestKind.SNP, {"speed": 1}, "speed: one of"),
        (GuestKind.PLAIN, {"policy": 1}, "a plain guest has no sev-guest object"),
    ):
        with pytest.raises(VmmError, match=message):
            default_object(kind, **properties)
    for change, error in (({"vcpus": 0}, VmmError), ({"memory": 12 * MIB + 1}, VmmError), ({"memory": MIB}, VmmError)):
        with pytest.raises(error):
            Vmm(kernel, image, **{**size, **change})
    bare = type(image)(image.data, image.table, image.metadata[:2])
    with pytest.raises(ImageError, match="no section for kernel hashes"):
        Vmm(kernel, bare, **size, boot=DirectBoot(b"k"))


# Made, and printed.


@pytest.mark.parametrize("era", ["mainline", "rfc-v7"])
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("plain", {}),
        ("sev", {"policy": 3}),
        ("sev-es", {}),
        ("snp", {"host_data": bytes(range(32)), "policy": 0xB0000, "discard": False, "id_auth": b"x" * 100}),
    ],
)
def test_a_guest_prints_a_line_that_builds_it_again(era: str, kind: str, given: dict[str, Any]) -> None:
    system = host(era)
    boot = DirectBoot(b"k", b"i", "console=ttyS0 a,b 'c d'")
    guest = system.create_vm(kind=kind, memory="12 MiB", vcpus=3, boot=boot, **given)
    wanted = options_of(guest.vmm)
    text = printed(wanted, system.host)
    assert read(text) == wanted
    guest.vmm.close()
    files = {"OVMF.fd": sample_image().data, "vmlinuz": b"k", "initrd.img": b"i"}
    again = system.qemu(text, files)
    assert options_of(again.vmm) == wanted
    assert again.vmm.discard is given.get("discard", True)
    again.launch()


def test_a_guest_that_waits() -> None:
    guest = host().qemu(f"{SEV} -cpu host -m 12M -bios sample.fd -S")
    assert guest.vmm.measurement
    assert not guest.vmm.launched
    assert options_of(guest.vmm).paused
    guest.launch()
