"""Published and recomputed vectors, with the layouts as the only thing of the library: digests, MACs, keys, messages.

The algorithms are written out here, from the documents.
"""

from __future__ import annotations

import base64
import hmac
from hashlib import sha256, sha384
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from snpbook.spec.key_derivation import (
    GUEST_KEY_LABEL,
    KEK_LABEL,
    KEY_MIX,
    KIK_LABEL,
    MASTER_SECRET_LABEL,
    GuestField,
    IdKeySelect,
    RootKey,
)
from snpbook.spec.launch import ID_AUTH, ID_BLOCK, PAGE_INFO, PUBLIC_KEY, SIGNATURE
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import MEASURE_INPUT, MEASUREMENT, MacContext
from snpbook.spec.messages import AAD_FROM, MESSAGE_HEADER, MessageType, iv
from snpbook.spec.pages import LaunchPage
from snpbook.spec.payloads import REPORT_REQUEST, TSC_NOMINAL_KHZ, TSC_SCALE_FRACTION_BITS
from snpbook.spec.report import SIGNATURE_COMPONENT
from snpbook.spec.sev_certificates import (
    AMD_CERTIFICATE_MODULUS_BITS,
    AMD_CERTIFICATES,
    CERT_SIGNED_SIZE,
    KEY_ALGOS,
    SEV_CERTIFICATE,
    SIGNERS,
    CertAlgo,
    CertUsage,
)
from snpbook.spec.swap import swap_iv

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
COUNTING = bytes(range(32))
ZERO_PAGE = bytes(4096)


def kdf(key: bytes, label: str, context: bytes, size: int) -> bytes:
    """One block is enough here."""
    text = (1).to_bytes(4, "little") + label.encode() + b"\0" + context + (8 * size).to_bytes(4, "little")
    return hmac.digest(key, text, "sha256")[:size]


def extended(digest: bytes, kind: LaunchPage, gpa: int, *, contents: bytes = bytes(48), **perms: int) -> bytes:
    info = PAGE_INFO.pack(digest_cur=digest, contents=contents, length=0x70, page_type=kind, gpa=gpa, **perms)
    return sha384(info).digest()


CHAIN = [
    (LaunchPage.NORMAL, 0, "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100"
     "cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20"),
    (LaunchPage.ZERO, 0x1000, "3bb77aec4f0d90c147b6b7884b6bd5741994d2575305f896"
     "39c95186690d949261186702ef51f2fa7c0dd4c90f03ebfd"),
    (LaunchPage.UNMEASURED, 0x2000, "2904df3d88c1174e011bf113d78e2e6a25a8d43cbe047460"
     "257dc617210d9dbad410737337d3abcb02c82f3fff625df4"),
    (LaunchPage.SECRETS, 0x3000, "be5cbd2d68b9649eaa74bf51925b7722aeafd3df80590e24"
     "a91e6007453a529685fdbfde9c5ec0e2cd0def6f0e65f220"),
    (LaunchPage.CPUID, 0x4000, "43af46e6b20bf630da0dbc6392e51fee9dfa805945d2411f"
     "0ed748bd44e3601c016e737b423dc8af9fd91b48bc8c5cca"),
    (LaunchPage.VMSA, 0xFFFFFFFFF000, "f6741910fc3349f40b1f443300a3ca65c5046c5405db1dc4"
     "2b13ae3d5cd36382e55114593fd48a9d80da790dbabd7b9d"),
]  # fmt: skip


def test_launch_digest_chain() -> None:
    digest = bytes(48)
    for kind, gpa, expected in CHAIN:
        measured = kind in (LaunchPage.NORMAL, LaunchPage.VMSA)
        digest = extended(digest, kind, gpa, contents=sha384(ZERO_PAGE).digest() if measured else bytes(48))
        assert digest.hex() == expected, kind.name


def test_launch_digest_with_permissions_and_of_a_large_page() -> None:
    zeros = sha384(ZERO_PAGE).digest()
    perms = {"vmpl1_perms": 0xF, "vmpl2_perms": 3, "vmpl3_perms": 1}
    assert extended(bytes(48), LaunchPage.NORMAL, 0, contents=zeros, **perms).hex() == (
        "113f3016280394f88f6032595b95396c5bb25d3f37596dcee79bd474ab3259ead8ba3a856afdafa2dbc0aabcf19059b8"
    )
    digest = bytes(48)
    for page in range(512):
        digest = extended(digest, LaunchPage.NORMAL, 0x200000 + page * 0x1000, contents=zeros)
    assert digest.hex() == (
        "d6b9a916f116fab05cb1aec1c3c0bde4eaca07c0384bb94002ebacc58422cfbcf9a34dba18df1f28e20b5a0c4819c313"
    )


