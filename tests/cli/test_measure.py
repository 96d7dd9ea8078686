"""`snpbook measure` against sev-snp-measure: the same standard output wherever that gives one, a clean refusal else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snpbook.cli.main import main
from snpbook.spec.vmsa import VCPU_TYPES
from tests.attest import oracle
from tests.attest import ovmf_images as ovmf
from tests.attest.igvm_files import Writer
from tests.attest.vectors import VECTORS
from tests.sampling import ALL, sampled

DEBIAN = [Path("/usr/share/ovmf/OVMF.fd"), Path("/usr/share/OVMF/OVMF_CODE_4M.fd")]
FIXTURE = VECTORS / "launch" / "ovmf_AmdSev_suffix.bin"
SAMPLE = Path(__file__).resolve().parents[2] / "data" / "firmware" / "sample.fd"
FIRMWARE = [
    pytest.param(path, marks=pytest.mark.skipif(not path.is_file(), reason=f"{path.name} is not on this machine"))
    for path in (*DEBIAN, FIXTURE, SAMPLE)
]


class Outcome:
    """How one run of `snpbook measure` ended."""

    def __init__(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.code = main(["measure", *arguments])
        captured = capsys.readouterr()
        self.output, self.errors = captured.out, captured.err


def dumps() -> dict[str, bytes]:
    """Take away the VMSAs in this directory."""
    found = {path.name: path.read_bytes() for path in Path.cwd().glob("vmsa*.bin")}
    for name in found:
        Path(name).unlink()
    return found


def assert_same(arguments: list[str], capsys: pytest.CaptureFixture[str], refusals: tuple[int, ...] = (2, 64)) -> None:
    """Our output and files are the oracle's, or both refuse, and ours in one or two lines and writing nothing."""
    expected, theirs = oracle.measure(arguments), dumps()
    run, ours = Outcome(arguments, capsys), dumps()
    if expected is None:
        assert run.code in refusals, arguments
        assert (run.output, ours) == ("", {})
        assert 1 <= run.errors.count("\n") <= 2
    else:
        assert (run.code, run.output, run.errors) == (0, expected, ""), arguments
        assert ours == theirs


@pytest.fixture
def kernel(tmp_path: Path) -> list[str]:
    """The options of a measured direct boot."""
    (tmp_path / "vmlinuz").write_bytes(b"a kernel" * 1000)
    (tmp_path / "initrd").write_bytes(b"an initrd" * 1000)
    return [
        "--kernel",
        str(tmp_path / "vmlinuz"),
        "--initrd",
        str(tmp_path / "initrd"),
        "--append",
        "root=/dev/vda1 ro",
    ]


