"""SUPPORTED.md: complete, true to the command table, and what its tool prints."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from snpbook.firmware.requests import MESSAGES
from snpbook.firmware.table import COMMANDS
from snpbook.spec import legacy_buffers, legacy_launch, payloads, platform, sev_certificates, snp_buffers
from snpbook.spec.commands import Command
from snpbook.spec.context import GUEST_CONTEXT, GUEST_CONTEXT_EXPORT
from snpbook.spec.layout import REGISTRY, Layout
from snpbook.spec.messages import MessageType
from snpbook.spec.policy import LEGACY_POLICY, POLICY
from snpbook.spec.releases import RELEASES
from snpbook.spec.report import ATTESTATION_REPORT
from snpbook.spec.swap import LEGACY_MDATA, MDATA_ENTRY
from snpbook.tools import supported

PAGE = Path(__file__).parents[2] / "SUPPORTED.md"
SUPPORT = ("modelled", "simplified", "refused")


def rows(title: str) -> list[list[str]]:
    """The cells of all tables below a second-level heading, without their heads."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(f"{title}\n"))
    tables = re.split(r"^\|(?:---\|)+$", text, flags=re.MULTILINE)[1:]
    lines = [line for table in tables for line in re.match(r"\n((?:\|.*\n)*)", table)[1].splitlines()]  # type: ignore[index]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_is_what_the_tool_prints() -> None:
    assert PAGE.read_text() == supported.page(), "run `python -m snpbook.tools.supported`"


@pytest.mark.parametrize(
    ("title", "column", "wanted"),
    [
        ("Commands", 1, [command.name for command in Command]),
        ("Commands", 0, [f"`{command:02X}`" for command in Command]),
        ("Guest messages", 1, [kind.name for kind in MessageType]),
        ("Bits of the guest policy", 1, [name.upper() for name in POLICY.fields]),
        ("Bits of the SEV and SEV-ES policy", 1, [name.upper() for name in LEGACY_POLICY.fields]),
        ("Releases", 0, [*RELEASES]),
    ],
)
def test_everything_stands_in_it_once(title: str, column: int, wanted: list[str]) -> None:
    assert [row[column] for row in rows(title)] == wanted


def test_every_structure_stands_in_it_once() -> None:
    """Every layout that cites one of the firmware's two documents, and the model's own in their stead."""
    found = Counter(row[0] for row in rows("Structures"))
    assert set(found.values()) == {1}
    own = {GUEST_CONTEXT.name, "LegacyPersistentData", "FirmwareImageHeader", "FirmwareImageSignature"}
    cited = {layout.name for layout in REGISTRY.values() if layout.cite.document in ("SNP", "SEV")}
    assert found.keys() == cited | own
    modules = (snp_buffers, legacy_buffers, payloads, platform, sev_certificates, legacy_launch)
    declared = {value.name for module in modules for value in vars(module).values() if isinstance(value, Layout)}
    declared |= {each.name for each in (GUEST_CONTEXT_EXPORT, ATTESTATION_REPORT, MDATA_ENTRY, LEGACY_MDATA)}
    assert declared <= found.keys()


@pytest.mark.parametrize(
    "title",
    ["Commands", "Guest messages", "Structures", "Bits of the guest policy", "Bits of the SEV and SEV-ES policy",
     "Releases"],
)  # fmt: skip
def test_every_row_says_how_and_why(title: str) -> None:
    """A simplified thing names the difference, in bold; a modelled one has none to name."""
    for row in rows(title):
        support, why = row[-2:]
        assert support in SUPPORT, row
        assert why, row
        assert ("**" in why) == (support == "simplified"), row


def test_only_trusted_io_and_ring_mode_are_refused() -> None:
    refused = {row[1] for row in rows("Commands") if row[-2] == "refused"}
    assert refused == {command.name for command in Command if command.name.startswith("TIO_")} | {"RING_BUFFER"}
    assert {row[0] for row in rows("Structures") if row[-2] == "refused"} == {"RING_BUFFER_BUFFER"}
    others = ("Guest messages", "Bits of the guest policy", "Bits of the SEV and SEV-ES policy", "Releases")
    assert not any(row[-2] == "refused" for title in others for row in rows(title))


def test_what_is_not_refused_is_in_the_firmware() -> None:
    answered = {row[1] for row in rows("Commands") if row[-2] != "refused"}
    assert answered == {command.name for command in COMMANDS}
    requests = {row[1] for row in rows("Guest messages") if row[1].endswith("_REQ")}
    assert requests == {kind.name for kind in MESSAGES}


def test_no_difference_is_told_of_what_does_not_exist() -> None:
    assert supported.COMMAND_DIFFERENCES.keys() <= COMMANDS.keys()
    assert supported.STRUCTURE_DIFFERENCES.keys() <= {row[0] for row in rows("Structures")}
    assert supported.POLICY_DIFFERENCES.keys() <= POLICY.fields.keys()
