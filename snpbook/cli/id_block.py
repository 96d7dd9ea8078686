"""`snpbook id-block`: the signed identity that a host gives an SNP guest at its launch.

Flags and output are those of snp-create-id-block (sev-snp-measure 0.0.13): one line that QEMU takes as options of its
sev-snp-guest object, then the key digests that reports will carry. Beyond that tool, the owner's numbers and the
policy can be chosen, and the author left out.
"""

from __future__ import annotations

from base64 import b64decode, b64encode

import click

from snpbook.attest.id_block import PrivateKey, UnusableKey, create, load_key
from snpbook.cli.errors import Malformed, read_input
from snpbook.cli.words import Hex, Word
from snpbook.spec.launch import DIGEST_SIZE, OWNER_ID_SIZE
from snpbook.spec.policy import DEFAULT_POLICY

NO_ID = bytes(OWNER_ID_SIZE)


class Measurement(click.ParamType[bytes]):
    """A click type: a launch digest in either form in which `snpbook measure` prints one."""

    name = "measurement"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The digest; a usage error where the text is none."""
        if isinstance(value, bytes):
            return value
        try:
            digest = bytes.fromhex(value) if len(value) == 2 * DIGEST_SIZE else b64decode(value, validate=True)
        except ValueError:
            digest = b""
        if len(digest) != DIGEST_SIZE:
            self.fail(f"{value!r} is no launch digest of {DIGEST_SIZE} bytes in base64 or hexadecimal", param, ctx)
        return digest


@click.command("id-block", no_args_is_help=False)
@click.option("--measurement", type=Measurement(), metavar="VALUE", required=True, help="Launch digest, base64 or hex.")
@click.option("--idkey", metavar="FILE", required=True, help="ID key: a private key on P-384, PEM.")
@click.option("--authorkey", metavar="FILE", help="Author key, which vouches for the ID key.")
@click.option("--family-id", type=Hex(OWNER_ID_SIZE), metavar="HEX", default=NO_ID, help="Family of guests.")
@click.option("--image-id", type=Hex(OWNER_ID_SIZE), metavar="HEX", default=NO_ID, help="Image of this guest.")
@click.option("--guest-svn", type=Word(32), metavar="N", default=0, help="Security version of the guest.")
@click.option(
    "--policy", type=Word(64), metavar="VALUE", default=DEFAULT_POLICY, help="Guest policy (default 0x30000)."
)
def id_block(
    measurement: bytes,
    idkey: str,
    authorkey: str | None,
    family_id: bytes,
    image_id: bytes,
    guest_svn: int,
    policy: int,
) -> None:
    """Create an ID block with its ID authentication information.

    With --authorkey QEMU needs author-key-enabled=on as well. Flags and output are those of snp-create-id-block.
    """
    author = _key(authorkey) if authorkey else None
    made = create(
        measurement,
        _key(idkey),
        author,
        family_id=family_id,
        image_id=image_id,
        guest_svn=guest_svn,
        policy=policy,
    )
    click.echo(f"id-block={_base64(made.block)},id-auth={_base64(made.auth)}")
    click.echo(f"id_key_hash: {_base64(made.id_key_digest)}")
    if author:
        click.echo(f"author_key: {_base64(made.author_key_digest)}")


def _key(path: str) -> PrivateKey:
    try:
        return load_key(read_input(path))
    except UnusableKey as error:
        remedy = "openssl ecparam -name secp384r1 -genkey -noout makes a key."
        raise Malformed(f"{path}: {error}", remedy) from error


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
