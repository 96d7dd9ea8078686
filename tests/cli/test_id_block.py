"""`snpbook id-block` against snp-create-id-block: the same lines but for the signatures, which are random there."""

import base64
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sevsnpmeasure import id_block as oracle

from snpbook.cli.main import main
from tests.attest.test_id_block import AUTHOR_KEY, DIGEST, ID_KEY, pem

SIGNATURES = [(0x40, 0x240), (0x680, 0x880)]


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    """The options that name the two keys."""
    for name, key in (("id", ID_KEY), ("author", AUTHOR_KEY)):
        (tmp_path / f"{name}.pem").write_bytes(pem(key))
    return ["--idkey", str(tmp_path / "id.pem"), "--authorkey", str(tmp_path / "author.pem")]


def theirs(arguments: list[str]) -> str:
    output = io.StringIO()
    with patch.object(sys, "argv", ["snp-create-id-block", *arguments]), redirect_stdout(output):
        assert oracle.main() == 0
    return output.getvalue()


def unsigned(output: str) -> tuple[bytes, bytes, list[str]]:
    """ID block, authentication with its signatures blanked, the other lines."""
    first, *lines = output.splitlines()
    (name, block), (auth_name, auth) = (part.split("=", 1) for part in first.split(","))
    assert (name, auth_name) == ("id-block", "id-auth")
    body = bytearray(base64.b64decode(auth))
    for start, end in SIGNATURES:
        assert any(body[start:end])
        body[start:end] = bytes(end - start)
    return base64.b64decode(block), bytes(body), lines


@pytest.mark.parametrize("text", [base64.b64encode(DIGEST).decode(), DIGEST.hex()], ids=["base64", "hex"])
def test_the_other_tools_output(text: str, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["id-block", "--measurement", text, *keys]) == 0
    ours = capsys.readouterr()
    assert ours.err == ""
    assert unsigned(ours.out) == unsigned(theirs(["--measurement", base64.b64encode(DIGEST).decode(), *keys]))
    assert main(["id-block", "--measurement", text, *keys]) == 0
    assert capsys.readouterr() == ours


def test_the_owners_numbers(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--family-id", "0f" * 16, "--image-id", "f0" * 16, "--guest-svn", "0x1000", "--policy", "0xb0000"]
    assert main(["id-block", "--measurement", DIGEST.hex(), *keys[:2], *numbers]) == 0
    first, key_hash = capsys.readouterr().out.splitlines()
    block = base64.b64decode(first.split(",")[0].partition("=")[2])
    assert block == DIGEST + b"\x0f" * 16 + b"\xf0" * 16 + bytes.fromhex("01000000 00100000 00000b0000000000")
    assert key_hash.startswith("id_key_hash: ")


@pytest.mark.parametrize(
    "options",
    [
        ["--measurement", DIGEST.hex()[:-2]],
        ["--measurement", "zz" * 48],
        ["--measurement", ""],
        ["--family-id", "00"],
        ["--image-id", "x" * 32],
        ["--guest-svn", "0x100000000"],
        ["--guest-svn", "-1"],
        ["--policy", "none"],
        ["--policy", str(1 << 64)],
        ["--colour", "red"],
    ],
    ids=" ".join,
)
def test_wrong_usage(options: list[str], keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["id-block", "--measurement", DIGEST.hex(), *keys, *options]) == 64
    run = capsys.readouterr()
    assert run.out == ""
    assert run.err.endswith("Try 'snpbook id-block --help'.\n")
    assert main(["id-block", *keys]) == main(["id-block", "--measurement", DIGEST.hex()]) == 64


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "no private key in PEM form"),
        (pem(ec.derive_private_key(1, ec.SECP256R1())), "secp256r1"),
        (pem(ID_KEY, b"secret"), "encrypted"),
    ],
)
@pytest.mark.parametrize("option", ["--idkey", "--authorkey"])
def test_keys_that_cannot_sign(
    content: bytes | None,
    problem: str,
    option: str,
    keys: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    assert main(["id-block", "--measurement", DIGEST.hex(), *keys, option, str(path)]) == 2
    run = capsys.readouterr()
    assert run.out == ""
    assert run.err.startswith(f"snpbook: {path}: ")
    assert problem in run.err
    assert run.err.count("\n") == 2
