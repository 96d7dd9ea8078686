"""Do I want it? Each rule met and not met, all of them judged, policies in TOML and Python, values not to be meant."""

import re
from hashlib import sha256, sha384
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snpbook.attest.appraise import DEFAULT_POLICY, OPTIONS, Policy, appraise, check_nonce
from snpbook.attest.checks import Result
from snpbook.attest.rules import RULES
from snpbook.attest.verify import VerifiedReport, verify
from snpbook.spec import guid
from snpbook.spec.policy import Tcb
from tests.attest.own_chain import CHIP_ID, TCB, VEK_KEY, OwnChain, milan_extensions, text, turin_extensions
from tests.attest.vectors import NOW

CHAIN = OwnChain()
DEBUG, MIGRATE, SMT = 1 << 19, 1 << 18, 1 << 16
NEWER = {"version": 5, "cpuid_family": 0x19, "cpuid_model": 1}
COMMITTED = {
    "current_tcb": TCB, "committed_tcb": TCB, "launch_tcb": TCB, "current_major": 1, "current_minor": 55,
    "current_build": 29, "committed_major": 1, "committed_minor": 55, "committed_build": 29,
}  # fmt: skip
KEY_DIGEST = b"k" * 48
PUBLIC = VEK_KEY.public_key()


def key_structure() -> bytes:
    """A public key as the SNP ABI writes it, by hand."""
    point = PUBLIC.public_numbers()
    return b"\2\0\0\0" + point.x.to_bytes(72, "little") + point.y.to_bytes(72, "little") + bytes(0x404 - 148)


def pem_key() -> str:
    return PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def genuine(**fields: object) -> VerifiedReport:
    return verify(CHAIN.report(**fields), CHAIN.certificates, CHAIN.roots, NOW)


def verdict(option: str, verified: VerifiedReport, policy: Policy) -> Result:
    """How one rule ended; every other one passed or was not asked."""
    checks = {check.name.removeprefix("policy."): check for check in appraise(verified, policy).checks}
    assert list(checks) == list(RULES)
    return checks[option].result


