"""The launch digest against published vectors, against hand-made chains, and against its own rules."""

from hashlib import sha256, sha384

import pytest

from snpbook.attest.measure import (
    firmware_digest,
    legacy_runs,
    snp_digest,
    svsm_gpa,
    svsm_runs,
    svsm_vmsa_pages,
    vmsa_pages,
)
from snpbook.attest.measure_chain import ZERO_DIGEST, launch_digest, legacy_digest
from snpbook.spec.image import Image, ImageError
from snpbook.spec.launch import kernel_hash_table
from snpbook.spec.vmsa import VCPU_TYPES, VMSA, Vmm
from tests.attest import ovmf_images as ovmf
from tests.attest.vectors import VECTORS, needs_vectors

CONSOLE = "console=ttyS0 loglevel=7"
EPYC = int(VCPU_TYPES["EPYC-v4"])
AP_EIP = 0x80B004
RESET = ovmf.entry(ovmf.RESET, AP_EIP.to_bytes(4, "little"))


def page_info(digest: bytes, contents: bytes, kind: int, gpa: int) -> bytes:
    """One step of the chain, spelled out."""
    return sha384(digest + contents + bytes([0x70, 0, kind, 0, 0, 0, 0, 0]) + gpa.to_bytes(8, "little")).digest()


def with_sections(sections: list[tuple[int, int, int]], pages: int = 1, hashes: int | None = 0xC00) -> Image:
    entries = [RESET, ovmf.entry(ovmf.METADATA, (2000).to_bytes(4, "little"))]
    if hashes is not None:
        entries.append(ovmf.entry(ovmf.HASHES, hashes.to_bytes(4, "little") + bytes(4)))
    return Image.parse(ovmf.place(ovmf.image([bytes(4096)] * pages, entries), ovmf.metadata(sections), 2000))


def suffix() -> Image:
    return Image.parse((VECTORS / "launch" / "ovmf_AmdSev_suffix.bin").read_bytes())


def test_one_page_of_zeros() -> None:
    page = Image(bytes(4096), {}, ())
    assert firmware_digest(page).hex() == (
        "46c510442a54cc32344cef32e14dc3d6312fc4a010780dd11fd33204df5550590356b069e6c6ca5bbfca71561f370399"
    )


def test_one_zero_section() -> None:
    image = with_sections([(0x800000, 0x1000, ovmf.SEC_MEM)])
    assert snp_digest(image, [], firmware=ZERO_DIGEST).hex() == (
        "4472405c6dbc65e5629805f2be1b3df74eb119841eff12466c24f43e67083c23df5e645b2742b6d9aa0f943e095cebaa"
    )


def test_reset_vmsas() -> None:
    first, second = vmsa_pages(Image.parse(ovmf.image([bytes(4096)], [RESET])), 2, EPYC)
    assert sha384(first).hexdigest() == (
        "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a"
    )
    assert sha384(second).hexdigest() == (
        "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"
    )


def test_a_whole_chain() -> None:
    """8 KiB of counting bytes, one zero section, secrets, CPUID, two vCPUs."""
    image = with_sections(
        [(0x800000, 0x9000, ovmf.SEC_MEM), (0x80D000, 0x1000, ovmf.SECRETS), (0x80E000, 0x1000, ovmf.CPUID)]
    )
    counting = Image(bytes(range(256)) * 32, image.table, image.metadata)
    assert snp_digest(counting, vmsa_pages(counting, 2, EPYC)).hex() == (
        "59e8d85cd65c9875facc7dffc36222e388eb3945d9a99ebf009273af451b030d8cb924b74e308180c516653db73106c9"
    )


def test_kernel_hash_table() -> None:
    assert sha256(kernel_hash_table(b"", b"", CONSOLE)).hexdigest() == (
        "9b8d003b7deacde5e1e4e53ffdeaeefcfeec67cdf0f7362fafe984996f03b59d"
    )


PUBLISHED = {
    (1, CONSOLE): "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa",
    (1, None): "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d",
    (4, ""): "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5",
}
"""Digests of the fixture by vCPUs and command line, None for no kernel."""


@needs_vectors
@pytest.mark.parametrize(("vcpus", "cmdline"), PUBLISHED)
def test_published_snp_digests(vcpus: int, cmdline: str | None) -> None:
    image, digest = suffix(), PUBLISHED[vcpus, cmdline]
    hashes = None if cmdline is None else kernel_hash_table(b"", b"", cmdline)
    vmsas = vmsa_pages(image, vcpus, EPYC)
    assert snp_digest(image, vmsas, kernel_hashes=hashes).hex() == digest
    assert snp_digest(image, vmsas, kernel_hashes=hashes, firmware=firmware_digest(image)).hex() == digest


@needs_vectors
def test_published_digests_of_other_modes() -> None:
    image = suffix()
    assert firmware_digest(image).hex() == (
        "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"
    )
    console = kernel_hash_table(b"", b"", CONSOLE)
    assert legacy_digest(legacy_runs(image, kernel_hashes=console)).hex() == (
        "82a3ee5d537c3620628270c292ae30cb40c3c878666a7890ee7ef2a08fb535ff"
    )
    vmsas = vmsa_pages(image, 1, EPYC, 0)
    assert legacy_digest(legacy_runs(image, vmsas=vmsas, kernel_hashes=kernel_hash_table(b""))).hex() == (
        "13810ae661ea11e2bb205621f582fee268f0367c8f97bc297b7fadef3e12002c"
    )