@pytest.mark.parametrize("path", FIRMWARE)
def test_firmware_of_the_world(path: Path, kernel: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    snp = ["--mode", "snp", "--ovmf", str(path)]
    for vcpus in sampled(range(1, 65), 5):
        assert_same([*snp, "--vcpus", str(vcpus), "--vcpu-type", "EPYC-Milan"], capsys)
    for vcpu_type in sampled(VCPU_TYPES, 16):
        assert_same([*snp, "--vcpus", "2", "--vcpu-type", vcpu_type], capsys)
    for vmm in ("QEMU", "ec2", "gce"):
        for boot in ([], kernel, kernel[:2], kernel[:4]):
            assert_same([*snp, "--vcpus", "3", "--vcpu-type", "EPYC-v4", "--vmm-type", vmm, *boot], capsys, (2,))
    for mode in ("sev", "seves", "snp:ovmf-hash"):
        for boot in ([], kernel):
            arguments = ["--mode", mode, "--ovmf", str(path), "--vcpus", "2", "--vcpu-type", "EPYC", *boot]
            assert_same(arguments, capsys, (2,))


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the public vectors are not beside this repository")
@pytest.mark.parametrize(
    "options",
    [
        ["-v"],
        ["--verbose", "--output-format", "base64"],
        ["--output-format", "hex"],
        ["--guest-features", "0x21"],
        ["--guest-features", "33"],
        ["--vcpu-sig", "0xA00F11"],
        ["--vcpu-sig", "0"],
        ["--vcpu-sig", "10489617", "--vcpu-type", "EPYC-Rome"],
        ["--vcpu-family", "25", "--vcpu-model", "17", "--vcpu-stepping", "0", "--vcpu-sig", "1"],
        ["--vcpu-family", "6", "--vcpu-model", "250", "--vcpu-stepping", "20"],
        ["--vcpu-family", "0"],
        ["--snp-ovmf-hash", "12" * 48],
        ["--snp-ovmf-hash", ""],
        ["--append", ""],
        ["--initrd", ""],
        ["--kernel", ""],
    ],
    ids=" ".join,
)
def test_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mode", "snp", "--vcpus", "2", "--vcpu-type", "EPYC-v4", "--ovmf", str(FIXTURE), *options]
    assert oracle.measure(arguments)
    assert_same(arguments, capsys)


USAGE: dict[str, list[str]] = {
    "no vCPUs": ["--mode", "snp", "--vcpu-type", "EPYC"],
    "zero vCPUs": ["--mode", "snp", "--vcpus", "0", "--vcpu-type", "EPYC"],
    "no vCPU type": ["--mode", "snp", "--vcpus", "1"],
    "unknown vCPU type": ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "Xeon"],
    "half a signature": ["--mode", "snp", "--vcpus", "1", "--vcpu-family", "25"],
    "signature of 65 bits": ["--mode", "snp", "--vcpus", "1", "--vcpu-sig", "0x10000000000000000"],
    "unknown VMM": ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--vmm-type", "qemu"],
    "unknown mode": ["--mode", "tdx"],
    "no mode": [],
    "initrd alone": ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--initrd", "x"],
    "command line alone": ["--mode", "sev", "--append", "x"],
    "VMSAs of a mode without": ["--mode", "sev", "--dump-vmsa"],
    "firmware hash in another mode": ["--mode", "sev", "--snp-ovmf-hash", "00" * 48],
    "short firmware hash": ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--snp-ovmf-hash", "00"],
    "odd firmware hash": ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--snp-ovmf-hash", "0"],
    "features that are no number": ["--mode", "sev", "--guest-features", "one"],
    "no SVSM": ["--mode", "snp:svsm", "--vcpus", "1", "--vcpu-type", "EPYC", "--vars-size", "4096"],
    "no variable store": ["--mode", "snp:svsm", "--vcpus", "1", "--vcpu-type", "EPYC", "--svsm", "x"],
    "two variable stores": [
        "--mode",
        "snp:svsm",
        "--vcpus",
        "1",
        "--vcpu-type",
        "EPYC",
        "--svsm",
        "x",
        "--vars-size",
        "1",
        "--vars-file",
        "x",
    ],
    "more vCPUs than there can be": ["--mode", "snp", "--vcpus", "65537", "--vcpu-type", "EPYC"],
    "vCPUs that are no number": ["--mode", "snp", "--vcpus", "two", "--vcpu-type", "EPYC"],
    "negative signature": ["--mode", "snp", "--vcpus", "1", "--vcpu-sig", "-1"],
    "negative family": ["--mode", "snp", "--vcpus", "1", "--vcpu-family", "-1"],
    "negative store": ["--mode", "snp:svsm", "--vcpus", "1", "--vcpu-type", "EPYC", "--svsm", "x", "--vars-size", "-1"],
    "unknown output": ["--mode", "sev", "--output-format", "binary"],
    "features of 65 bits": ["--mode", "sev", "--guest-features", "0x10000000000000000"],
    "no IGVM file": ["--mode", "snp:igvm"],
    "quote left open": ["--mode", "sev", "--explain", "--append 'x"],
    "explain itself": ["--mode", "sev", "--explain", "--explain x"],
    "explain a hash": ["--mode", "snp:ovmf-hash", "--explain", ""],
    "explain across generations": ["--mode", "sev", "--explain", "--mode snp --vcpus 1 --vcpu-type EPYC"],
    "explain the unknown": ["--mode", "sev", "--explain", "--colour red"],
    "SVSM elsewhere": ["--mode", "snp:svsm", "--vcpus", "1", "--vmm-type", "ec2", "--svsm", "x", "--vars-size", "1"],
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ovmf.fd").write_bytes(ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, b"\0\0\0\1")]))
    run = Outcome([*USAGE[name], "--ovmf", str(tmp_path / "ovmf.fd")], capsys)
    assert (run.code, run.output) == (64, "")
    assert run.errors.endswith("Try 'snpbook measure --help'.\n")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "no firmware image"),
        (b"five!", "no firmware image"),
        (b"A text file.\n" * 1000, "multiple of 4096"),
        (bytes(8192), "no SEV-ES reset block"),
        (ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, b"\0\0\0\1")])[:-7], "multiple of 4096"),
    ],
)
def test_files_that_are_no_firmware(
    content: bytes | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ovmf.fd"
    if content is not None:
        path.write_bytes(content)
    run = Outcome(["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--ovmf", str(path)], capsys)
    assert (run.code, run.output) == (2, "")
    assert run.errors.startswith(f"snpbook: {path}: ")
    assert problem in run.errors or "no SEV-ES reset block" in run.errors


def test_a_missing_kernel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ovmf.fd").write_bytes(bytes(4096))
    missing = str(tmp_path / "vmlinuz")
    run = Outcome(["--mode", "sev", "--ovmf", str(tmp_path / "ovmf.fd"), "--kernel", missing], capsys)
    assert run.code == 2
    assert run.errors.startswith(f"snpbook: {missing}: cannot be read")


def test_dumped_vmsas_are_the_oracles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "ovmf.fd"
    image.write_bytes(ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, b"\4\xb0\x80\0")]))
    for mode in ("snp", "seves"):
        arguments = ["--mode", mode, "--vcpus", "3", "--vcpu-type", "EPYC-Genoa", "--ovmf", str(image), "--dump-vmsa"]
        dumps = []
        for name, measure in (("theirs", oracle.measure), ("ours", lambda a: Outcome(a, capsys))):
            (tmp_path / mode / name).mkdir(parents=True)
            monkeypatch.chdir(tmp_path / mode / name)
            measure(arguments)
            dumps.append({path.name: path.read_bytes() for path in Path.cwd().iterdir()})
        assert len(dumps[0]) == 3
        assert dumps[0] == dumps[1]


