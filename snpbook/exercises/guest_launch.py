"""Exercises of the chapter on a guest's launch: the calls, where two launches part, policies, broken command lines.

Every answer is tried on a machine: what is expected is read off a launch, not written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from snpbook.exercises.launches import INSTALLED, Launch, LaunchOptions, parting
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.command_line import read
from snpbook.spec.policy import DEFAULT_POLICY, POLICY
from snpbook.system import SAMPLE_NAME, System

QEMU, SNP, LINUX = "QEMU target/i386/sev.c", "SNP ABI", "LINUX arch/x86/kvm/svm/sev.c"
SUB_COMMAND = "KVM_MEMORY_ENCRYPT_OP: "


@cache
def launched(kind: str = "snp", vcpus: int = 2, cpu: str = "EPYC-Milan", cmdline: str = "console=ttyS0",
             memory: str = "12 MiB", **properties: Any) -> Launch:  # fmt: skip
    """A launch by its differences from the ordinary one; each is made once."""
    return Launch(LaunchOptions(kind=kind, vcpus=vcpus, cpu=cpu, cmdline=cmdline, memory=memory, properties=properties))


# 1: the calls


def _call_cases() -> list[Case]:
    def case(kind: str, hashes: bool, rule: str) -> Case:
        names = [call.name for call in launched(kind, kernel_hashes=hashes).calls]
        expected = [name.removeprefix(SUB_COMMAND) for name in names if name.startswith(SUB_COMMAND)]
        ranges = sum(name.endswith(("LAUNCH_UPDATE", "LAUNCH_UPDATE_DATA")) for name in expected)
        name = f"{kind}, {ranges} range{'s' * (ranges != 1)} of memory"
        return Case(name, lambda answer: answer(kind, ranges), expected, rule, QEMU)

    return [
        case("sev", False, "the length of the measurement is asked for first, by the same call"),
        case("sev", True, "each range of memory is one call"),
        case("sev-es", False, "registers are encrypted before the measurement, so that they are in it"),
        case(
            "snp", True, "an SNP guest's VMSAs are added by SNP_LAUNCH_FINISH itself, and nobody asks for a measurement"
        ),
    ]


CALLS_STUB = '''\
def calls(kind, ranges):
    """The sub-commands of KVM_MEMORY_ENCRYPT_OP that launch a guest, in order."""
    ...  # return ["INIT2", ...]
'''


def calls(kind: str, ranges: int) -> list[str]:
    """The sub-commands of KVM_MEMORY_ENCRYPT_OP that launch a guest, in order."""
    if kind == "snp":
        return ["INIT2", "SNP_LAUNCH_START", *["SNP_LAUNCH_UPDATE"] * ranges, "SNP_LAUNCH_FINISH"]
    registers = ["LAUNCH_UPDATE_VMSA"] if kind == "sev-es" else []
    end = ["LAUNCH_MEASURE", "LAUNCH_MEASURE", "LAUNCH_FINISH"]
    return ["INIT2", "LAUNCH_START", *["LAUNCH_UPDATE_DATA"] * ranges, *registers, *end]


def _measured_once(kind: str, ranges: int) -> list[str]:
    found = calls(kind, ranges)
    if "LAUNCH_MEASURE" in found:
        found.remove("LAUNCH_MEASURE")
    return found


def _one_update(kind: str, ranges: int) -> list[str]:
    return calls(kind, 1)


def _registers_everywhere(kind: str, ranges: int) -> list[str]:
    found = calls(kind, ranges)
    return [*found[:-1], "LAUNCH_UPDATE_VMSA", found[-1]] if kind == "snp" else found


CALLS = register(
    Exercise(
        id="guest_launch.1",
        title="The calls of a launch",
        minutes=10,
        difficulty=1,
        prerequisites=(),
        task=(
            "`kind` is 'sev', 'sev-es' or 'snp', `ranges` the number of ranges of memory that the guest begins with "
            "(image, kernel hashes, sections). Return the sub-commands of KVM_MEMORY_ENCRYPT_OP in the order in which "
            "QEMU makes them on Linux 6.12, from INIT2 on."
        ),
        stub=CALLS_STUB,
        reference=calls,
        wrong=(
            Wrong(_measured_once, "the length of the measurement is asked for first"),
            Wrong(_one_update, "each range of memory is one call"),
            Wrong(_registers_everywhere, "by SNP_LAUNCH_FINISH itself"),
        ),
        hints=(
            "Set the stepper to each kind in turn, and press *Next measured*.",
            "All begin with INIT2 and a LAUNCH_START of their own. SEV and SEV-ES have a measurement to be asked for.",
            "SNP: INIT2, SNP_LAUNCH_START, an SNP_LAUNCH_UPDATE for each range, SNP_LAUNCH_FINISH. SEV-ES: INIT2, "
            "LAUNCH_START, LAUNCH_UPDATE_DATA for each, LAUNCH_UPDATE_VMSA, LAUNCH_MEASURE twice, LAUNCH_FINISH.",
        ),
        solution=(
            "Before SNP the owner of a guest takes part in its launch: he sees the measurement, and only then gives "
            "his secret, so there is a call for it. An SNP guest asks for its report itself, when it runs."
        ),
        cases=_call_cases,
    )
)

# 2: where two launches part

_ORDINARY: Mapping[str, Any] = {
    "vcpus": 2, "cpu": "EPYC-Milan", "cmdline": "console=ttyS0", "memory": "12 MiB", "kernel_hashes": True,
    "debug_swap": False, "policy": DEFAULT_POLICY, "host_data": bytes(32),
}  # fmt: skip


def _parting_cases() -> list[Case]:
    def case(name: str, rule: str, **change: Any) -> Case:
        one, other = launched(**_ORDINARY), launched(**{**_ORDINARY, **change})
        links = [link.name for link in one.links]
        two = dict(_ORDINARY), {**_ORDINARY, **change}
        return Case(name, lambda answer: answer(*two, list(links)), parting(one, other), rule, SNP)

    debug = DEFAULT_POLICY | POLICY.pack(debug=1)[2] << 16
    return [
        case("nothing differs", "equal launches have equal digests: nowhere"),
        case("another command line", "the command line is in the table of kernel hashes", cmdline="quiet"),
        case("three vCPUs in place of two", "all links of the shorter launch are the same", vcpus=3),
        case("debug-swap=on", "SEV_FEATURES is a field of every VMSA", debug_swap=True),
        case("another vCPU model", "a VMSA holds the signature of the model, in RDX", cpu="EPYC-Rome"),
        case("another policy", "the policy is in the report, not in the digest", policy=debug),
        case("other host data", "host data are in the report, not in the digest", host_data=b"h" * 32),
        case("more memory", "memory that is not added at launch is not measured", memory="16 MiB"),
        case(
            "no kernel hashes, three vCPUs", "of several differences the first link counts", kernel_hashes=False,
            vcpus=3,
        ),
    ]  # fmt: skip


PARTING_STUB = '''\
def parting_link(one, other, links):
    """The first link at which two launches part, or "nowhere"."""
    ...  # return "firmware image", "kernel hashes", "VMSA of vCPU 0", ...
'''


def parting_link(one: Mapping[str, Any], other: Mapping[str, Any], links: Sequence[str]) -> str:
    """The first link at which two launches part, or "nowhere"."""
    differ = {name for name in one if one[name] != other[name]}
    if "kernel_hashes" in differ or ("cmdline" in differ and one["kernel_hashes"]):
        return "kernel hashes"
    if differ & {"cpu", "debug_swap"}:
        return "VMSA of vCPU 0"
    if "vcpus" in differ:
        return f"VMSA of vCPU {min(one['vcpus'], other['vcpus'])}"
    return "nowhere"


def _policy_counts(one: Mapping[str, Any], other: Mapping[str, Any], links: Sequence[str]) -> str:
    return links[0] if one["policy"] != other["policy"] else parting_link(one, other, links)


def _first_vmsa(one: Mapping[str, Any], other: Mapping[str, Any], links: Sequence[str]) -> str:
    found = parting_link(one, other, links)
    return "VMSA of vCPU 0" if found.startswith("VMSA") else found


def _last_difference(one: Mapping[str, Any], other: Mapping[str, Any], links: Sequence[str]) -> str:
    return parting_link({**one, "kernel_hashes": other["kernel_hashes"]}, other, links)


PARTING = register(
    Exercise(
        id="guest_launch.2",
        title="Where do they part?",
        minutes=12,
        difficulty=2,
        prerequisites=(),
        task=(
            "`one` and `other` say how two SNP guests are launched: vcpus, cpu (the model), cmdline, memory, "
            "kernel_hashes, debug_swap, policy, host_data. `links` are the names of the links of the first one's "
            "digest, in order. Return the first link at which the chains part ('VMSA of vCPU 2' and so on where only "
            "one of them has it), or 'nowhere'."
        ),
        stub=PARTING_STUB,
        reference=parting_link,
        wrong=(
            Wrong(_policy_counts, "the policy is in the report"),
            Wrong(_first_vmsa, "all links of the shorter launch are the same"),
            Wrong(_last_difference, "the first link counts"),
        ),
        hints=(
            "Try each change at the desk. Which of these things are bytes of pages that are added?",
            "The command line is in the page of kernel hashes; model and features are in each VMSA; policy, host data "
            "and size of memory are in no page.",
            "In the order of the chain: kernel hashes, then VMSA of vCPU 0, then the first VMSA that only one has.",
        ),
        solution=(
            "The digest is of pages. What is not a page, such as policy and host data, stands in the report beside it, "
            "where the owner must look for it. How much memory there is he cannot tell from either."
        ),
        cases=_parting_cases,
    )
)

# 3: a policy


@cache
def _host() -> System:
    system = System("milan", "exercise", installed=INSTALLED)
    system.host.boot("mainline")
    return system


@cache
def accepted(policy: int) -> bool:
    """Whether an SNP guest with that policy gets through LAUNCH_START on Linux 6.12."""
    try:
        guest = _host().create_vm(memory="10 MiB", policy=policy)
    except KernelError:
        return False
    guest.vmm.close()
    _host().guests.clear()
    return True


def _policy_cases() -> list[Case]:
    firmware = _host().product.firmware
    assert firmware is not None

    def case(name: str, rule: str, **fields: Any) -> Case:
        wish = {"smt": True, "debug": False, "migrate": False, "single_socket": False, "abi": (0, 0), **fields}
        made = POLICY.pack(
            abi_major=wish["abi"][0], abi_minor=wish["abi"][1], smt=wish["smt"], one=1, debug=wish["debug"],
            migrate_ma=wish["migrate"], single_socket=wish["single_socket"],
        )  # fmt: skip
        value = int.from_bytes(made, "little")
        expected = value if accepted(value) else 0
        return Case(name, lambda answer: answer(dict(wish)), expected, rule, LINUX)

    return [
        case("nothing special", "bit 16 allows multithreading, and bit 17 must be one"),
        case("debugging is allowed", "bit 19 allows debugging", debug=True),
        case(
            "a migration agent is allowed", "Linux 6.12 knows no migration agents, and refuses bit 18: 0", migrate=True
        ),
        case("firmware of ABI 1.51 or later", "the minor version is in bits 0 to 7, the major one above", abi=(1, 51)),
        case("no multithreading", "Linux 6.12 wants bit 16 set: 0", smt=False),
        case("one socket only", "Linux 6.12 refuses bit 20: 0", single_socket=True),
    ]


POLICY_STUB = '''\
def policy(wish):
    """The policy as a number, or 0 where Linux 6.12 starts no guest with it."""
    ...  # wish["debug"], wish["abi"], ...
'''


def policy(wish: Mapping[str, Any]) -> int:
    """The policy as a number, or 0 where Linux 6.12 starts no guest with it."""
    if not wish["smt"] or wish["migrate"] or wish["single_socket"]:
        return 0
    major, minor = wish["abi"]
    return int(minor + (major << 8) + (1 << 16) + (1 << 17) + (wish["debug"] << 19))


def _no_one(wish: Mapping[str, Any]) -> int:
    return max(policy(wish) - (1 << 17), 0)


def _abi_swapped(wish: Mapping[str, Any]) -> int:
    return policy({**wish, "abi": wish["abi"][::-1]})


def _kernel_forgotten(wish: Mapping[str, Any]) -> int:
    found = policy({**wish, "smt": True, "single_socket": False, "migrate": False})
    bits = (bool(wish["migrate"]) << 18) + (bool(wish["single_socket"]) << 20)
    return found + bits - ((not wish["smt"]) << 16)


POLICIES = register(
    Exercise(
        id="guest_launch.3",
        title="A policy",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "`wish` says what an owner wants: smt, debug, migrate (a migration agent), single_socket, and abi, the "
            "lowest version (major, minor) of the firmware's ABI. Return the SNP policy as a number, or 0 where Linux "
            "6.12 starts no guest with it."
        ),
        stub=POLICY_STUB,
        reference=policy,
        wrong=(
            Wrong(_no_one, "bit 17 must be one"),
            Wrong(_abi_swapped, "the minor version is in bits 0 to 7"),
            Wrong(_kernel_forgotten, "refuses bit 18"),
        ),
        hints=(
            "The policy builder shows the place of each field, and what kernel and firmware say.",
            "Three wishes are refused by KVM before the firmware hears of them: which?",
            "minor + (major << 8) + (1 << 16) + (1 << 17) + (debug << 19); 0 without smt, with single_socket, and with "
            "migrate.",
        ),
        solution=(
            "The firmware would take a guest without multithreading, or for one socket. "
            "KVM of Linux 6.12 takes neither, nor one with a migration agent: EINVAL, before the firmware is asked."
        ),
        cases=_policy_cases,
    )
)

# 4: a command line that fails

_LINE = (
    "qemu-system-x86_64 -machine q35,confidential-guest-support={use},memory-backend=ram1 -cpu EPYC-Milan -smp 2 "
    "-m {memory} -object memory-backend-memfd,id=ram1,size={size},share=true "
    "-object sev-snp-guest,id=sev0,cbitpos={cbitpos},reduced-phys-bits={reduced} -bios " + SAMPLE_NAME
)


def _line(**change: str) -> str:
    return _LINE.format(**{"use": "sev0", "memory": "12M", "size": "12M", "cbitpos": "51", "reduced": "1", **change})


def _mend_cases() -> list[Case]:
    def case(name: str, rule: str, **change: str) -> Case:
        line = _line(**change)

        def run(answer: Answer) -> object:
            mended = answer(line, 51)
            return outcome(mended) if isinstance(mended, str) else mended

        return Case(name, run, outcome(_line(**{key: "12M" for key in change if key == "memory"})), rule, QEMU)

    return [
        case("nothing is wrong", "a line that is well is left as it is"),
        case("cbitpos is another processor's", "cbitpos must be the host's bit", cbitpos="47"),
        case("reduced-phys-bits is 0", "reduced-phys-bits is 1 to 63", reduced="0"),
        case("-m and the backend differ", "-m must say what the backend's size says", memory="16M"),
        case("the machine names another object", "confidential-guest-support names an object's id", use="sev1"),
    ]


@cache
def outcome(line: str) -> str:
    """What becomes of a command line on the exercise's host."""
    try:
        guest = _host().qemu(line)
        guest.launch()
    except (KernelError, ValueError) as error:
        return str(error).removeprefix("qemu-system-x86_64: ")
    wanted = read(line)
    guest.vmm.close()
    _host().guests.clear()
    return f"launched: {guest.vmm.kind.value}, {wanted.vcpus} vCPUs, {wanted.memory >> 20} MiB"