@pytest.mark.parametrize(
    ("vmm", "kinds"),
    [(Vmm.QEMU, [3, 3, 6, 5, 3]), (Vmm.EC2, [3, 3, 5, 3, 6]), (Vmm.GCE, [4, 4, 6, 5, 3])],
)
def test_vmms_differ_in_order_and_types(vmm: Vmm, kinds: list[int]) -> None:
    image = with_sections(
        [(0x1000, 0x2000, ovmf.SEC_MEM), (0x5000, 7, ovmf.CPUID), (0x4000, 0, ovmf.SECRETS), (0x3000, 4096, ovmf.CAA)]
    )
    places = {3: [0x1000, 0x2000, 0x3000], 4: [0x1000, 0x2000], 5: [0x4000], 6: [0x5000]}
    if vmm is Vmm.GCE:
        places[3] = [0x3000]
    digest = ZERO_DIGEST
    for kind in kinds:
        digest = page_info(digest, bytes(48), kind, places[kind].pop(0))
    assert snp_digest(image, [], vmm=vmm, firmware=ZERO_DIGEST) == digest


def test_unmeasured_fields_of_a_vmsa_do_not_count() -> None:
    image = with_sections([])
    (page,) = vmsa_pages(image, 1, EPYC)
    assert snp_digest(image, [page]) == page_info(firmware_digest(image), sha384(page).digest(), 2, 0xFFFFFFFFF000)
    scaled = bytes(VMSA.unpack(page).replace(guest_tsc_scale=1, guest_tsc_offset=2))
    assert snp_digest(image, [scaled]) == snp_digest(image, [page])
    assert snp_digest(image, [bytes(VMSA.unpack(page).replace(rax=1))]) != snp_digest(image, [page])


def test_equal_neighbours_are_no_shortcut_for_the_digest() -> None:
    pages = [b"a" * 4096, b"a" * 4096, b"b" * 4096, b"a" * 4096]
    digest = ZERO_DIGEST
    for i, page in enumerate(pages):
        digest = page_info(digest, sha384(page).digest(), 1, 0xFFFFC000 + 4096 * i)
    assert firmware_digest(Image(b"".join(pages), {}, ())) == digest


KERNEL = kernel_hash_table(b"kernel")


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (with_sections([(0, 0x1000, ovmf.KERNEL), (0, 0x1001, ovmf.SEC_MEM)]), "whole pages"),
        (with_sections([(0, 0x1000, ovmf.KERNEL), (0, 0x1000, 7)]), "unknown type"),
        (with_sections([(0, 0x2000, ovmf.KERNEL)]), "one page"),
        (with_sections([(0, 0x1000, ovmf.KERNEL)], hashes=None), "no area"),
        (with_sections([(0, 0x1000, ovmf.KERNEL)], hashes=0xFA0), "leaves its page"),
        (with_sections([]), "no section"),
    ],
)
def test_images_that_cannot_be_launched_so(image: Image, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        snp_digest(image, [], kernel_hashes=KERNEL)


def test_images_without_what_a_guest_needs() -> None:
    bare = Image.parse(bytes(4096))
    with pytest.raises(ImageError, match="no SEV-ES reset block"):
        vmsa_pages(bare, 1, EPYC)
    with pytest.raises(ImageError, match="no area for kernel hashes"):
        legacy_digest(legacy_runs(bare, kernel_hashes=KERNEL))
    stopped = Image.parse(ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, bytes(4))]))
    assert len(vmsa_pages(stopped, 1, EPYC)) == 1
    with pytest.raises(ImageError, match="only one vCPU"):
        vmsa_pages(stopped, 2, EPYC)
    with pytest.raises(ImageError, match="multiple of 4096"):
        firmware_digest(Image.parse(bytes(5000)))


def test_svsm_lies_below_the_variable_store() -> None:
    firmware = Image.parse(bytes(0x4000))
    svsm = Image.parse(ovmf.image([bytes(4096)] * 2, [ovmf.entry(ovmf.SVSM, (0x10).to_bytes(4, "little"))]))
    assert svsm_gpa(firmware, svsm, 0x1000) == 0x1_0000_0000 - 0x4000 - 0x1000 - 0x2000
    pages = svsm_vmsa_pages(firmware, svsm, 0x1000, 3, EPYC)
    assert len(set(pages)) == 1
    assert VMSA.unpack(pages[0]).rip == svsm_gpa(firmware, svsm, 0x1000) + 0x10
    assert launch_digest(svsm_runs(firmware, svsm, 0x1000, pages)) != launch_digest(
        svsm_runs(firmware, svsm, 0x2000, pages)
    )
    with pytest.raises(ImageError, match="no SVSM entry"):
        svsm_vmsa_pages(firmware, firmware, 0, 1, EPYC)
    with pytest.raises(ImageError, match="does not fit"):
        svsm_gpa(firmware, svsm, 0x1_0000_0000)
