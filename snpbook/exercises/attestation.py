"""Exercises of the chapter on attestation: binding a key, comparing TCBs, a policy for twelve, and what a leak costs.

What is expected is asked of the relying party's own code and of the key derivation, never written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from snpbook.attest.appraise import Policy, appraise
from snpbook.attest.release import report_data
from snpbook.exercises.pieces import AUTHOR, NONCE, TCB, Piece, pieces
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.firmware.keys import hashsticks, lower_stick
from snpbook.spec.policy import Tcb

SNP, FIRMWARE = "SNP ABI, TCB_VERSION", "SNP ABI, VCEK derivation"

# 1: binding a key


def _binding_cases() -> list[Case]:
    def case(name: str, nonce: bytes, key: bytes, rule: str) -> Case:
        return Case(name, lambda answer: answer(nonce, key), report_data(nonce, key), rule, "SNP ABI, MSG_REPORT_REQ")

    return [
        case("a nonce of 32 bytes", bytes(range(32)), b"key " * 30, "64 bytes: SHA-512 fills REPORT_DATA"),
        case("another nonce", bytes(32), b"key " * 30, "the nonce makes the report fresh: it goes in first"),
        case("another key", bytes(range(32)), b"KEY " * 30, "the key makes the secret reach this guest alone"),
    ]


BIND_STUB = '''\
def bind(nonce, public_key):
    """The 64 bytes of REPORT_DATA that bind the owner's nonce and the guest's key."""
    ...
'''


def bind(nonce: bytes, public_key: bytes) -> bytes:
    """The 64 bytes of REPORT_DATA that bind the owner's nonce and the guest's key."""
    import hashlib

    return hashlib.sha512(nonce + public_key).digest()


def _nonce_alone(nonce: bytes, public_key: bytes) -> bytes:
    return nonce.ljust(64, b"\0")


def _key_first(nonce: bytes, public_key: bytes) -> bytes:
    import hashlib

    return hashlib.sha512(public_key + nonce).digest()


BINDING = register(
    Exercise(
        id="attestation.1",
        title="Bind a key",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "The owner sends `nonce`, the guest has made a key pair; `public_key` is its DER. Return the 64 bytes that "
            "the guest asks to have in its report: SHA-512 over the nonce and then the key."
        ),
        stub=BIND_STUB,
        reference=bind,
        wrong=(Wrong(_nonce_alone, "SHA-512 fills REPORT_DATA"), Wrong(_key_first, "SHA-512 fills REPORT_DATA")),
        hints=(
            "REPORT_DATA is the only field that the guest itself chooses; it has 64 bytes.",
            "hashlib.sha512(...).digest() has 64 bytes.",
            "hashlib.sha512(nonce + public_key).digest()",
        ),
        solution=(
            "Without the nonce an old report would do; without the key the host could put its own in place of the "
            "guest's and read the secret on its way."
        ),
        cases=_binding_cases,
    )
)

# 2: comparing TCBs


def _tcb_cases() -> list[Case]:
    def case(name: str, found: Tcb, least: Tcb, rule: str) -> Case:
        return Case(name, lambda answer: answer(int(found), int(least)), found.at_least(least), rule, SNP)

    return [
        case("the same", TCB, TCB, "equal is enough"),
        case("newer firmware", Tcb(10, 0, 24, 84), TCB, "one component above, none below"),
        case("older firmware, newer microcode", Tcb(10, 0, 22, 93), TCB, "component by component, never as one number"),
        case("older boot loader, the rest newer", Tcb(9, 1, 30, 99), TCB, "the boot loader is the lowest byte"),
        case("newer boot loader, older microcode", Tcb(12, 0, 30, 83), TCB, "microcode is the highest byte"),
        case("older TEE, the rest newer", Tcb(12, 0, 30, 99), Tcb(10, 1, 23, 84), "the TEE is the second byte"),
    ]


TCB_STUB = '''\
def new_enough(tcb, minimum):
    """Whether no component of a Genoa's TCB_VERSION is below the minimum's."""
    ...
'''


def new_enough(tcb: int, minimum: int) -> bool:
    """Whether no component of a Genoa's TCB_VERSION is below the minimum's."""
    found, least = tcb.to_bytes(8, "little"), minimum.to_bytes(8, "little")
    return all(mine >= wanted for mine, wanted in zip(found, least, strict=True))


def _as_number(tcb: int, minimum: int) -> bool:
    return tcb >= minimum


def _strictly(tcb: int, minimum: int) -> bool:
    return all(a > b for a, b in zip(tcb.to_bytes(8, "little"), minimum.to_bytes(8, "little"), strict=True))


def _without_tee(tcb: int, minimum: int) -> bool:
    found, least = tcb.to_bytes(8, "little"), minimum.to_bytes(8, "little")
    return found[0] >= least[0] and all(mine >= wanted for mine, wanted in zip(found[6:], least[6:], strict=True))


COMPARING = register(
    Exercise(
        id="attestation.2",
        title="New enough?",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "`tcb` and `minimum` are two TCB_VERSIONs of a Genoa as numbers: boot loader, TEE, four reserved bytes, "
            "SNP firmware, microcode, from the lowest byte to the highest. Return whether `tcb` is new enough."
        ),
        stub=TCB_STUB,
        reference=new_enough,
        wrong=(
            Wrong(_as_number, "never as one number"),
            Wrong(_strictly, "equal is enough"),
            Wrong(_without_tee, "the TEE is the second byte"),
        ),
        hints=(
            "A host can be new in one part and old in another. Which one does the attacker need?",
            "tcb.to_bytes(8, 'little') gives the components.",
            "all(mine >= least for mine, least in zip(...))",
        ),
        solution="A hole in one component is a hole: each must be at least what is asked, whatever the others are.",
        cases=_tcb_cases,
    )
)

# 3: a policy for twelve


def _policy_cases() -> list[Case]:
    def run(piece: Piece, answer: Answer) -> object:
        wanted = answer(NONCE, AUTHOR, TCB)
        if isinstance(wanted, Mapping):
            wanted = Policy(**wanted)
        if not isinstance(wanted, Policy):
            return wanted
        return "accepted" if appraise(piece.verified, wanted).accepted else "refused"

    fine = "nothing is wrong with this one: ask for no more than you need"
    return [
        Case(
            piece.name,
            partial(run, piece),
            "refused" if piece.fault else "accepted",
            piece.fault or fine,
            "snpbook.attest.appraise",
        )
        for piece in pieces()
    ]


POLICY_STUB = '''\
def policy(nonce, author, tcb):
    """The options of a policy that admits the seven and refuses the five."""
    ...  # {"vmpl": ..., ...}
'''


def policy(nonce: bytes, author: bytes, tcb: Tcb) -> dict[str, Any]:
    """The options of a policy that admits the seven and refuses the five."""
    return {"report_data": nonce, "trusted_author_key_hashes": [author], "minimum_tcb": tcb, "vmpl": 0}


def _default(nonce: bytes, author: bytes, tcb: Tcb) -> dict[str, Any]:
    return {"report_data": nonce}


def _bit_alone(nonce: bytes, author: bytes, tcb: Tcb) -> dict[str, Any]:
    return {"report_data": nonce, "minimum_tcb": tcb, "vmpl": 0}


def _too_strict(nonce: bytes, author: bytes, tcb: Tcb) -> dict[str, Any]:
    chip = pieces()[0].verified.chip_id
    return {**policy(nonce, author, tcb), "allowed_chips": [chip]}


DECIDING = register(
    Exercise(
        id="attestation.3",
        title="A policy for twelve",
        minutes=25,
        difficulty=2,
        prerequisites=("attestation.1", "attestation.2"),
        task=(
            "`lab.pieces()` shows twelve pieces of genuine evidence; seven are acceptable. `nonce` is what REPORT_DATA "
            "must be, `author` the digest of the author key that you trust, `tcb` what you ask for at least. Return "
            "the options of a policy, as a dict, that admits exactly the seven."
        ),
        stub=POLICY_STUB,
        reference=policy,
        wrong=(
            Wrong(_default, "VMPL 3"),
            Wrong(_bit_alone, "nobody signed anything"),
            Wrong(_too_strict, "ask for no more than you need"),
        ),
        hints=(
            "Debugging is refused unless you allow it. For each of the others that you do not want, find the field "
            "that gives it away.",
            "The options have the names of snpbook.attest.appraise.Policy: report_data, vmpl, minimum_tcb and one "
            "about keys.",
            "A digest of zeros is never a trusted one: trusted_author_key_hashes=[author] catches the last.",
        ),
        solution=(
            "Four options do it. AUTHOR_KEY_EN alone proves nothing: firmware sets the bit when the host says so, even "
            "without an ID block; the digest is what counts. A list of chips would refuse the second chip and the "
            "provider's key, which names no chip."
        ),
        cases=_policy_cases,
    )
)

# 4: what a leak costs


def _leak_cases() -> list[Case]:
    def reachable(held: Tcb, wanted: Tcb) -> bool:
        try:
            lower_stick(hashsticks(bytes(48), held), held, wanted)
        except ValueError:
            return False
        return True

    def case(name: str, held: Tcb, wanted: Tcb, rule: str) -> Case:
        def run(answer: Answer) -> object:
            return answer(int(held).to_bytes(8, "little"), int(wanted).to_bytes(8, "little"))

        return Case(name, run, reachable(held, wanted), rule, FIRMWARE)

    return [
        case("the same TCB", TCB, TCB, "who has the sticks has the key"),
        case("older firmware", TCB, Tcb(10, 0, 20, 84), "hashing leads down"),
        case("newer microcode", TCB, Tcb(10, 0, 23, 85), "and never up"),
        case(
            "older boot loader, newer firmware", TCB, Tcb(9, 0, 40, 200),
            "each component is seeded by the one before it: below a lowered one, everything can be reached",
        ),
        case("older firmware, newer microcode", TCB, Tcb(10, 0, 22, 200), "the boot loader is not the only seed"),
        case("newer boot loader, all else older", TCB, Tcb(11, 0, 1, 1), "the first that differs decides"),
    ]  # fmt: skip


LEAK_STUB = '''\
def forgeable(leaked, reported):
    """Whether who has the hashsticks of one TCB can make the key of another; both are the 8 bytes of a TCB_VERSION."""
    ...
'''


def forgeable(leaked: bytes, reported: bytes) -> bool:
    """Whether who has the hashsticks of one TCB can make the key of another; both are the 8 bytes of a TCB_VERSION."""
    return reported <= leaked


def _each_component(leaked: bytes, reported: bytes) -> bool:
    return all(there <= had for had, there in zip(leaked, reported, strict=True))


def _only_that_one(leaked: bytes, reported: bytes) -> bool:
    return leaked == reported


def _boot_loader_alone(leaked: bytes, reported: bytes) -> bool:
    return reported[0] < leaked[0] or _each_component(leaked, reported)


LEAK = register(
    Exercise(
        id="attestation.4",
        title="What a leak costs",
        minutes=15,
        difficulty=3,
        prerequisites=("attestation.2",),
        task=(
            "Somebody has read the chip's hashsticks at TCB `leaked`, all eight. Return whether they can make the VCEK "
            "of TCB `reported`, and so forge its reports. Both are 8 bytes, the boot loader first."
        ),
        stub=LEAK_STUB,
        reference=forgeable,
        wrong=(
            Wrong(_each_component, "seeded by the one before it"),
            Wrong(_only_that_one, "hashing leads down"),
            Wrong(_boot_loader_alone, "not the only seed"),
        ),
        hints=(
            "A stick of version n is the hash of the stick of version n + 1. Which way can you go?",
            "The seed of the next component is made from the last stick of this one. What if this one is lowered?",
            "Find the first byte that differs: it decides. Bytes in Python compare just so.",
        ),
        solution=(
            "The keys are ordered like words in a dictionary: the first component that differs decides. So after a "
            "leak ask for a minimum that is itself out of reach, newer than the leak in the first component in which "
            "the two differ. Whatever is at least that, component by component, is then out of reach as well."
        ),
        cases=_leak_cases,
    )
)
