"""Defects of content: evidence that is genuine, and that a policy or a nonce refuses, one for every rule of `appraise`.

Each brings the least policy that refuses it; the others of its fields are good. Source: SNP ABI (guest policy,
ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from snpbook.evidence.defect import Defect
from snpbook.evidence.kit import Kit, Stage, Verdict
from snpbook.evidence.maker import Maker
from snpbook.evidence.surgery import flipped
from snpbook.spec.launch import DIGEST_SIZE
from snpbook.spec.layout import Layout
from snpbook.spec.policy import PLATFORM_INFO, POLICY
from snpbook.spec.report import ATTESTATION_REPORT

Wish = Callable[[Maker], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""What the report says, and what is wanted instead."""
_KEY, _OTHER, _NONE = b"\1" * DIGEST_SIZE, b"\2" * DIGEST_SIZE, bytes(DIGEST_SIZE)


def content_defects() -> Iterator[Defect]:
    """All of them, in the order of an appraisal, the nonce last."""
    for name, tells, option, wish in _WISHES:
        yield Defect(name, tells, Verdict(Stage.REFUSED, f"policy.{option}"), _spoil(wish))
    tells = "genuine, with a TCB rolled back by the host below what it has committed"
    yield Defect("rolled-back-tcb", tells, Verdict(Stage.REFUSED, "policy.minimum_tcb"), _rolled_back)
    tells = "REPORT_DATA is not the nonce of this request"
    yield Defect("replayed-nonce", tells, Verdict(Stage.REFUSED, "nonce"), _replayed)


def _spoil(wish: Wish) -> Callable[[Maker, Kit], Kit]:
    def spoil(maker: Maker, kit: Kit) -> Kit:
        says, wanted = wish(maker)
        return replace(kit, report=maker.report(**says), policy=wanted)

    return spoil


def _rolled_back(maker: Maker, _: Kit) -> Kit:
    if not maker.tcb.snp:
        raise ValueError("tcb: there is no SNP firmware older than version 0")
    older = Maker(replace(maker.recipe, tcb=replace(maker.tcb, snp=maker.tcb.snp - 1)))
    kept = dict.fromkeys(("current_tcb", "committed_tcb", "launch_tcb"), int(maker.tcb))
    wanted = {name: least for name, least in asdict(maker.tcb).items() if least is not None}
    return replace(older.kit(), report=older.report(**kept), policy={"minimum_tcb": wanted})


def _replayed(maker: Maker, kit: Kit) -> Kit:
    return replace(kit, nonce=flipped(maker.fields["report_data"], 0))


def _bits(layout: Layout, field: str, **bits: int) -> Callable[[Maker], int]:
    """A word of the report with some of its bits changed."""

    def word(maker: Maker) -> int:
        value = maker.fields[field].to_bytes(layout.size, "little")
        return int.from_bytes(bytes(layout.unpack(value).replace(**bits)), "little")

    return word


def _other(field: str) -> Wish:
    """Another value is wanted."""

    def wish(maker: Maker) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        size = ATTESTATION_REPORT.fields[field].size
        return {}, {field: flipped(maker.fields.get(field, bytes(size)), 0).hex()}

    return wish


def _higher(option: str, field: str) -> Wish:
    return lambda maker: ({}, {option: maker.fields.get(field, 0) + 1})


def _policy(**bits: int) -> Callable[[Maker], Mapping[str, Any]]:
    return lambda maker: {"policy": _bits(POLICY, "policy", **bits)(maker)}


def _platform(**bits: int) -> Callable[[Maker], Mapping[str, Any]]:
    return lambda maker: {"platform_info": _bits(PLATFORM_INFO, "platform_info", **bits)(maker)}


def _says(**fields: Any) -> Callable[[Maker], Mapping[str, Any]]:
    return lambda maker: fields


def _refused(says: Callable[[Maker], Mapping[str, Any]], **wanted: Any) -> Wish:
    return lambda maker: (says(maker), wanted)


def _weaker_policy(maker: Maker) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return _policy(smt=1)(maker), {"guest_policy": _bits(POLICY, "policy", smt=0)(maker)}


def _tsme(maker: Maker) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return _platform(tsme_en=1)(maker), {"platform_info": _bits(PLATFORM_INFO, "platform_info", tsme_en=0)(maker)}


def _unlisted(maker: Maker) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return {}, {"measurements": {"release-1": flipped(maker.fields["measurement"], 0).hex()}}


def _chip(maker: Maker) -> bytes:
    chip: bytes = maker.fields["chip_id"]
    return chip


def _newer_tcb(maker: Maker) -> int:
    return int(replace(maker.tcb, snp=maker.tcb.snp + 1))


def _newer_version(maker: Maker) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return {}, {"minimum_version": [maker.fields["current_major"], maker.fields["current_minor"] + 1]}