TWO_MEASUREMENTS = {"release 1": b"1" * 48, "release 2": "32" * 48}
CASES: dict[str, tuple[object, dict[str, object], dict[str, object]]] = {
    "allow_debug": (False, {}, {"policy": 0x30000 | DEBUG}),
    "allow_migrate_ma": (False, {}, {"policy": 0x30000 | MIGRATE}),
    "guest_policy": (0x100001, {"policy": 0x120001}, {"policy": 0x30001}),
    "minimum_guest_svn": (3, {"guest_svn": 3}, {"guest_svn": 2}),
    "measurement": (b"m" * 48, {"measurement": b"m" * 48}, {"measurement": b"x" * 48}),
    "measurements": (TWO_MEASUREMENTS, {"measurement": b"2" * 48}, {"measurement": b"3" * 48}),
    "report_data": (b"nonce", {"report_data": b"nonce".ljust(64, b"\0")}, {"report_data": b"nonce".ljust(64, b"x")}),
    "host_data": ("aa" * 32, {"host_data": b"\xaa" * 32}, {}),
    "family_id": (b"f" * 16, {"family_id": b"f" * 16}, {}),
    "image_id": (b"i" * 16, {"image_id": b"i" * 16}, {}),
    "report_id": (b"r" * 32, {"report_id": b"r" * 32}, {}),
    "report_id_ma": (b"\xff" * 32, {"report_id_ma": b"\xff" * 32}, {}),
    "vmpl": (0, {"vmpl": 0}, {"vmpl": 0xFFFFFFFF}),
    "chip_id": (CHIP_ID, {}, {"chip_id": bytes(64)}),
    "allowed_chips": ([CHIP_ID], {}, {"signing_key": 1, "chip_id": bytes(64)}),
    "denied_chips": ([b"?" * 64], {}, {"signing_key": 1, "chip_id": bytes(64)}),
    "minimum_tcb": ({"bl": 3, "snp": 8}, {}, {}),
    "minimum_launch_tcb": (TCB, {"launch_tcb": TCB}, {"launch_tcb": 0xDF08000000000002}),
    "require_tcb_order": (True, COMMITTED, {**COMMITTED, "current_tcb": 0xDD09000000000004}),
    "permit_provisional_firmware": (False, COMMITTED, {**COMMITTED, "current_build": 30}),
    "minimum_build": (29, COMMITTED, {**COMMITTED, "current_build": 28}),
    "minimum_version": ("1.55", COMMITTED, {**COMMITTED, "current_minor": 54}),
    "platform_info": (0x25, {"platform_info": 0x24}, {"platform_info": 0x01}),
    "require_alias_check": (True, {"platform_info": 0x20}, {"platform_info": 0x1F}),
    "require_ciphertext_hiding": (True, {"platform_info": 0x10}, {"platform_info": 0x2F}),
    "require_author_key": (True, {"author_key_en": 1, "author_key_digest": KEY_DIGEST}, {"author_key_en": 1}),
    "require_id_block": (True, {"id_key_digest": KEY_DIGEST}, {"author_key_en": 1}),
    "trusted_author_key_hashes": (
        [KEY_DIGEST], {"author_key_en": 1, "author_key_digest": KEY_DIGEST}, {"author_key_digest": KEY_DIGEST},
    ),
    "trusted_id_key_hashes": ([KEY_DIGEST], {"id_key_digest": KEY_DIGEST}, {"id_key_digest": b"?" * 48}),
    "minimum_launch_mitigation_vector": (6, {**NEWER, "launch_mit_vector": 7}, {**NEWER, "launch_mit_vector": 5}),
    "minimum_current_mitigation_vector": (6, {**NEWER, "current_mit_vector": 7}, {}),
    "cert_table_options": ({"vcek": "require", "crl": sha256(b"list").digest()}, {}, {}),
}  # fmt: skip
"""An option's value, fields of a report that meets it, fields of one that does not."""
NOT_BY_FIELDS = {"allowed_chips", "denied_chips", "minimum_tcb", "cert_table_options"}


@pytest.mark.parametrize("option", CASES)
def test_a_rule_is_met(option: str) -> None:
    value, good, _ = CASES[option]
    table = {guid.CERT_VCEK: b"vcek", guid.CERT_CRL: b"list"}
    appraisal = appraise(genuine(**good), Policy(**{option: value}), table)
    assert appraisal.accepted
    assert {check.name: check.result for check in appraisal.checks}[f"policy.{option}"] is Result.PASSED


@pytest.mark.parametrize("option", [option for option in CASES if option not in NOT_BY_FIELDS])
def test_a_rule_is_not_met(option: str) -> None:
    value, _, bad = CASES[option]
    allowed = {"guest_policy": {"allow_debug": True}}.get(option, {})
    assert [check.name for check in appraise(genuine(**bad), Policy(**{option: value, **allowed})).failed] == [
        f"policy.{option}"
    ]


def test_every_option_has_a_rule_and_a_case() -> None:
    assert set(CASES) == set(RULES)
    assert set(OPTIONS) - set(RULES) == {"trusted_author_keys", "trusted_id_keys"}


def test_the_default_policy() -> None:
    appraisal = appraise(genuine())
    assert appraisal.accepted
    assert repr(appraisal) == "<Appraisal by policy default: accepted>"
    for bit, option in ((DEBUG, "allow_debug"), (MIGRATE, "allow_migrate_ma")):
        refused = genuine(policy=0x30000 | bit)
        assert [check.name for check in appraise(refused).failed] == [f"policy.{option}"]
        assert appraise(refused, Policy(**{option: True})).accepted
    asked = [check.name for check in appraise(genuine(), DEFAULT_POLICY).checks if check.result is not Result.SKIPPED]
    assert asked == ["policy.allow_debug", "policy.allow_migrate_ma"]


