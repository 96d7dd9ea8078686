"""The broker: a secret goes to the guest that it was made for, once, in time, and every attempt is written down."""

from collections.abc import Callable
from datetime import timedelta
from hashlib import sha512

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snpbook.attest.appraise import Policy
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.release import LIFETIME, Broker, Event, ReleaseRefused, report_data, spki, unseal
from snpbook.attest.roots import named_roots
from snpbook.spec.refusal import Refusal
from snpbook.system import NOW, System
from tests.attest.own_chain import ISSUED, OwnChain, toy_key
from tests.machines import counting_rng

CHAIN = OwnChain()
RNG = counting_rng(b"broker")
SECRET, TIME = b"the disk's key, 32 bytes of it..", ISSUED + timedelta(days=100)
KEY, OTHER_KEY = (ec.derive_private_key(number, ec.SECP384R1()) for number in (0x6E57, 0x0BAD))
SECOND = timedelta(seconds=1)


def broker(**policy: object) -> Broker:
    return Broker(SECRET, Policy("test", **policy), CHAIN.roots, RNG)  # type: ignore[arg-type]


def ask(
    keeper: Broker,
    nonce: bytes,
    now: timedelta = SECOND,
    key: bytes = spki(KEY),
    bound: bytes | None = None,
    change: Callable[[bytes], bytes] = bytes,
    **fields: object,
) -> bytes:
    """Ask with a report over `bound`, good unless something says otherwise."""
    bound = report_data(nonce, key) if bound is None else bound
    report = change(CHAIN.report(**{"report_data": bound, **fields}))
    return keeper.release(nonce, key, report, CHAIN.certificates, TIME + now)


def test_report_data_is_the_hash_of_nonce_and_key() -> None:
    der = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert (spki(KEY), len(der)) == (der, 120)
    assert report_data(b"nonce", der) == sha512(b"nonce" + der).digest()


def test_a_simulated_guest_gets_its_secret() -> None:
    system = System("milan", "release")
    system.host.boot()
    guest = system.create_vm()
    guest.launch()
    policy = Policy("disk", measurement=system.owner(guest).expected_measurement)
    keeper = Broker(SECRET, policy, named_roots("toy"), RNG)
    certificates = [Certificate.read(der) for der in system.certificates()]

    nonce = keeper.challenge(NOW)
    report = guest.request_report(report_data(nonce, spki(KEY)))
    sealed = keeper.release(nonce, spki(KEY), report, certificates, NOW + SECOND)
    assert SECRET not in sealed
    assert unseal(sealed, KEY, nonce) == SECRET
    for key, number in ((OTHER_KEY, nonce), (KEY, bytes(32))):
        with pytest.raises(ReleaseRefused, match="not for this key and nonce"):
            unseal(sealed, key, number)
    changed = bytes([sealed[0], sealed[1] ^ 1]) + sealed[2:]
    for broken in (changed, sealed[:-1], b""):
        with pytest.raises(ReleaseRefused, match="was changed"):
            unseal(broken, KEY, nonce)
    assert [entry.event for entry in keeper.audit] == [Event.CHALLENGED, Event.RELEASED]
    assert policy.measurement is not None
    assert bytes(policy.measurement).hex() in keeper.audit[-1].reason  # type: ignore[arg-type]
    assert system.chip.chip_id.hex() in keeper.audit[-1].reason


def test_a_nonce_is_good_for_one_attempt() -> None:
    keeper = broker()
    nonce = keeper.challenge(TIME)
    assert unseal(ask(keeper, nonce), KEY, nonce) == SECRET
    with pytest.raises(ReleaseRefused, match="never given out, or was used"):
        ask(keeper, nonce)
    failed = keeper.challenge(TIME)
    with pytest.raises(ReleaseRefused, match="another nonce or another key"):
        ask(keeper, failed, bound=bytes(64))
    with pytest.raises(ReleaseRefused, match="never given out, or was used"):
        ask(keeper, failed)


def test_a_nonce_is_the_brokers_own_and_never_the_same() -> None:
    keeper = broker()
    nonces = {keeper.challenge(TIME) for _ in range(10)}
    assert len(nonces) == 10
    for stranger in (bytes(32), b"", b"n" * 10_000, broker().challenge(TIME)):
        with pytest.raises(ReleaseRefused) as caught:
            ask(keeper, stranger)
        assert caught.value.check == "nonce.known"
    assert all(len(entry.nonce) <= 64 for entry in keeper.audit)