u8, u16, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 64))
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@st.composite
def vcpu_options(draw: st.DrawFn) -> list[str]:
    """The type of a vCPU in any of its forms, more than one at a time included."""
    arguments = []
    if draw(st.booleans()):
        arguments += ["--vcpu-type", draw(st.sampled_from(list(VCPU_TYPES)))]
    if draw(st.integers(0, 3)) == 0:
        arguments += ["--vcpu-sig", draw(st.sampled_from([str, hex, bin]))(draw(u64))]
    if draw(st.integers(0, 3)) == 0:
        arguments += ["--vcpu-family", str(draw(u16)), "--vcpu-model", str(draw(u16)), "--vcpu-stepping", str(draw(u8))]
    return arguments or ["--vcpu-type", "EPYC-v4"]


@st.composite
def options(draw: st.DrawFn, folder: Path) -> list[str]:
    """Arguments of any mode, mostly sensible; whatever a mode does not read may be there as well."""
    mode = draw(st.sampled_from(["snp", "snp", "snp", "seves", "sev", "snp:ovmf-hash", "snp:svsm"]))
    arguments = ["--mode", mode, *draw(vcpu_options())]
    if mode not in ("sev", "snp:ovmf-hash") or draw(st.booleans()):
        arguments += ["--vcpus", str(draw(st.one_of(st.integers(1, 8), st.integers(1, 64))))]
    if mode != "snp:svsm" or draw(st.integers(0, 7)) == 0:
        arguments += ["--vmm-type", draw(st.sampled_from(["QEMU", "ec2", "gce"]))]
    arguments += ["--guest-features", hex(draw(u64))]
    if draw(st.booleans()):
        (folder / "kernel").write_bytes(draw(st.binary(max_size=50)))
        arguments += ["--kernel", str(folder / "kernel")]
        if draw(st.booleans()):
            (folder / "initrd").write_bytes(draw(st.binary(max_size=50)))
            arguments += ["--initrd", str(folder / "initrd")]
        if draw(st.booleans()):
            arguments += [f"--append={draw(texts)}"]
    if mode == "snp" and draw(st.booleans()):
        arguments += ["--snp-ovmf-hash", draw(st.binary(min_size=48, max_size=48)).hex()]
    if mode == "snp:svsm":
        svsm = draw(ovmf.images(odd=draw(st.integers(0, 3)) == 0))
        (folder / "svsm.bin").write_bytes(svsm.replace(*(ovmf.entry(g, b"")[2:] for g in (ovmf.RESET, ovmf.SVSM))))
        (folder / "vars.fd").write_bytes(bytes(draw(st.integers(1, 1 << 16))))
        arguments += ["--svsm", str(folder / "svsm.bin")]
        sizes = ["--vars-size", str(draw(st.one_of(st.integers(1, 1 << 20), st.integers(1, 1 << 33))))]
        arguments += sizes if draw(st.booleans()) else ["--vars-file", str(folder / "vars.fd")]
    if mode != "sev" and draw(st.booleans()):
        arguments += ["--dump-vmsa"]
    if draw(st.booleans()):
        arguments += [draw(st.sampled_from(["--verbose", "-v"]))]
    return [*arguments, "--output-format", draw(st.sampled_from(["hex", "base64"]))]