def test_every_rule_is_judged() -> None:
    verified = genuine(policy=0x30000 | DEBUG, measurement=b"m" * 48)
    appraisal = appraise(verified, Policy("strict", measurement=b"x" * 48, vmpl=2, host_data=b"h" * 32))
    assert [check.name for check in appraisal.failed] == [
        f"policy.{option}" for option in ("allow_debug", "measurement", "host_data", "vmpl")
    ]
    check = appraisal.failed[1]
    assert (check.expected, check.found) == (b"x" * 48, b"m" * 48)


GUEST_POLICIES = [
    (0x30000, 0x30000, ""),
    (0x30000, 0x20000, ""),
    (0x20000, 0x30000, "smt allowed"),
    (0x20000, 0x20000 | DEBUG, "debug allowed"),
    (0x20000, 0x20000 | MIGRATE, "migrate_ma allowed"),
    (0x20000, 0x220000, "cxl_allow allowed"),
    (0x3F20000, 0x3D20000, ""),
    (0x120000, 0x20000, "no single_socket"),
    (0x420000, 0x20000, "no mem_aes_256_xts"),
    (0x820000, 0x20000, "no rapl_dis"),
    (0x1020000, 0x20000, "no ciphertext_hiding"),
    (0x2020000, 0x20000, "no page_swap_disable"),
    (0x20137, 0x20136, "ABI 1.54"),
    (0x20137, 0x20200, ""),
]


@pytest.mark.parametrize(("wanted", "found", "fault"), GUEST_POLICIES)
def test_bounds_of_the_guest_policy(wanted: int, found: int, fault: str) -> None:
    policy = Policy(guest_policy=wanted, allow_debug=True, allow_migrate_ma=True)
    failed = appraise(genuine(policy=found), policy).failed
    assert [check.found for check in failed] == ([fault] if fault else [])


PLATFORMS = [
    (0x25, 0x25, ""), (0x00, 0x01, "smt_en on"), (0x00, 0x02, "tsme_en on"), (0x00, 0x80, "tio_en on"),
    (0x04, 0x00, "ecc_en off"), (0x08, 0x00, "rapl_dis off"), (0x10, 0x00, "ciphertext_hiding_en off"),
    (0x20, 0x00, "alias_check_complete off"), (0x00, 0x3C, ""), (0x25, 0x65, "unknown bit 6 on"), (0x65, 0x65, ""),
    (0x00, 1 << 63, "unknown bit 63 on"), (0x87, 0x04, ""),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "found", "fault"), PLATFORMS)
def test_bounds_of_the_platform_info(wanted: int, found: int, fault: str) -> None:
    failed = appraise(genuine(platform_info=found), Policy(platform_info=wanted)).failed
    assert [check.found for check in failed] == ([fault] if fault else [])


def test_a_guest_policy_that_allows_debugging_does() -> None:
    verified = genuine(policy=0x30000 | DEBUG)
    assert appraise(verified, Policy(guest_policy=0x30000 | DEBUG)).accepted
    assert appraise(verified, Policy(guest_policy={"one": 1, "smt": True, "debug": True})).accepted
    assert not appraise(verified, Policy(guest_policy=0x30000 | DEBUG, allow_debug=False)).accepted


@pytest.mark.parametrize(("floor", "met"), [
    (TCB, True), (0xDE08000000000002, True), (0xDF00000000000000, False), ({"fmc": 1}, False), ({"fmc": 0}, True),
    (Tcb(3, 0, 8, 0xDE), True), (Tcb(3, 1, 0, 0), False), ({"microcode": 0xDF}, False), ({}, True),
])  # fmt: skip
def test_components_of_the_tcb_compare_one_by_one(floor: object, met: bool) -> None:
    assert appraise(genuine(), Policy(minimum_tcb=floor)).accepted is met  # type: ignore[arg-type]


