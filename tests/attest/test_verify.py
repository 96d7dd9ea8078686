"""Is it genuine? Real reports under AMD's chains, each flipped byte, and chains of our own with one defect each."""

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.attest.certs import Certificate
from snpbook.attest.chain import MissingCertificate
from snpbook.attest.checks import MalformedEvidence, NotGenuine, Result
from snpbook.attest.roots import Roots, named_roots, own_roots
from snpbook.attest.verify import verify
from snpbook.spec.report import SIGNED_SIZE
from tests.attest.judging import GOOD, failed_check, judged
from tests.attest.own_chain import CHIP_ID, EXPIRES, OwnChain, milan_extensions, text, turin_extensions
from tests.attest.vectors import NOW, REAL, needs_vectors, real_certificates, real_report
from tests.sampling import sampled


@needs_vectors
@pytest.mark.parametrize("name", REAL)
def test_real_report_is_genuine(name: str) -> None:
    verified = verify(real_report(name), real_certificates(name), named_roots("amd"), NOW)
    assert verified.product == name.split("-")[0]
    assert verified.roots == "amd"
    assert {check.result for check in verified.checks} == {Result.PASSED, Result.SKIPPED}
    assert [check.name for check in verified.checks if check.result is Result.SKIPPED] == ["chain.revocation"]


@needs_vectors
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_each_flipped_byte_of_a_real_report_is_noticed(name: str) -> None:
    report, certificates, roots = real_report(name), real_certificates(name), named_roots("amd")
    for offset in range(len(report)):
        forged = bytearray(report)
        forged[offset] ^= 1 << offset % 8
        with pytest.raises(NotGenuine):
            verify(bytes(forged), certificates, roots, NOW)


@needs_vectors
def test_the_signature_alone_catches_what_no_format_check_does() -> None:
    report = bytearray(real_report("milan"))
    report[0x50] ^= 1  # REPORT_DATA is the guest's
    assert failed_check(bytes(report), real_certificates("milan"), named_roots("amd")) == "report.signature"


@needs_vectors
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_each_flipped_byte_of_a_real_vcek_is_noticed(name: str) -> None:
    report, roots = real_report(name), named_roots("amd")
    vcek, *chain = real_certificates(name)
    start = vcek.der.index(vcek.tbs)
    for offset in sampled(range(start, start + len(vcek.tbs)), 400):
        forged = bytearray(vcek.der)
        forged[offset] ^= 0x10
        with pytest.raises(NotGenuine):
            verify(report, [Certificate.read(bytes(forged)), *chain], roots, NOW)


@needs_vectors
def test_real_chain_is_not_genuine_under_the_toy_roots() -> None:
    assert failed_check(real_report("genoa"), real_certificates("genoa"), named_roots("toy")) == "chain.root"


@needs_vectors
def test_order_and_surplus_of_certificates_do_not_matter() -> None:
    pool = [certificate for name in REAL for certificate in real_certificates(name)]
    for name in REAL:
        for certificates in (pool, pool[::-1]):
            verified = verify(real_report(name), certificates, named_roots("amd"), NOW)
            assert verified.chain.vek == real_certificates(name)[0]


def test_of_several_veks_the_one_that_fits_is_chosen_and_of_these_the_latest() -> None:
    others = [GOOD.but(extensions=milan_extensions(tcb)).vek for tcb in ((3, 0, 8, 0xDD), (4, 0, 8, 0xDE))]
    old = GOOD.but(expires=NOW - timedelta(days=1)).vek
    for chip in (CHIP_ID, bytes(64)):
        pool = [*others, old, GOOD.vek, *others, GOOD.ask, GOOD.ark]
        assert verify(GOOD.report(chip_id=chip), pool, GOOD.roots, NOW).chain.vek == GOOD.vek


def test_of_several_veks_of_one_tcb_the_one_that_signed_is_chosen() -> None:
    """A masked chip among others of its kind, and providers that share a TCB."""
    others = [
        GOOD.but(vek_key=ec.derive_private_key(k, ec.SECP384R1()), expires=EXPIRES + timedelta(days=k)) for k in (5, 6)
    ]
    pool = [others[0].vek, GOOD.vek, others[1].vek, GOOD.ask, GOOD.ark]
    assert verify(GOOD.report(chip_id=bytes(64)), pool, GOOD.roots, NOW).chain.vek == GOOD.vek


