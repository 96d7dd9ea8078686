"""What `snpbook report` reads: evidence, certificates, roots and policies from the paths that the user named.

Every file is taken apart before anything in one is decoded, so that a malformed input is reported as such whatever
else is wrong. A directory is searched for certificates, and what is none there is named and left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from snpbook.attest.appraise import DEFAULT_POLICY, Policy
from snpbook.attest.bundle import Bundle, ders
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.crl import RevocationList
from snpbook.attest.evidence import Evidence
from snpbook.attest.parse import Report
from snpbook.attest.roots import ROOT_SETS, Roots, named_roots, own_roots
from snpbook.cli import errors

CERTS_VARIABLE = "SNPBOOK_CERTS"
SUFFIXES = {".pem", ".der", ".crt", ".cer", ".crl"}
"""Which files of a directory may hold certificates and revocation lists."""
FORM = (
    "Give a report as bytes, hexadecimal or base64 text, alone, with its certificate table, or as configfs-tsm has it."
)
TSM_FILES = ("outblob", "auxblob", "provider")
NO_POLICY = "none"
STDIN = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """One certificate or revocation list (DER) and where it was found."""

    where: str
    der: bytes
    may_be_left_out: bool = False

    def decode(self) -> Bundle:
        """Decode it; `NotGenuine` where it cannot be."""
        return Bundle.decode([self.der])


@dataclass(slots=True)
class Pool:
    """Certificates and lists from every source, and what was left out of directories, with the reason."""

    sources: list[Source] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def decoded(self) -> Bundle:
        """All of it; `errors.NotGenuine` names the file of one that cannot be decoded."""
        certificates: list[Certificate] = []
        crls: list[RevocationList] = []
        for source in self.sources:
            try:
                bundle = source.decode()
            except NotGenuine as refusal:
                if not source.may_be_left_out:
                    raise _broken_inside(source.where, refusal) from refusal
                self.left_out.append(f"{source.where}: {refusal}")
                continue
            certificates += bundle.certificates
            crls += bundle.crls
        return Bundle(tuple(certificates), tuple(crls))


def read_evidence(file: str) -> tuple[Evidence, Report]:
    """The evidence in a file, in a directory of configfs-tsm, or (`-`) on standard input.

    `errors.Malformed` where it is none.
    """
    try:
        if file == STDIN:
            evidence = Evidence.read(_read_stdin())
        elif Path(file, "outblob").is_file():
            evidence = _read_tsm(Path(file))
        else:
            evidence = Evidence.read(errors.read_input(file))
        return evidence, Report.parse(evidence.report)
    except MalformedEvidence as error:
        raise errors.Malformed(f"{file}: {error}", FORM) from error


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise errors.Malformed("standard input is closed", "Name a file, or send one in.")
    return errors.read_stream(sys.stdin.buffer, "standard input")


def _read_tsm(folder: Path) -> Evidence:
    """A live directory counts in `generation` who writes to it: a report that changes while it is read is no one's."""
    generation = folder / "generation"
    before = generation.read_bytes() if generation.is_file() else b""
    files = {name: errors.read_input(folder / name) for name in TSM_FILES if (folder / name).is_file()}
    if generation.is_file() and generation.read_bytes() != before:
        raise MalformedEvidence("the report was requested anew while it was read")
    return Evidence.read_tsm(files)


def gather(file: str, evidence: Evidence, paths: Iterable[str]) -> Pool:
    """The certificates and lists of the evidence's table, of the paths, and of the configured directory."""
    pool = Pool()
    for der in (*evidence.certificates, *evidence.crls):
        pool.sources += _sources(f"{file}: its certificate table", der)
    configured = os.environ.get(CERTS_VARIABLE)
    if configured and not Path(configured).is_dir():
        remedy = f"Mend or unset the environment variable {CERTS_VARIABLE}."
        raise errors.Malformed(f"{configured}: no directory", remedy)
    for path in map(Path, [*paths, *([configured] if configured else [])]):
        if path.is_dir():
            _gather_directory(path, pool)
        else:
            pool.sources += _sources(str(path), errors.read_input(path))
    return pool


def may_hold_certificates(member: Path) -> bool:
    """Whether a file of a directory is looked into."""
    return member.suffix.lower() in SUFFIXES and member.is_file()


def _gather_directory(folder: Path, pool: Pool) -> None:
    for member in sorted(folder.iterdir()):
        if may_hold_certificates(member):
            try:
                found = ders(errors.read_input(member))
            except MalformedEvidence as error:
                pool.left_out.append(f"{member}: {error}")
                continue
            pool.sources += [Source(str(member), der, may_be_left_out=True) for der in found]


def _sources(where: str, data: bytes) -> Iterator[Source]:
    try:
        yield from (Source(where, der) for der in ders(data))
    except MalformedEvidence as error:
        remedy = "Give certificates and revocation lists as DER, or as PEM with BEGIN CERTIFICATE or BEGIN X509 CRL."
        raise errors.Malformed(f"{where}: {error}", remedy) from error


def read_roots(root_set: str) -> Roots:
    """A root set by its name, or the self-issued certificates of a file."""
    if root_set in ROOT_SETS:
        return named_roots(root_set)
    remedy = f"Name {', '.join(ROOT_SETS)} or a file with an ARK."
    if not Path(root_set).is_file():
        raise errors.Malformed(f"{root_set}: no such root set or file", remedy)
    certificates: list[Certificate] = []
    for source in _sources(root_set, errors.read_input(root_set)):
        try:
            certificates += source.decode().certificates
        except NotGenuine as refusal:
            raise _broken_inside(root_set, refusal) from refusal
    try:
        return own_roots(root_set, certificates)
    except MalformedEvidence as error:
        raise errors.Malformed(f"{root_set}: {error}", remedy) from error


def read_policy(file: str | None) -> Policy | None:
    """The policy in a TOML file, the built-in one, or None for `none`."""
    if file is None:
        return DEFAULT_POLICY
    if file == NO_POLICY:
        return None
    try:
        return Policy.from_toml(errors.read_input(file).decode(), file)
    except ValueError as error:
        remedy = "A policy is TOML, an option a line; snpbook report verify --help names them."
        raise errors.Malformed(f"{file}: {error}", remedy) from error


def _broken_inside(where: str, refusal: NotGenuine) -> errors.NotGenuine:
    return errors.NotGenuine(f"{where}: {refusal}", "Fetch the certificate again from where it comes.")