def test_a_turin_has_its_own_order_and_short_chip_ids() -> None:
    chain = OwnChain(product="Turin", extensions=turin_extensions())
    fields = {
        "version": 5, "cpuid_family": 0x1A, "cpuid_model": 2, "reported_tcb": 0x5100000004030201,
        "chip_id": CHIP_ID[:8] + bytes(56), "platform_info": 0x65,
    }  # fmt: skip
    verified = verify(chain.report(**fields), chain.certificates, chain.roots, NOW)
    wanted = Policy(minimum_tcb=0x5100000004030201, allowed_chips=[CHIP_ID[:8].hex()], platform_info=0x65)
    assert appraise(verified, wanted).accepted
    assert not appraise(verified, Policy(minimum_tcb={"fmc": 2})).accepted
    assert not appraise(verified, Policy(denied_chips=[CHIP_ID[:8]])).accepted


def test_firmware_that_is_not_committed() -> None:
    ahead = {**COMMITTED, "committed_minor": 54, "committed_build": 99, "committed_tcb": 0xDD08000000000003}
    for fields, strict, permitted in (
        (COMMITTED, True, True),
        (ahead, False, True),
        ({**COMMITTED, "committed_build": 30}, False, False),
        ({**COMMITTED, "committed_tcb": 0xDF00000000000000}, False, False),
    ):
        for permit, met in ((False, strict), (True, permitted)):
            assert appraise(genuine(**fields), Policy(permit_provisional_firmware=permit)).accepted is met


def test_a_masked_chip_is_known_by_its_vcek_and_unknown_under_a_vlek() -> None:
    masked = genuine(chip_id=bytes(64))
    assert masked.chip_id == CHIP_ID
    assert appraise(masked, Policy(allowed_chips=[CHIP_ID])).accepted
    assert not appraise(masked, Policy(denied_chips=[CHIP_ID])).accepted
    assert not appraise(masked, Policy(allowed_chips=[])).accepted
    extensions = {**milan_extensions(), "2": text("Milan"), "5": text("CN=cloud.example")}
    del extensions["4"]
    chain = OwnChain(extensions=extensions, vek_name="SEV-VLEK", ask_name="SEV-VLEK-Milan")
    verified = verify(chain.report(signing_key=1, chip_id=bytes(64)), chain.certificates, chain.roots, NOW)
    for option in ("allowed_chips", "denied_chips"):
        assert not appraise(verified, Policy(**{option: [CHIP_ID]})).accepted


def test_trust_in_keys() -> None:
    other = b"o" * 48
    keys = Policy(trusted_id_keys=[pem_key()], trusted_author_keys=[key_structure()], trusted_id_key_hashes=[other])
    digest = sha384(key_structure()).digest()
    assert keys.trusted_ids == {digest, other}
    assert keys.trusted_authors == {digest}
    author = {"author_key_en": 1, "author_key_digest": digest}
    for fields, met in (
        ({"id_key_digest": digest}, True),
        ({"id_key_digest": other}, True),
        ({"id_key_digest": b"?" * 48, **author}, True),  # a trusted author vouches for any ID key
        ({"id_key_digest": b"?" * 48, "author_key_digest": digest}, False),
        ({"id_key_digest": b"?" * 48}, False),
        ({}, False),
    ):
        assert appraise(genuine(**fields), keys).accepted is met
    strict = Policy(require_author_key=True, trusted_author_keys=[key_structure()], trusted_id_keys=[key_structure()])
    assert not appraise(genuine(id_key_digest=digest), strict).accepted
    assert appraise(genuine(id_key_digest=digest, **author), strict).accepted
    zeros = Policy(trusted_id_key_hashes=[bytes(48)], trusted_author_key_hashes=[bytes(48)])
    assert not appraise(genuine(author_key_en=1), zeros).accepted


def test_the_evidences_table() -> None:
    wanted = Policy(cert_table_options={"vcek": "require", str(guid.CERT_CRL): sha256(b"list").hexdigest()})
    table = {guid.CERT_VCEK: b"", guid.CERT_CRL: b"list"}
    assert appraise(genuine(), wanted, table).accepted
    for broken in ({}, {guid.CERT_CRL: b"list"}, {**table, guid.CERT_CRL: b"another"}):
        assert [check.name for check in appraise(genuine(), wanted, broken).failed] == ["policy.cert_table_options"]


