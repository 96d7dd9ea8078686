"""Run by the Python that sev-attest-tool is installed for: does it accept its own sample, and evidence of ours?

Arguments: directories of evidence. The tool takes a report of version 2 as JSON, and knows AMD's real Genoa roots only.
"""

import json
import sys
from pathlib import Path

import sev_attest_tool


def as_json(report: bytes) -> str:
    """The report with the names of the sample, whose arrays of numbers have the lengths of the fields."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(report[at : at + size], "little")

    def tcb(at: int) -> dict[str, object]:
        level = report[at : at + 8]
        return {
            "bootloader": level[0],
            "tee": level[1],
            "_reserved": [*level[2:6]],
            "snp": level[6],
            "microcode": level[7],
        }

    sample = json.loads(sev_attest_tool.SAMPLE_ATTESTATION)
    told, at = {}, 0
    for name, value in sample.items():
        if name == "signature":
            size = len(value["r"])
            told[name] = {"r": [*report[0x2A0 : 0x2A0 + size]], "s": [*report[0x2E8 : 0x2E8 + size]]}
            told[name] |= {part: value[part] for part in value if part not in ("r", "s")}
        elif isinstance(value, dict):
            told[name], at = tcb(at), at + 8
        elif isinstance(value, list):
            told[name], at = [*report[at : at + len(value)]], at + len(value)
        else:
            size = {"policy": 8, "plat_info": 8}.get(name, SMALL.get(name, 4))
            told[name], at = number(at, size), at + size
    return json.dumps(told)


SMALL = {f"{prefix}_{part}": 1 for prefix in ("current", "committed") for part in ("build", "minor", "major")} | {
    "_reserved_2": 1,
    "_reserved_3": 1,
}


def accepts(report: str, vcek: bytes) -> bool:
    try:
        sev_attest_tool.verify_attestation_report(report, vcek)
    except BaseException as error:  # noqa: BLE001  a Rust panic is no Exception
        sys.stderr.write(f"{error}\n")
        return False
    return True


def tell(name: str, accepted: bool) -> None:
    sys.stdout.write(f"verdict {name} {'accepted' if accepted else 'refused'}\n")


sample = json.loads(sev_attest_tool.SAMPLE_ATTESTATION)
tell("sample", accepts(json.dumps(sample), sev_attest_tool.SAMPLE_VCEK))
sample["vmpl"] ^= 1
tell("changed-sample", accepts(json.dumps(sample), sev_attest_tool.SAMPLE_VCEK))
for directory in map(Path, sys.argv[1:]):
    found = accepts(as_json((directory / "report.bin").read_bytes()), (directory / "certs" / "vcek.der").read_bytes())
    tell(directory.name, found)
