"""Exercises of the chapter on the host's set-up: the size of the table, what the parameters read, and ASIDs.

What is expected is never written here: the machine boots with what the answer says, and its log and files are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from snpbook.exercises.hosts import HostOptions
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.hardware.bios import BiosSetup
from snpbook.host.e820 import ram
from snpbook.host.pseudo_files import CAPACITY, parameter

MIB = 1 << 20
RMP, KVM = "LINUX arch/x86/virt/svm/sev.c", "LINUX arch/x86/kvm/svm/sev.c"
_SHORT = re.compile(r"expected 0x([0-9a-f]+) got 0x([0-9a-f]+)")

# 1: the size of the table


def _missing_cases() -> list[Case]:
    def case(name: str, installed: int, bios: BiosSetup, rule: str) -> Case:
        kernel = HostOptions(installed=installed, bios=bios).boot()
        told = _SHORT.search(kernel.dmesg)
        lacks = int(told[1], 16) - int(told[2], 16) if told else 0
        rmp, top = kernel.cpu.memory_map.rmp, ram(kernel.cpu)[-1][1]
        return Case(name, lambda answer: answer(rmp.base, rmp.end, top), lacks, rule, RMP)

    gib = 1 << 30
    return [
        case("1 GB, a table for all of it", gib, BiosSetup(), "nothing is missing: 0"),
        case(
            "3 GB, a table for 1 GB", 3 * gib, BiosSetup(snp_coverage=gib, rmp_base=16 * MIB),
            "16 bytes for each page of 4 KB, and 16 KB of bookkeeping before them",
        ),
        case(
            "3 GB, a table at their end that reaches to its own first byte", 3 * gib,
            BiosSetup(snp_coverage=5 * gib - 21 * MIB),
            "the table must cover itself, too: count up to the end of RAM or of the table, whichever is higher",
        ),
        case(
            "3 GB, a table for 5 GB", 3 * gib, BiosSetup(snp_coverage=5 * gib, rmp_base=16 * MIB),
            "the hole below 4 GB has entries as well: it is addresses that count, not memory",
        ),
    ]  # fmt: skip


MISSING_STUB = '''\
def missing(rmp_base, rmp_end, top):
    """How many bytes the RMP is too small: 0 where it is large enough."""
    ...
'''


def missing(rmp_base: int, rmp_end: int, top: int) -> int:
    """How many bytes the RMP is too small: 0 where it is large enough."""
    pages = max(top, rmp_end + 1) // 4096
    need = pages * 16 + 16 * 1024
    return max(need - (rmp_end + 1 - rmp_base), 0)


def _no_bookkeeping(rmp_base: int, rmp_end: int, top: int) -> int:
    return max(max(top, rmp_end + 1) // 4096 * 16 - (rmp_end + 1 - rmp_base), 0)


def _not_itself(rmp_base: int, rmp_end: int, top: int) -> int:
    return max(top // 4096 * 16 + 16 * 1024 - (rmp_end + 1 - rmp_base), 0)


MISSING = register(
    Exercise(
        id="host_setup.1",
        title="Is the table large enough?",
        minutes=10,
        difficulty=1,
        prerequisites=(),
        task=(
            "`rmp_base` and `rmp_end` are the table's first and last byte, `top` is the address behind the last byte "
            "of RAM. Return how many bytes Linux 6.12 finds missing, 0 where the table is large enough."
        ),
        stub=MISSING_STUB,
        reference=missing,
        wrong=(Wrong(_no_bookkeeping, "16 KB of bookkeeping"), Wrong(_not_itself, "must cover itself")),
        hints=(
            "Each page has an entry, pages have 4 KB, and before the first entry the processor keeps something of its "
            "own. The chapter on the reverse map table says how long an entry is.",
            "The log's line gives both numbers: what was expected and what it got. Boot the desk with a custom "
            "coverage and compare.",
            "need = max(top, rmp_end + 1) / 4096 * 16 + 16 KB; the size is rmp_end + 1 - rmp_base.",
        ),
        solution=(
            "The kernel counts up to the last page of RAM, or of the table itself where that lies higher: a page of "
            "the table without an entry could be written. Series v7 counted the pages of RAM instead, without the "
            "holes between them, and so accepted tables that were too short."
        ),
        cases=_missing_cases,
    )
)

# 2: what the parameters read


def _parameter_cases() -> list[Case]:
    def case(name: str, rule: str, **facts: object) -> Case:
        given: dict[str, object] = {
            "smee": True, "smm_lock": True, "reserved": True, "min_sev_asid": 100, "passthrough": False,
            "sev": True, "sev_es": True, **facts,
        }  # fmt: skip
        expected = _read_parameters(given)
        return Case(name, lambda answer: answer(given), expected, rule, KVM)

    return [
        case("nothing is wrong", "all three kinds of guests"),
        case("no memory is reserved for the table", "SEV and SEV-ES know no table: they stay", reserved=False),
        case("devices pass through the IOMMU", "the IOMMU stands in the way of SNP alone", passthrough=True),
        case("the ASID limit is 1", "SEV-ES and SEV-SNP share the ASIDs below the limit", min_sev_asid=1),
        case("the ASID limit is 510, of 509 ASIDs", "SEV without ASIDs is unusable, and reads Y", min_sev_asid=510),
        case("memory encryption is off in the BIOS", "SMEE is the switch of everything", smee=False),
        case("SMM is not locked", "an open SMM takes all of SEV away, not SNP alone", smm_lock=False),
        case("sev_es=0", "SEV-SNP is decided last: without SEV-ES there is none", sev_es=False),
        case("sev=0", "and without SEV neither of the others", sev=False),
    ]


def _read_parameters(given: Mapping[str, object]) -> str:
    bios = BiosSetup(
        smee=bool(given["smee"]), smm_lock=bool(given["smm_lock"]), snp_coverage=None if given["reserved"] else 0,
        min_sev_asid=int(str(given["min_sev_asid"])),
    )  # fmt: skip
    options = " ".join(f"{name}={int(bool(given[name]))}" for name in ("sev", "sev_es"))
    host = HostOptions(bios=bios, cmdline="iommu=pt" if given["passthrough"] else "", modules={"kvm_amd": options})
    kernel = host.boot()
    return "".join(kernel.cat(parameter("kvm_amd", name)).strip() for name in ("sev", "sev_es", "sev_snp"))


PARAMETERS_STUB = '''\
def parameters(host):
    """What sev, sev_es and sev_snp read, as three letters: "YYN"."""
    ...  # host["smee"], host["min_sev_asid"], ...
'''


def parameters(host: Mapping[str, object]) -> str:
    """What sev, sev_es and sev_snp read, as three letters: "YYN"."""
    sev = host["smee"] and host["smm_lock"] and host["sev"]
    sev_es = sev and host["sev_es"] and int(str(host["min_sev_asid"])) > 1
    sev_snp = sev_es and host["reserved"] and not host["passthrough"]
    return "".join("Y" if one else "N" for one in (sev, sev_es, sev_snp))


def _only_snp(host: Mapping[str, object]) -> str:
    wanted = ("smee", "smm_lock", "reserved")
    snp = all(host[name] for name in wanted) and not host["passthrough"]
    return parameters({**host, "smm_lock": True})[:2] + ("Y" if snp and parameters(host)[1] == "Y" else "N")


def _own_asids(host: Mapping[str, object]) -> str:
    found = parameters({**host, "min_sev_asid": 100})
    return found[0] + ("N" if host["min_sev_asid"] == 1 else found[1]) + found[2]


def _unusable_is_off(host: Mapping[str, object]) -> str:
    return "N" + parameters(host)[1:] if host["min_sev_asid"] == 510 else parameters(host)


PARAMETERS = register(
    Exercise(
        id="host_setup.2",
        title="What do the parameters read?",
        minutes=10,
        difficulty=2,
        prerequisites=(),
        task=(
            "`host` says what was chosen: smee, smm_lock, reserved (memory for an RMP of all memory), min_sev_asid, "
            "passthrough (iommu=pt), and the module options sev and sev_es; the processor is a Milan with 509 ASIDs. "
            "Return what the files sev, sev_es and sev_snp of kvm_amd read on Linux 6.12, as three letters."
        ),
        stub=PARAMETERS_STUB,
        reference=parameters,
        wrong=(
            Wrong(_only_snp, "an open SMM takes all of SEV away"),
            Wrong(_own_asids, "share the ASIDs below the limit"),
            Wrong(_unusable_is_off, "is unusable, and reads Y"),
        ),
        hints=(
            "Three switches in a row: SEV, then SEV-ES, then SEV-SNP. What is off turns off what comes after it.",
            "Ask for each condition which of the three it belongs to. Two belong to SEV, though they look like SNP's.",
            "SEV: smee, smm_lock, sev. SEV-ES: also sev_es and an ASID limit above 1. SEV-SNP: also the table and the "
            "IOMMU. An empty range of SEV's ASIDs turns nothing off.",
        ),
        solution=(
            "The kernel clears features of the processor first (SMEE and SMM take SEV with all that hangs on it), and "
            "kvm_amd then decides in the order SEV, SEV-ES, SEV-SNP. A limit above the last ASID leaves SEV enabled "
            "and unusable: the log says so, the parameter does not."
        ),
        cases=_parameter_cases,
    )
)

# 3: ASIDs


def _limit_cases() -> list[Case]:
    def case(sev: int, snp: int, product: str, rule: str) -> Case:
        highest = {"milan": 509, "genoa": 1006}[product]

        def run(answer: Answer) -> object:
            chosen = answer(sev, snp, highest)
            if not isinstance(chosen, int):
                return chosen
            try:
                return _enough(HostOptions(product, bios=BiosSetup(min_sev_asid=chosen)), sev, snp) if chosen else "0"
            except ValueError as error:
                return str(error)

        wanted = "as many as asked for" if sev + snp <= highest else "0"
        return Case(f"{sev} SEV and {snp} SNP guests, {highest} ASIDs", run, wanted, rule, "APM2 15.34, CPUID")

    return [
        case(400, 100, "milan", "SNP guests have the ASIDs below the limit: 100 of them need a limit of 101"),
        case(509, 0, "milan", "a limit of 1 leaves no ASID below it"),
        case(0, 1006, "genoa", "a limit behind the last ASID leaves none for plain SEV guests"),
        case(410, 99, "milan", "every ASID has one owner, and none is left over"),
        case(410, 100, "milan", "where there are too few, no limit helps: 0"),
    ]


def _enough(host: HostOptions, sev: int, snp: int) -> str:
    lines = host.boot().cat(CAPACITY).split()
    capacity = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
    has = capacity.get("sev", 0), capacity.get("sev_es", 0)
    if has[0] >= sev and has[1] >= snp:
        return "as many as asked for"
    return f"misc.capacity: sev {has[0]}, sev_es {has[1]}"


LIMIT_STUB = '''\
def limit(sev, snp, asids):
    """The SEV-ES ASID space limit for so many guests of each kind at once, or 0 where there are too few ASIDs."""
    ...
'''


def limit(sev: int, snp: int, asids: int) -> int:
    """The SEV-ES ASID space limit for so many guests of each kind at once, or 0 where there are too few ASIDs."""
    return snp + 1 if sev + snp <= asids else 0


def _as_many(sev: int, snp: int, asids: int) -> int:
    return max(snp, 1) if sev + snp <= asids else 0


def _from_above(sev: int, snp: int, asids: int) -> int:
    return asids - sev + 1


LIMIT = register(
    Exercise(
        id="host_setup.3",
        title="The ASID space limit",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "A host shall run `sev` plain SEV guests and `snp` SNP guests at once; ASIDs go from 1 to `asids`. Return "
            "the SEV-ES ASID space limit to set in the BIOS (the first ASID of plain SEV guests), or 0 where there are "
            "too few ASIDs."
        ),
        stub=LIMIT_STUB,
        reference=limit,
        wrong=(Wrong(_as_many, "need a limit of 101"), Wrong(_from_above, "no limit helps: 0")),
        hints=(
            "A limit of 100 gives SEV-ES and SNP guests the ASIDs 1 to 99.",
            "How many ASIDs lie below a limit? How many from it to the last?",
            "snp + 1, if both together fit.",
        ),
        solution=(
            "The ASIDs below the limit are for guests with encrypted registers, those from it on for the others; ASID "
            "0 is the host's. The limit is read by the hardware: KVM cannot move it without a reboot."
        ),
        cases=_limit_cases,
    )
)
