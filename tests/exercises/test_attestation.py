"""The twelve pieces: all genuine, five with a fault, and each option of the reference's policy is needed."""

from snpbook.attest.appraise import Policy, appraise
from snpbook.exercises.attestation import DECIDING, forgeable, new_enough, policy
from snpbook.exercises.pieces import AUTHOR, NONCE, TCB, pieces, thirteenth


def admitted(**options: object) -> set[str]:
    wanted = Policy(**options)  # type: ignore[arg-type]
    return {piece.name for piece in pieces() if appraise(piece.verified, wanted).accepted}


def test_seven_of_twelve_are_admitted_and_no_option_can_go() -> None:
    options = policy(NONCE, AUTHOR, TCB)
    acceptable = {piece.name for piece in pieces() if not piece.fault}
    assert (len(pieces()), len(acceptable)) == (12, 7)
    assert admitted(**options) == acceptable
    for name in options:
        assert len(admitted(**{option: value for option, value in options.items() if option != name})) == 8


def test_a_policy_is_as_good_an_answer_as_its_options() -> None:
    for answer in (policy, lambda *asked: Policy(**policy(*asked)), lambda *_: Policy()):
        met = [case.run(answer) == case.expected for case in DECIDING.cases()]
        assert all(met) == (answer(NONCE, AUTHOR, TCB) != Policy())


def test_the_thirteenth_is_genuine_and_admitted() -> None:
    verified = thirteenth().verified
    assert appraise(verified, Policy(**policy(NONCE, AUTHOR, TCB))).accepted
    assert verified.report.fields.report_id != pieces()[0].verified.report.fields.report_id


def test_numbers_of_real_reports() -> None:
    """The committed and the current TCB of an Azure Milan, and of one whose SNP byte differs."""
    assert new_enough(0xCE08000000000003, 0x7308000000000003)
    assert not new_enough(0x7305000000000002, 0x7306000000000002)
    assert forgeable(bytes([3, 0, 0, 0, 0, 0, 8, 0xCE]), bytes([3, 0, 0, 0, 0, 0, 8, 0x73]))
    assert not forgeable(bytes([3, 0, 0, 0, 0, 0, 8, 0x73]), bytes([3, 0, 0, 0, 0, 0, 8, 0xCE]))