def test_names_of_measurements_are_told() -> None:
    wanted = Policy(measurements=TWO_MEASUREMENTS)
    checks = {check.name: check for check in appraise(genuine(measurement=b"2" * 48), wanted).checks}
    assert checks["policy.measurements"].found == "release 2"


def test_the_nonce() -> None:
    verified = genuine(report_data=b"nonce".ljust(64, b"\0"))
    for nonce, result in ((b"nonce", "passed"), (b"nonce\0", "passed"), (b"nonc", "failed"), (b"\0", "failed")):
        assert check_nonce(verified, nonce).result == result
    for nonce in (b"", b"n" * 65):
        with pytest.raises(ValueError, match="1 to 64"):
            check_nonce(verified, nonce)


TOML = f"""
name = "production"
measurements = {{ "release 1" = "{"31" * 48}" }}
minimum_tcb = {{ bl = 3, tee = 0, snp = 8, ucode = 0xDE }}
minimum_launch_tcb = 0xDE08000000000003
guest_policy = {{ abi_minor = 1, one = 1, smt = 1 }}
platform_info = 0x25
vmpl = 0
minimum_version = "1.51"
allowed_chips = ["{CHIP_ID.hex()}"]
trusted_id_key_hashes = ["{KEY_DIGEST.hex()}"]
trusted_author_keys = ['''{pem_key()}''']
permit_provisional_firmware = true
cert_table_options = {{ ark = "require" }}
"""


def test_toml_and_python_say_the_same() -> None:
    assert Policy.from_toml(TOML) == Policy(
        "production",
        measurements={"release 1": b"1" * 48},
        minimum_tcb=Tcb(3, 0, 8, 0xDE),
        minimum_launch_tcb=TCB,
        guest_policy=0x30001,
        platform_info=0x25,
        vmpl=0,
        minimum_version=(1, 51),
        allowed_chips=[CHIP_ID],
        trusted_id_key_hashes=[KEY_DIGEST],
        trusted_author_keys=[key_structure()],
        permit_provisional_firmware=True,
        cert_table_options={"ark": "require"},
    )
    assert Policy.from_toml("", "file").name == "file"


@pytest.mark.parametrize("document", [
    "mesurement = 1", "allow_debug = 1", "vmpl = 4", "vmpl = -1", "vmpl = true", "vmpl = 'x'", "measurement = 'ab'",
    "measurement = 12", "measurement = 'zz'", "report_data = ''", f"report_data = '{'00' * 65}'", "host_data = 'aa'",
    "chip_id = 'aabb'", "allowed_chips = 'aa'", "allowed_chips = ['aa']", "minimum_tcb = {blSPL = 1}",
    "minimum_tcb = {bl = 256}", "minimum_version = '1.x'", "minimum_version = 65536", "guest_policy = {smp = 1}",
    "guest_policy = {smt = 2}", "platform_info = 'no'", "trusted_id_keys = ['aa']", "measurements = ['aa']",
    "trusted_id_keys = ['-----BEGIN PUBLIC KEY-----']", "cert_table_options = {vcek = 'maybe'}", "minimum_build = 256",
    "cert_table_options = {nobody = 'require'}", "require_id_block = 'yes'", "name = 5", "name = ",
    "report_id_ma = 1.5", "minimum_version = [1]", "cert_table_options = 1",
])  # fmt: skip
def test_a_policy_that_cannot_be_meant(document: str) -> None:
    with pytest.raises(ValueError, match=document.split()[0] if document != "name = " else "Invalid"):
        Policy.from_toml(document)


def test_a_key_on_another_curve_is_no_id_key() -> None:
    key = ec.derive_private_key(5, ec.SECP256R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ValueError, match=r"trusted_id_keys.*P-384"):
        Policy(trusted_id_keys=[pem])


def test_every_option_is_told() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    told = {
        word
        for line in page.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert told == {"name", *OPTIONS}
