"""What a firmware release has and what it does not, against the documents' own marks."""

from __future__ import annotations

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.messages import MessageType
from snpbook.spec.platform import FeatureEcx
from snpbook.spec.policy import POLICY
from snpbook.spec.products import product
from snpbook.spec.releases import RELEASES, Release, release

SNP = OLD, EXACT, NEW = [release(revision) for revision in ("1.51", "1.55", "1.58")]


def test_names() -> None:
    assert list(RELEASES) == ["0.17", "0.24", "1.51", "1.55", "1.58"]
    assert repr(OLD) == "Release(1.51)"
    with pytest.raises(ValueError, match=r"no firmware release '2\.0': one of 0\.17, 0\.24, 1\.51, 1\.55, 1\.58"):
        release("2.0")


def test_what_a_release_calls_itself() -> None:
    """Published builds keep API 1.55 for what documents of 1.56 to 1.58 describe."""
    assert [(each.major, each.minor) for each in RELEASES.values()] == [(0, 17), (0, 24), (1, 51), (1, 55), (1, 55)]


@pytest.mark.parametrize("revision", ["0.17", "0.24"])
def test_firmware_before_snp(revision: str) -> None:
    each = release(revision)
    assert not each.snp
    assert each.commands == {c for c in EXACT.commands if not c.name.startswith("SNP_")}
    assert (each.report_version, each.secrets_version, each.features) == (0, 0, 0)
    assert each.unconfirmed


def test_commands() -> None:
    assert {c.name for c in EXACT.commands - OLD.commands} == {
        "SNP_INIT_EX", "SNP_DOWNLOAD_FIRMWARE_EX", "SNP_VLEK_LOAD",
    }  # fmt: skip
    assert {c.name for c in NEW.commands - EXACT.commands} == {"SNP_VERIFY_MITIGATION"}
    assert OLD.commands < EXACT.commands < NEW.commands
    assert {c for c in Command if not c.name.startswith("TIO_")} == NEW.commands


@pytest.mark.parametrize(("each", "bits"), [(OLD, 0x1FFFFF), (EXACT, 0x1FFFFF), (NEW, 0x3FFFFFF)], ids=str)
def test_policy_bits(each: Release, bits: int) -> None:
    """1.55.25 refuses 63:21, the newest documents 63:26."""
    assert each.policy_bits == bits
    assert POLICY.reserved_mask == ~0x3FFFFFF & 2**64 - 1


def test_newer_fields_are_reserved_to_an_older_firmware() -> None:
    layout = BUFFERS[Command.SNP_INIT_EX]
    assert layout is not None
    newer = layout.pack(rapl_dis=1, ciphertext_hiding_en=1, tio_en=1, max_snp_asid=0x101)
    assert layout.reserved_set(newer, EXACT.unknown_fields(Command.SNP_INIT_EX)) == [0x00, 0x10, 0x11]
    assert layout.reserved_set(newer, NEW.unknown_fields(Command.SNP_INIT_EX)) == []
    known = layout.pack(init_rmp=1, list_paddr_en=1, list_paddr=2**64 - 1)
    assert layout.reserved_set(known, EXACT.unknown_fields(Command.SNP_INIT_EX)) == []
    assert EXACT.unknown_fields(Command.SNP_CONFIG) == ()


def test_reports_and_messages() -> None:
    assert [each.report_version for each in SNP] == [2, 2, 5]
    assert [each.secrets_version for each in SNP] == [2, 3, 3]
    assert [each.message_version(MessageType.KEY_REQ) for each in SNP] == [1, 1, 2]
    assert {each.message_version(MessageType.REPORT_REQ) for each in SNP} == {1}


def test_features() -> None:
    assert OLD.features == FeatureEcx.X86_SNP_SHUTDOWN
    assert EXACT.features == 0b11
    assert NEW.features == 1 << 13 | 0b111111
    assert {each.feature_ebx for each in RELEASES.values()} == {1}


def test_only_the_published_firmware_is_exact() -> None:
    assert [bool(each.unconfirmed) for each in SNP] == [True, False, True]


@pytest.mark.parametrize(("name", "version"), [("milan", "1.55.29"), ("genoa", "1.55.40")])
def test_products_name_their_release(name: str, version: str) -> None:
    firmware = product(name).firmware
    assert firmware is not None
    assert str(firmware) == version
    assert firmware.abi is EXACT
    assert firmware.report_version == 3, "as the real reports of those builds"