MEND_STUB = '''\
def mend(line, c_bit):
    """The command line, so that the guest starts on a host whose C-bit is `c_bit`."""
    ...
'''


def mend(line: str, c_bit: int) -> str:
    """The command line, so that the guest starts on a host whose C-bit is `c_bit`."""
    size = re.findall(r"memory-backend-memfd,.*?size=(\w+)", line)[0]
    name = re.findall(r"sev-snp-guest,id=(\w+)", line)[0]
    line = re.sub(r"cbitpos=\d+", f"cbitpos={c_bit}", line)
    line = re.sub(r"reduced-phys-bits=0\b", "reduced-phys-bits=1", line)
    line = re.sub(r" -m \w+", f" -m {size}", line)
    return re.sub(r"confidential-guest-support=\w+", f"confidential-guest-support={name}", line)


def _c_bit_alone(line: str, c_bit: int) -> str:
    return re.sub(r"cbitpos=\d+", f"cbitpos={c_bit}", line)


def _without_sev(line: str, c_bit: int) -> str:
    return re.sub(r",confidential-guest-support=\w+", "", line)


def _c_bit_stays(line: str, c_bit: int) -> str:
    old = re.findall(r"cbitpos=(\d+)", line)[0]
    return mend(line, int(old))


MEND = register(
    Exercise(
        id="guest_launch.4",
        title="A command line that fails",
        minutes=12,
        difficulty=2,
        prerequisites=(),
        task=(
            "`line` starts an SNP guest, or would: some option contradicts another, or the host, whose C-bit is "
            "`c_bit`. Return the line mended, so that the same guest starts. Its memory is what the backend says, its "
            "object is named sev0."
        ),
        stub=MEND_STUB,
        reference=mend,
        wrong=(
            Wrong(_c_bit_alone, "reduced-phys-bits"),
            Wrong(_without_sev, "launched: plain"),
            Wrong(_c_bit_stays, "cbitpos must be the host's bit"),
        ),
        hints=(
            "`lab.complaint(line)` prints what QEMU prints: it names the option.",
            "Four things can be wrong: cbitpos, reduced-phys-bits, -m, and the id after confidential-guest-support.",
            "Replace each by what it must be, by `re.sub`: c_bit; 1; the size of the backend; the object's id.",
        ),
        solution=(
            "QEMU checks its options in three places: as it reads them, as it puts them together, and against the "
            "host. Each time it prints one line and ends. A line without `confidential-guest-support` is well, and "
            "starts a guest that is not protected at all."
        ),
        cases=_mend_cases,
    )
)
