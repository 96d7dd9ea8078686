"""What distinguishes two launches: each kind of difference by hand, and the rule that differences are all there is."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.measure import legacy_runs, snp_runs, vmsa_pages
from snpbook.attest.measure_chain import Run, launch_digest
from snpbook.attest.measure_explain import Kind, differences
from snpbook.spec.image import Image
from snpbook.spec.launch import kernel_hash_table
from snpbook.spec.pages import LaunchPage
from snpbook.spec.vmsa import Vmm
from tests.attest import ovmf_images as ovmf

EPYC = 0x800F12
VMSA_GPA = 0xFFFFFFFFF000
SECTIONS = [
    (0x800000, 0x3000, ovmf.SEC_MEM),
    (0x80E000, 0x1000, ovmf.CPUID),
    (0x80D000, 0x1000, ovmf.SECRETS),
    (0x810000, 0x1000, ovmf.KERNEL),
]


def image(pages: list[bytes]) -> Image:
    entries = [
        ovmf.entry(ovmf.RESET, b"\4\xb0\x80\0"),
        ovmf.entry(ovmf.HASHES, (0x810C00).to_bytes(4, "little") + bytes(4)),
        ovmf.entry(ovmf.METADATA, (2000).to_bytes(4, "little")),
    ]
    return Image.parse(ovmf.place(ovmf.image(pages, entries), ovmf.metadata(SECTIONS), 2000))


FIRMWARE = image([bytes([n]) * 4096 for n in range(8)])


def runs(firmware: Image = FIRMWARE, vcpus: int = 2, vmm: Vmm = Vmm.QEMU, boot: bytes | None = None) -> list[Run]:
    return snp_runs(firmware, vmsa_pages(firmware, vcpus, EPYC, 1, vmm), vmm=vmm, kernel_hashes=boot)


def explained(first: list[Run], second: list[Run]) -> list[tuple[str, str, int, int, str]]:
    return [(d.kind.name, d.name, d.gpa, d.pages, d.detail) for d in differences(first, second)]


def test_equal_launches() -> None:
    assert differences(runs(), runs()) == []


def test_changed_pages_of_the_firmware() -> None:
    data = bytearray(FIRMWARE.data)
    for offset in (0x1000, 0x2FFF, 0x5008):
        data[offset] ^= 1
    changed = replace(FIRMWARE, data=bytes(data))
    assert explained(runs(), runs(changed)) == [
        ("CHANGED", "firmware", 0xFFFF9000, 2, ""),
        ("CHANGED", "firmware", 0xFFFFD000, 1, ""),
    ]


def test_a_larger_firmware() -> None:
    larger = image([b"new" + bytes(4093), *[bytes([n]) * 4096 for n in range(8)]])
    assert explained(runs(), runs(larger)) == [("ONLY_SECOND", "firmware", 0xFFFF7000, 1, "")]
    assert explained(runs(larger), runs()) == [("ONLY_FIRST", "firmware", 0xFFFF7000, 1, "")]


def test_more_vcpus() -> None:
    (found,) = differences(runs(), runs(vcpus=5))
    assert (found.kind, found.gpa, found.pages) == (Kind.ONLY_SECOND, VMSA_GPA, 3)
    assert str(found) == "VMSA of vCPU 2: 3 pages at 0xfffffffff000 only in the second"


def test_registers_are_named() -> None:
    first, second = runs(vcpus=3), snp_runs(FIRMWARE, vmsa_pages(FIRMWARE, 3, 0xA00F11, 0x21))
    detail = "rdx 0x800f12 -> 0xa00f11, sev_features 0x1 -> 0x21"
    assert explained(first, second) == [("CHANGED", "VMSA of vCPU 0", VMSA_GPA, 3, detail)]


def test_hashes_are_named() -> None:
    first = runs(boot=kernel_hash_table(b"kernel", b"initrd", "quiet"))
    for table, detail in [
        (kernel_hash_table(b"kernel", b"initrd", "debug"), "command line"),
        (kernel_hash_table(b"other", b"", "quiet"), "initrd, kernel"),
    ]:
        place = ("CHANGED", "section KERNEL_HASHES", 0x810000, 1, detail)
        assert explained(first, runs(boot=table)) == [place]
    (found,) = differences(first, runs())
    assert found.detail == "NORMAL -> ZERO"


def test_order_and_types() -> None:
    found = explained(runs(vcpus=1), runs(vcpus=1, vmm=Vmm.EC2))
    assert [row[0] for row in found] == ["MOVED", "CHANGED"]
    assert found[0] == ("MOVED", "section CPUID", 0x80E000, 1, "")
    found = explained(runs(), runs(vmm=Vmm.GCE))
    assert found[0] == ("CHANGED", "section SEC_MEM", 0x800000, 3, "ZERO -> UNMEASURED")


def test_legacy_launches() -> None:
    boot = [kernel_hash_table(b"kernel"), kernel_hash_table(b"kernel", b"", "x")]
    vmsas = vmsa_pages(FIRMWARE, 2, EPYC, 0)
    first, second = (legacy_runs(FIRMWARE, vmsas=vmsas, kernel_hashes=table) for table in boot)
    assert explained(first, second) == [("CHANGED", "kernel hashes", 0x810C00, 1, "command line")]
    assert explained(first, first[:-1]) == [("ONLY_FIRST", "VMSA of vCPU 1", VMSA_GPA, 1, "")]
    odd = Image.parse(bytes(5000))
    assert explained(legacy_runs(odd), legacy_runs(Image.parse(bytes(4999) + b"\1"))) == [
        ("CHANGED", "firmware", 0xFFFFFC78, 1, "")
    ]


pages = st.sampled_from([bytes(4096), b"a" * 4096, b"b" * 4096])
run = st.one_of(
    st.builds(
        Run,
        st.just("data"),
        st.sampled_from([LaunchPage.NORMAL, LaunchPage.VMSA]),
        st.integers(0, 3).map(lambda n: n * 4096),
        st.lists(pages, min_size=1, max_size=3).map(b"".join),
    ),
    st.builds(
        Run,
        st.just("blank"),
        st.sampled_from([LaunchPage.ZERO, LaunchPage.CPUID]),
        st.integers(0, 3).map(lambda n: n * 4096),
        st.just(b""),
        st.integers(1, 3).map(lambda n: n * 4096),
    ),
)


@given(st.lists(run, max_size=4), st.lists(run, max_size=4))
def test_no_differences_means_the_same_digest(first: list[Run], second: list[Run]) -> None:
    assert (differences(first, second) == []) is (launch_digest(first) == launch_digest(second))


@given(st.permutations(range(5)))
def test_any_other_order_is_seen(order: list[int]) -> None:
    first = [Run("data", LaunchPage.NORMAL, n * 4096, bytes([n]) * 4096) for n in range(5)]
    second = [first[n] for n in order]
    found = differences(first, second)
    assert all(each.kind is Kind.MOVED for each in found)
    assert bool(found) is (launch_digest(first) != launch_digest(second))


def test_moving_one_page_among_many_moves_one() -> None:
    first = [Run("data", LaunchPage.NORMAL, n * 4096, b"p" * 4096) for n in range(2000)]
    (found,) = differences(first, [*first[:7], *first[8:], first[7]])
    assert (found.kind, found.gpa, found.pages) == (Kind.MOVED, 7 * 4096, 1)