def test_of_several_veks_none_may_belong_to_the_report() -> None:
    """Then the right one is missing, and is named; a VEK that signed belongs to it, whatever it says."""
    others = [
        GOOD.but(vek_key=ec.derive_private_key(k, ec.SECP384R1()), extensions=milan_extensions((3, 0, k, 0xDE))).vek
        for k in (5, 6)
    ]
    with pytest.raises(MissingCertificate) as refusal:
        verify(GOOD.report(), [*others, GOOD.ask, GOOD.ark], GOOD.roots, NOW, "milan")
    assert f"{CHIP_ID.hex()}?blSPL=03&teeSPL=00&snpSPL=08" in refusal.value.url
    pool = [others[0], GOOD.vek, others[1], GOOD.ask, GOOD.ark]
    assert failed_check(GOOD.report(reported_tcb=0xDD08000000000003), pool, GOOD.roots) == "binding.tcb"
    assert failed_check(GOOD.report(chip_id=b"?" * 64), pool, GOOD.roots) == "binding.chip_id"


def test_a_damaged_copy_of_the_vek_does_not_stand_in_the_way() -> None:
    damaged = Certificate.read(GOOD.vek.der[:-1] + bytes([GOOD.vek.der[-1] ^ 1]))
    for pool in ([damaged, GOOD.vek], [GOOD.vek, damaged]):
        assert verify(GOOD.report(), [*pool, GOOD.ask, GOOD.ark], GOOD.roots, NOW).chain.vek == GOOD.vek
    assert failed_check(GOOD.report(), [damaged, damaged, GOOD.ask, GOOD.ark], GOOD.roots) == "chain.vek.signature"


def test_of_several_issues_one_that_is_valid_is_chosen() -> None:
    later = [GOOD.but(issued=NOW + timedelta(days=9), expires=EXPIRES + timedelta(days=9)), GOOD]
    pool = [certificate for chain in later for certificate in (chain.vek, chain.ask)]
    assert verify(GOOD.report(), [*pool, GOOD.ark], GOOD.roots, NOW).chain.vek == GOOD.vek
    with pytest.raises(NotGenuine, match="not valid at this time"):
        verify(GOOD.report(), [*pool, GOOD.ark], GOOD.roots, NOW + timedelta(days=9999))


def test_a_chain_of_our_own_is_genuine_where_its_root_is_trusted() -> None:
    verified = verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW)
    assert repr(verified) == "<VerifiedReport of milan, roots own, 0000000000000000..>"
    assert verified.chain.vek == GOOD.vek


@pytest.mark.parametrize("name", ["amd", "toy"])
def test_self_made_chain_with_amds_names_is_refused(name: str) -> None:
    assert failed_check(GOOD.report(), GOOD.certificates, named_roots(name)) == "chain.root"


@needs_vectors
def test_self_made_chain_beside_the_real_root_is_refused() -> None:
    """With AMD's ARK at hand, the forged ASK is the one that nobody signed."""
    pool = [*GOOD.certificates[:2], *real_certificates("milan")[2:]]
    assert failed_check(GOOD.report(), pool, named_roots("amd")) == "chain.intermediate.signature"


def test_a_root_inside_the_evidence_is_not_trusted_for_that() -> None:
    assert own_roots("mine", GOOD.certificates).fingerprints == {GOOD.ark.fingerprint}
    assert failed_check(GOOD.report(), GOOD.certificates, Roots("none", frozenset())) == "chain.root"


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"version": 1}, "report.version"),
        ({"version": 6}, "report.version"),
        ({"policy": 0x10000}, "report.policy.one"),
        ({"policy": 0x30000 | 1 << 26}, "report.policy.reserved"),
        ({"policy": 0x30000 | 1 << 63}, "report.policy.reserved"),
        ({"signature_algo": 2}, "report.signature_algo"),
        ({"signing_key": 2}, "report.signing_key"),
        ({"signing_key": 7}, "report.signed"),
        ({"cpuid_family": 0x19}, "report.reserved"),
        ({"launch_mit_vector": 1}, "report.reserved"),
        ({"version": 4, "cpuid_family": 0x19, "cpuid_model": 1, "current_mit_vector": 1}, "report.reserved"),
        ({"version": 3, "cpuid_family": 0x19, "cpuid_model": 0x20}, "report.cpuid"),
        ({"version": 3, "cpuid_family": 0x19, "cpuid_model": 0x11}, "report.product"),
        ({"reported_tcb": 0xDD08000000000003}, "binding.tcb"),
        ({"reported_tcb": 0xDE08000000010003}, "binding.tcb"),
        ({"chip_id": bytes(63) + b"\1"}, "binding.chip_id"),
    ],
)
def test_a_signed_report_with_a_defect(fields: dict[str, object], check: str) -> None:
    assert judged(GOOD, **fields) == check