def test_session_keys() -> None:
    zero = bytes(16)
    master = kdf(zero, MASTER_SECRET_LABEL, zero, 16)
    assert master.hex() == "ab4d269fcc62bedb4511d56c386ce706"
    assert kdf(master, KEK_LABEL, b"", 16).hex() == "b6abfbfb75ea1ea74ed8750b8afdb973"
    assert kdf(master, KIK_LABEL, b"", 16).hex() == "53b524bf5669a363f365c864acba8572"


def test_legacy_measurement() -> None:
    """As published with AMDESE/sev-tool: API 0.18, build 15."""
    mnonce = bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554")
    text = MEASURE_INPUT.pack(
        context=MacContext.MEASURE, api_major=0, api_minor=18, build=15, launch_digest=sha256().digest(), mnonce=mnonce
    )
    measure = hmac.digest(bytes.fromhex("66320db73158a35a255d051758e95ed4"), text, "sha256")
    assert MEASUREMENT.pack(measure=measure, mnonce=mnonce).hex() == (
        "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea4fbe0bedbad6c86ae8f68971d103e554"
    )


def test_derived_guest_keys() -> None:
    root = RootKey.VMRK
    plain = KEY_MIX.pack(root_key_select=root, id_key_select=IdKeySelect.NONE)
    assert kdf(COUNTING, GUEST_KEY_LABEL, plain, 32).hex() == (
        "6993a6a3e44681e220ed2d38af1d846b5b6a644e2755062c0566a597378cac9b"
    )
    selected = GuestField.POLICY | GuestField.MEASUREMENT | GuestField.GUEST_SVN | GuestField.TCB_VERSION
    assert selected == 0x39
    measured = sha384(b"x").digest()[:32]
    mix = KEY_MIX.pack(root_key_select=root, guest_field_select=selected, vmpl=1, policy=0x30000, measurement=measured)
    assert kdf(COUNTING, GUEST_KEY_LABEL, mix, 32).hex() == (
        "0818a6d09a8a989604c3c45604e541dac23d1658598a7f462ef43b6011e6e20e"
    )


def test_sealed_report_request() -> None:
    header = MESSAGE_HEADER.record(
        msg_seqno=1, algo=1, hdr_version=1, hdr_size=0x60, msg_type=MessageType.REPORT_REQ, msg_version=1, msg_size=0x60
    )
    payload = REPORT_REQUEST.pack(report_data=bytes(range(64)))
    sealed = AESGCM(COUNTING).encrypt(iv(1), payload, bytes(header)[AAD_FROM:])
    assert sealed[-16:].hex() == "0f354f26b13f7433d3674d8eebcaf847"
    assert sealed[:16].hex() == "e22d803ca0aaea00420d0fc830cc86c4"
    message = bytes(header.replace(authtag=sealed[-16:].ljust(32, b"\0"))) + sealed[:-16]
    assert sha256(message).hexdigest() == "37986d2e2816e933c1e342b05eac83a78b121d632b6090da8dff837967ad24aa"


@pytest.mark.parametrize(
    ("count", "tag"), [(0, "ce6c14a95fcb4a550918ef286dc4bb6a"), (1, "96060880f97e4efca1859f2bb2c050ec")]
)
def test_page_that_is_swapped_out(count: int, tag: str) -> None:
    sealed = AESGCM(COUNTING).encrypt(swap_iv(count), ZERO_PAGE, None)
    assert sealed[-16:].hex() == tag
    assert count or sealed[:16].hex() == "0ebcb5deb52c83bd08a8a935182c9199"


def test_scale_of_the_guests_clock() -> None:
    """2 GHz on Genoa, whose TSC_FACTOR is 200."""
    mean = TSC_NOMINAL_KHZ - 200
    assert -(-(2_000_000 << TSC_SCALE_FRACTION_BITS) // mean) == 0x140A42B182


# Files: an ID block with its authentication, and a whole legacy chain.

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="the public vectors are not at hand")


def le(data: bytes) -> int:
    return int.from_bytes(data, "little")