random_images = settings(
    max_examples=max(200, settings().max_examples * (3 if ALL else 1)),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command writes goes to a directory of the test's own."""
    monkeypatch.chdir(tmp_path)


@random_images
@given(data=st.data(), image=ovmf.images())
def test_random_images(data: st.DataObject, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ovmf.fd").write_bytes(image)
    assert_same([*data.draw(options(tmp_path)), "--ovmf", str(tmp_path / "ovmf.fd")], capsys)


@random_images
@given(data=st.data(), image=ovmf.images(odd=True))
def test_random_odd_images(
    data: st.DataObject, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ovmf.fd").write_bytes(image)
    assert_same([*data.draw(options(tmp_path)), "--ovmf", str(tmp_path / "ovmf.fd")], capsys)


def test_no_firmware_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = Outcome(["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC"], capsys)
    assert (run.code, run.output) == (64, "")
    assert run.errors.startswith("snpbook: Mode snp needs --ovmf.")


def test_vmsas_are_dumped_all_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ovmf.fd").write_bytes(ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, b"\4\xb0\x80\0")]))
    Path("vmsa2.bin").mkdir()
    arguments = ["--mode", "snp", "--vcpus", "3", "--vcpu-type", "EPYC", "--ovmf", "ovmf.fd", "--dump-vmsa"]
    run = Outcome(arguments, capsys)
    assert (run.code, run.output) == (2, "")
    assert run.errors.startswith("snpbook: vmsa2.bin: is a directory")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["ovmf.fd", "vmsa2.bin"]
    Path("vmsa2.bin").rmdir()
    assert Outcome(arguments, capsys).code == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["ovmf.fd", *(f"vmsa{n}.bin" for n in range(3))]


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    section = [(0x810000, 0x1000, ovmf.KERNEL)]
    entries = [
        ovmf.entry(ovmf.RESET, b"\4\xb0\x80\0"),
        ovmf.entry(ovmf.HASHES, (0x810C00).to_bytes(4, "little") + bytes(4)),
        ovmf.entry(ovmf.METADATA, (2000).to_bytes(4, "little")),
    ]
    Path("ovmf.fd").write_bytes(ovmf.place(ovmf.image([bytes(4096)], entries), ovmf.metadata(section), 2000))
    Path("vmlinuz").write_bytes(b"kernel")
    first = ["--mode", "snp", "--vcpus", "2", "--vcpu-type", "EPYC", "--ovmf", "ovmf.fd", "--kernel", "vmlinuz"]
    run = Outcome([*first, "--explain", "--vcpus 3 --append 'a b' --guest-features 0x21"], capsys)
    changed = [*first[:2], "--vcpus", "3", *first[4:], "--append", "a b", "--guest-features", "0x21"]
    assert run.output == "".join(map(str, [oracle.measure(first), oracle.measure(changed)])) + (
        "section KERNEL_HASHES: 1 page at 0x810000 changed (command line)\n"
        "VMSA of vCPU 0: 2 pages at 0xfffffffff000 changed (sev_features 0x1 -> 0x21)\n"
        "VMSA of vCPU 2: 1 page at 0xfffffffff000 only in the second\n"
    )
    run = Outcome([*first, "--explain", ""], capsys)
    assert run.output.splitlines() == [(oracle.measure(first) or "").strip()] * 2
    run = Outcome([*first, "--explain", "--kernel ''"], capsys)
    assert run.output.splitlines()[2:] == ["section KERNEL_HASHES: 1 page at 0x810000 changed (NORMAL -> ZERO)"]


def test_igvm_files(capsys: pytest.CaptureFixture[str]) -> None:
    page = bytes(range(256)) * 16
    writer = Writer().platform().page(0xFFFFE000, page).page(0xFFFFF000, page).page(0x80D000, kind=1)
    Path("guest.igvm").write_bytes(writer.vmsa(0xFFFFFFFFF000, b"\1" * 752 + bytes(16) + b"\1" * 3328).finish())
    run = Outcome(["--mode", "snp:igvm", "--igvm", "guest.igvm", "--dump-vmsa", "-v"], capsys)
    assert run.code == 0
    assert re.fullmatch(r"Calculated SEV_SNP_IGVM guest measurement: [0-9a-f]{96}\n", run.output)
    assert dumps() == {"vmsa0.bin": b"\1" * 752 + bytes(16) + b"\1" * 3328}
    Path("guest.igvm").write_bytes(b"IGVM")
    run = Outcome(["--mode", "snp:igvm", "--igvm", "guest.igvm"], capsys)
    assert (run.code, run.output) == (2, "")
    assert run.errors.startswith("snpbook: guest.igvm: 4 bytes are no IGVM file")


def test_every_flag_of_the_oracle_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = subprocess.run([sys.executable, "-m", "sevsnpmeasure.cli", "--help"], capture_output=True, check=True)
    flags = set(re.findall(r"--[a-z-]+", theirs.stdout.decode()))
    assert len(flags) > 20
    assert flags - set(re.findall(r"--[a-z-]+", Outcome(["--help"], capsys).output)) == {"--version"}


def test_a_real_process_loads_neither_numpy_nor_cryptography(tmp_path: Path) -> None:
    (tmp_path / "ovmf.fd").write_bytes(ovmf.image([bytes(4096)], [ovmf.entry(ovmf.RESET, b"\0\0\0\1")]))
    arguments = ["measure", "--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC", "--ovmf", str(tmp_path / "ovmf.fd")]
    program = (
        f"import sys; from snpbook.cli.main import main; code = main({arguments}); "
        "sys.exit(code or bool({'numpy', 'cryptography', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, oracle.measure(arguments[1:]))