def _trusted(kind: str, digest: bytes, **says: Any) -> Wish:
    return _refused(_says(**says), **{f"trusted_{kind}_key_hashes": [digest.hex()]})


_WISHES: tuple[tuple[str, str, str, Wish], ...] = (
    ("debug-on", "the guest policy lets the host read the guest's memory", "allow_debug", _refused(_policy(debug=1))),
    ("migration-agent", "the guest policy allows a migration agent", "allow_migrate_ma", _refused(
        _policy(migrate_ma=1))),
    ("weaker-policy", "the guest policy allows SMT, which is not wanted", "guest_policy", _weaker_policy),
    ("old-guest-svn", "the guest's security version is too low", "minimum_guest_svn", _higher(
        "minimum_guest_svn", "guest_svn")),
    ("other-measurement", "another guest was launched", "measurement", _other("measurement")),
    ("unlisted-measurement", "the guest is none of those that are known", "measurements", _unlisted),
    ("other-report-data", "the guest says something else", "report_data", _other("report_data")),
    ("other-host-data", "the host gave other data at launch", "host_data", _other("host_data")),
    ("other-family", "the ID block names another family", "family_id", _other("family_id")),
    ("other-image", "the ID block names another image", "image_id", _other("image_id")),
    ("other-instance", "another instance of the guest reports", "report_id", _other("report_id")),
    ("other-migration-agent", "another migration agent is bound", "report_id_ma", _other("report_id_ma")),
    ("vmpl-3", "the report was asked for at VMPL 3", "vmpl", _refused(_says(vmpl=3), vmpl=0)),
    ("other-chip", "another chip reports", "chip_id", _other("chip_id")),
    ("chip-not-allowed", "the chip is none of the owner's", "allowed_chips", lambda m: (
        {}, {"allowed_chips": [flipped(_chip(m), 0).hex()]})),
    ("chip-denied", "the chip is one of those that are not wanted", "denied_chips", lambda m: (
        {}, {"denied_chips": [_chip(m).hex()]})),
    ("old-launch-tcb", "the guest was launched on older firmware", "minimum_launch_tcb", lambda m: (
        {}, {"minimum_launch_tcb": {"snp": m.tcb.snp + 1}})),
    ("tcb-order", "what is committed is newer than what runs", "require_tcb_order", lambda m: (
        {"committed_tcb": _newer_tcb(m)}, {"require_tcb_order": True})),
    ("provisional-firmware", "the firmware that runs is not committed", "permit_provisional_firmware", lambda m: (
        {"current_build": m.fields["current_build"] + 1}, {"permit_provisional_firmware": False})),
    ("old-build", "the build of the firmware is too low", "minimum_build", _higher("minimum_build", "current_build")),
    ("old-version", "the version of the firmware is too low", "minimum_version", _newer_version),
    ("platform-tsme", "the platform has a feature on that is not wanted", "platform_info", _tsme),
    ("no-alias-check", "the firmware did not check the DRAM for aliases", "require_alias_check", _refused(
        _platform(alias_check_complete=0), require_alias_check=True)),
    ("ciphertext-visible", "ciphertext hiding is off", "require_ciphertext_hiding", _refused(
        _platform(ciphertext_hiding_en=0), require_ciphertext_hiding=True)),
    ("no-author-key", "no author signed the ID key", "require_author_key", _refused(
        _says(author_key_en=0), require_author_key=True)),
    ("author-bit-alone", "AUTHOR_KEY_EN is set and both digests are zero: nothing was verified", "require_author_key",
        _refused(_says(author_key_en=1, author_key_digest=_NONE, id_key_digest=_NONE), require_author_key=True)),
    ("no-id-block", "there is no ID block", "require_id_block", _refused(
        _says(id_key_digest=_NONE), require_id_block=True)),
    ("untrusted-author", "somebody else signed the ID key", "trusted_author_key_hashes", _trusted(
        "author", _KEY, author_key_en=1, author_key_digest=_OTHER, id_key_digest=_OTHER)),
    ("untrusted-id-key", "somebody else signed the ID block", "trusted_id_key_hashes", _trusted(
        "id", _KEY, id_key_digest=_OTHER)),
    ("zero-id-digest", "the ID key's digest is zero, and so is one that is trusted", "trusted_id_key_hashes", _trusted(
        "id", _NONE, id_key_digest=_NONE)),
    ("unmitigated-launch", "a vulnerability was open at launch", "minimum_launch_mitigation_vector", _higher(
        "minimum_launch_mitigation_vector", "launch_mit_vector")),
    ("unmitigated-now", "a vulnerability is open", "minimum_current_mitigation_vector", _higher(
        "minimum_current_mitigation_vector", "current_mit_vector")),
    ("no-certificate-table", "the evidence brings no table of certificates", "cert_table_options", _refused(
        _says(), cert_table_options={"vcek": "require"})),
)  # fmt: skip
"""Name, what is the matter, the option that refuses it, and how it comes about."""