@pytest.mark.parametrize("offset", [0x48, 0x4B, 0x4C, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x208, 0x29F, 0x330, 0x49F])
def test_reserved_bits_are_refused_by_place(offset: int) -> None:
    body = bytearray(GOOD.report())
    body[offset] = 0x80
    signed = GOOD.sign(bytes(body))[:0x330] + bytes(body[0x330:])
    with pytest.raises(NotGenuine) as refusal:
        verify(signed, GOOD.certificates, GOOD.roots, NOW)
    assert refusal.value.check == "report.reserved"
    assert f"{offset:#05x}" in str(refusal.value.found)


def test_turin_has_its_own_shape() -> None:
    chain = OwnChain(product="Turin", extensions=turin_extensions())
    fields: dict[str, object] = {
        "version": 5, "cpuid_family": 0x1A, "cpuid_model": 2, "reported_tcb": 0x5100000004030201,
        "chip_id": CHIP_ID[:8] + bytes(56), "launch_mit_vector": 0x3F,
    }  # fmt: skip
    verified = verify(chain.report(**fields), chain.certificates, chain.roots, NOW)
    assert str(verified.report.tcb("reported_tcb", "turin")) == "fmc 1 bl 2 tee 3 snp 4 ucode 0x51"
    assert judged(chain, **{**fields, "chip_id": CHIP_ID}) == "binding.chip_id"
    assert judged(chain, **{**fields, "reported_tcb": 0x5100000004030200}) == "binding.tcb"


def test_a_vlek_is_for_a_provider_and_no_chip() -> None:
    extensions = {**milan_extensions(), "2": text("Milan"), "5": text("CN=cloud.example")}
    del extensions["4"]
    chain = OwnChain(extensions=extensions, vek_name="SEV-VLEK", ask_name="SEV-VLEK-Milan")
    for chip in (bytes(64), CHIP_ID):
        verified = verify(chain.report(signing_key=1, chip_id=chip), chain.certificates, chain.roots, NOW)
        assert verified.checks[-1].name == "binding.chip_id"
        assert verified.checks[-1].result is Result.SKIPPED
    assert judged(chain, signing_key=0) == "certificates.vek"


def test_a_refusal_carries_every_check_that_was_made_before_it() -> None:
    made = [check.name for check in verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW).checks]
    for fields, failing in (
        ({"chip_id": b"?" * 64}, "binding.chip_id"),
        ({"signing_key": 7}, "report.signed"),
        ({"reported_tcb": 0}, "binding.tcb"),
    ):
        with pytest.raises(NotGenuine) as refusal:
            verify(GOOD.report(**fields), GOOD.certificates, GOOD.roots, NOW)
        assert [check.name for check in refusal.value.checks] == made[: made.index(failing) + 1]
    with pytest.raises(NotGenuine) as refusal:
        verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW + timedelta(days=9999))
    assert [check.name for check in refusal.value.checks] == made[: made.index(refusal.value.check) + 1]


def test_a_masked_chip_is_skipped_not_passed() -> None:
    verified = verify(GOOD.report(chip_id=bytes(64)), GOOD.certificates, GOOD.roots, NOW)
    assert (verified.checks[-1].name, verified.checks[-1].result) == ("binding.chip_id", Result.SKIPPED)


def test_the_product_may_be_insisted_on() -> None:
    assert verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW, "milan").product == "milan"
    assert failed_check(GOOD.report(), GOOD.certificates, GOOD.roots, "genoa") == "report.product"