def ec_key(data: bytes) -> ec.EllipticCurvePublicKey:
    key = PUBLIC_KEY.unpack(data)
    assert key.curve == 2
    return ec.EllipticCurvePublicNumbers(le(key.qx), le(key.qy), ec.SECP384R1()).public_key()


def ecdsa(data: bytes) -> bytes:
    signature = SIGNATURE.unpack(data)
    assert len(signature.r) == SIGNATURE_COMPONENT
    return encode_dss_signature(le(signature.r), le(signature.s))


@needs_vectors
def test_id_block_and_authentication() -> None:
    folder = VECTORS / "launch"
    block = (folder / "auth_block.bin").read_bytes()
    auth = ID_AUTH.unpack(block)
    assert (auth.id_key_algo, auth.author_key_algo) == (1, 1)
    assert auth.id_block_signature == (folder / "id_sig.bin").read_bytes()
    assert auth.id_key_signature == (folder / "auth_sig.bin").read_bytes()
    assert bytes(auth) == block
    for name, packed in (("id_key", auth.id_key), ("author_key", auth.author_key)):
        private = load_pem_private_key((folder / f"{name}.pem").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.public_key().public_numbers() == ec_key(packed).public_numbers()
    start = base64.b64decode("oU1jg0HlZ0Yo/h4C++3r5eWrT68d1y2JZgaOYVu5nv0T0hSzXCMXFbOOJj3GBZdF")
    id_block = ID_BLOCK.pack(launch_digest=start, version=1, policy=0x30000)
    ec_key(auth.id_key).verify(ecdsa(auth.id_block_signature), id_block, ec.ECDSA(hashes.SHA384()))
    ec_key(auth.author_key).verify(ecdsa(auth.id_key_signature), auth.id_key, ec.ECDSA(hashes.SHA384()))


def amd(name: str) -> tuple[Record, bytes]:
    data = (VECTORS / "legacy" / f"naples_{name}.cert").read_bytes()
    layout = AMD_CERTIFICATES[le(data[AMD_CERTIFICATE_MODULUS_BITS : AMD_CERTIFICATE_MODULUS_BITS + 4])]
    assert layout.size == len(data)
    return layout.unpack(data), data


def sev(name: str) -> tuple[Record, bytes]:
    data = (VECTORS / "legacy" / f"naples_{name}.cert").read_bytes()
    return SEV_CERTIFICATE.unpack(data), data


def rsa_verify(signer: Record, signature: bytes, signed: bytes) -> None:
    key = rsa.RSAPublicNumbers(le(signer.exponent), le(signer.modulus)).public_key()
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
    key.verify(signature[: key.key_size // 8][::-1], signed, pss, hashes.SHA256())


@needs_vectors
def test_real_naples_chain() -> None:
    """Usages, algorithms, signers and the extent of each signature are what the tables say."""
    (ark, ark_data), (ask, ask_data) = amd("ark"), amd("ask")
    assert (ark.key_usage, ask.key_usage) == (CertUsage.ARK, CertUsage.ASK)
    assert ark.key_id == ark.certifying_id == ask.certifying_id
    for record, data in ((ark, ark_data), (ask, ask_data)):
        rsa_verify(ark, record.signature, data[: record.layout.offset("signature")])
    chain = {CertUsage[name.upper()]: sev(name) for name in ("pdh", "pek", "oca", "cek")}
    for usage, (record, data) in chain.items():
        assert record.version == 1
        assert (record.pubkey_usage, record.pubkey_algo) == (usage, KEY_ALGOS[usage])
        assert not SEV_CERTIFICATE.reserved_set(data)
        slots = ((record.sig1_usage, record.sig1_algo, record.sig1), (record.sig2_usage, record.sig2_algo, record.sig2))
        signers = [(who, algo, signature) for who, algo, signature in slots if who is not CertUsage.INVALID]
        assert {who for who, *_ in signers} == set(SIGNERS[usage])
        for who, algo, signature in signers:
            if who is CertUsage.ASK:
                assert algo is CertAlgo.RSA_SHA256
                rsa_verify(ask, signature, data[:CERT_SIGNED_SIZE])
            else:
                assert algo is CertAlgo.ECDSA_SHA256
                signer = ec_key(chain[who][0].pubkey)
                signer.verify(ecdsa(signature), data[:CERT_SIGNED_SIZE], ec.ECDSA(hashes.SHA256()))