@pytest.mark.parametrize(
    ("age", "accepted"), [(timedelta(), True), (LIFETIME, True), (LIFETIME + SECOND, False), (-SECOND, False)]
)
def test_a_nonce_is_fresh_for_five_minutes(age: timedelta, accepted: bool) -> None:
    keeper = broker()
    nonce = keeper.challenge(TIME)
    if accepted:
        assert unseal(ask(keeper, nonce, age), KEY, nonce) == SECRET
        return
    with pytest.raises(ReleaseRefused) as caught:
        ask(keeper, nonce, age)
    assert caught.value.check == "nonce.fresh"


def test_old_nonces_are_forgotten() -> None:
    keeper = broker()
    for minute in range(1000):
        keeper.challenge(TIME + minute * timedelta(minutes=1))
    assert len(keeper._pending) == 6


def test_another_guests_report_does_not_serve() -> None:
    """The host has a genuine report over the nonce, and a key of its own."""
    keeper = broker()
    nonce = keeper.challenge(TIME)
    with pytest.raises(ReleaseRefused) as caught:
        ask(keeper, nonce, key=spki(OTHER_KEY), bound=report_data(nonce, spki(KEY)))
    assert caught.value.check == "binding.report_data"
    nonce = keeper.challenge(TIME)
    with pytest.raises(ReleaseRefused) as caught:
        ask(keeper, nonce, bound=nonce.ljust(64, b"\0"))
    assert caught.value.check == "binding.report_data"


def test_what_the_policy_does_not_want_is_refused_with_every_reason() -> None:
    keeper = broker(measurement=b"m" * 48, vmpl=0)
    nonce = keeper.challenge(TIME)
    with pytest.raises(ReleaseRefused, match=r"policy\.allow_debug, policy\.measurement|policy\.measurement") as caught:
        ask(keeper, nonce, policy=0xB0000)
    assert caught.value.check.startswith("policy.")
    assert all(name in keeper.audit[-1].reason for name in ("policy.allow_debug", "policy.measurement"))
    nonce = keeper.challenge(TIME)
    assert unseal(ask(keeper, nonce, measurement=b"m" * 48), KEY, nonce) == SECRET


def test_what_is_not_genuine_is_refused_first() -> None:
    keeper = broker()
    for change, error in (
        (lambda report: report[:0x90] + b"m" * 48 + report[0xC0:], NotGenuine),
        (lambda report: report[:-1], MalformedEvidence),
        (lambda report: b"", MalformedEvidence),
    ):
        nonce = keeper.challenge(TIME)
        with pytest.raises(error):
            ask(keeper, nonce, change=change)
        assert keeper.audit[-1].event is Event.REFUSED
    foreign = Broker(SECRET, Policy("test"), named_roots("toy"), RNG)
    with pytest.raises(NotGenuine):
        ask(foreign, foreign.challenge(TIME))
    late = keeper.challenge(CHAIN.expires)
    with pytest.raises(NotGenuine, match="not valid at this time"):
        ask(keeper, late, CHAIN.expires + SECOND - TIME)


def keys() -> dict[str, bytes]:
    point = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    good = spki(KEY)
    compressed = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    header = bytes.fromhex("3046301006072a8648ce3d020106052b81040022033200")
    return {
        "key.curve rsa": toy_key("ask").public_key().public_bytes(*point),
        "key.curve p256": ec.derive_private_key(7, ec.SECP256R1()).public_key().public_bytes(*point),
        "key.spki empty": b"",
        "key.spki rubbish": b"\x30\x03\x02\x01\x00",
        "key.spki tail": good + b"\0",
        "key.spki off the curve": good[:-1] + bytes([good[-1] ^ 1]),
        "key.spki compressed": header + compressed,
    }


@pytest.mark.parametrize(("name", "key"), keys().items(), ids=keys())
def test_only_one_form_of_key_is_taken(name: str, key: bytes) -> None:
    keeper = broker()
    nonce = keeper.challenge(TIME)
    with pytest.raises(ReleaseRefused) as caught:
        ask(keeper, nonce, key=key)
    assert caught.value.check == name.split()[0]


def test_the_log_tells_all_and_no_secret() -> None:
    keeper = broker()
    nonces = [keeper.challenge(TIME) for _ in range(2)]
    ask(keeper, nonces[0])
    with pytest.raises(Refusal):
        ask(keeper, nonces[0])
    with pytest.raises(Refusal):
        ask(keeper, nonces[1], policy=0xB0000)
    challenged, released, refused = Event.CHALLENGED, Event.RELEASED, Event.REFUSED
    expected = [(challenged, 0), (challenged, 1), (released, 0), (refused, 0), (refused, 1)]
    assert [(entry.event, entry.nonce) for entry in keeper.audit] == [(event, nonces[i].hex()) for event, i in expected]
    assert [entry.time for entry in keeper.audit] == [TIME] * 2 + [TIME + SECOND] * 3
    assert SECRET.hex() not in repr(keeper.audit)
    assert SECRET.decode() not in repr(keeper.audit) + repr(keeper)