def test_a_missing_certificate_is_named_with_its_address() -> None:
    report, kds = GOOD.report(), "https://kdsintf.amd.com/vcek/v1/Milan"
    vcek = f"{kds}/{CHIP_ID.hex()}?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=222"
    for pool, product, check, url in (
        ([GOOD.ask, GOOD.ark], "milan", "certificates.vek", vcek),
        ([GOOD.ask, GOOD.ark], None, "certificates.vek", f"{vcek} or {vcek.replace('Milan', 'Genoa')}"),
        ([GOOD.vek, GOOD.ark], None, "certificates.intermediate", f"{kds}/cert_chain"),
        ([GOOD.vek, GOOD.ask], None, "certificates.root", f"{kds}/cert_chain"),
    ):
        with pytest.raises(MissingCertificate) as refusal:
            verify(report, pool, GOOD.roots, NOW, product)
        assert (refusal.value.check, refusal.value.url) == (check, url)


def test_roots_that_bring_their_certificate_complete_a_chain() -> None:
    roots = own_roots("mine", [GOOD.ark])
    assert verify(GOOD.report(), [GOOD.vek, GOOD.ask], roots, NOW).roots == "mine"


@pytest.mark.parametrize(
    ("component", "check"),
    [(0, "report.signature"), (1 << 384, "report.signature.form"), ((1 << 576) - 1, "report.signature.form")],
)
def test_impossible_signature_components(component: int, check: str) -> None:
    for at in (SIGNED_SIZE, SIGNED_SIZE + 72):
        report = bytearray(GOOD.report())
        report[at : at + 72] = component.to_bytes(72, "little")
        assert failed_check(bytes(report), GOOD.certificates, GOOD.roots) == check


def test_a_report_of_another_length_is_malformed() -> None:
    with pytest.raises(MalformedEvidence, match="1183 bytes"):
        verify(GOOD.report()[:-1], GOOD.certificates, GOOD.roots, NOW)


def test_time_without_a_zone_is_refused_loudly() -> None:
    with pytest.raises(TypeError):
        verify(GOOD.report(), GOOD.certificates, GOOD.roots, NOW.replace(tzinfo=None))


def test_what_version_4_may_have_named_is_told_on_request() -> None:
    milan = {"version": 4, "cpuid_family": 0x19, "cpuid_model": 1}
    report = GOOD.report(**milan, launch_mit_vector=1, current_mit_vector=1 << 63)
    assert failed_check(report, GOOD.certificates, GOOD.roots) == "report.reserved"
    verified = verify(report, GOOD.certificates, GOOD.roots, NOW, allow_newer=True)
    told = {check.name: check for check in verified.checks}["report.unknown"]
    assert (told.result, told.found) == (Result.SKIPPED, "version 4 may have given a meaning to 0x1f8 0x207")
    for version, offset in ((4, 0x208), (4, 0x1EB), (3, 0x1F8), (5, 0x208)):
        body = bytearray(GOOD.report(**{**milan, "version": version}))
        body[offset] = 1
        with pytest.raises(NotGenuine, match="reserves"):
            verify(GOOD.sign(bytes(body)), GOOD.certificates, GOOD.roots, NOW, allow_newer=True)


def test_later_versions_on_request() -> None:
    """What they may have added in the signed part is noted; what nobody signs must still be zero."""
    milan = {"version": 6, "cpuid_family": 0x19, "cpuid_model": 1, "current_mit_vector": 1}
    body = bytearray(GOOD.report(**milan))
    body[0x210] = 1
    report = GOOD.sign(bytes(body))
    assert failed_check(report, GOOD.certificates, GOOD.roots) == "report.version"
    verified = verify(report, GOOD.certificates, GOOD.roots, NOW, allow_newer=True)
    assert "0x210" in str({check.name: check.found for check in verified.checks}["report.unknown"])
    with pytest.raises(NotGenuine, match="reserves"):
        verify(report[:-1] + b"\1", GOOD.certificates, GOOD.roots, NOW, allow_newer=True)
    for version in (0, 1):
        with pytest.raises(NotGenuine, match="version"):
            verify(GOOD.report(version=version), GOOD.certificates, GOOD.roots, NOW, allow_newer=True)
