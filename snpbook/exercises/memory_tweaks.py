"""Exercises on the linear tweak: find its constants, move a block, and plant a block of one's own choice.

These are the steps of the published attacks on Naples (Du et al., 2017; SEVurity, 2020), each run on an engine of the
model. A host that knows the constants needs no key for any of them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from numbers import Integral

import numpy as np

from snpbook.exercises.memory_encryption import GUEST, machine
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.spec.encryption import KeyId

Constants = Mapping[int, bytes]
"""By address bit, 16 bytes each."""

_CITE = "SEVurity (Wilke et al., 2020), section on the tweak"
_BITS = range(4, 21)
_TARGET = 0x1F0730
_KNOWN = b"known everywhere"


def xor(one: bytes, other: bytes) -> bytes:
    """Two blocks, bit by bit."""
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _constants(engine: MemoryEncryption) -> Constants:
    """The constants of the bits that addresses of a small machine have."""
    return {constant.bit: constant.value for constant in engine.constants if constant.bit in _BITS}


def _moved(engine: MemoryEncryption, source: int, destination: int, mask: bytes = bytes(16)) -> bytes:
    """What the guest reads at `destination` once the host has copied a block there from `source`."""
    cipher = engine.read(KeyId.UNENCRYPTED, source, 16)
    engine.write(KeyId.UNENCRYPTED, destination, xor(cipher, mask))
    return engine.read(GUEST, destination, 16)


def _as_bytes(block: object) -> object:
    """A reader's block, whatever it is made of."""
    return bytes(block) if isinstance(block, bytearray | list | tuple | np.ndarray) else block


# 5: the constants


def _constant_cases() -> list[Case]:
    def case(name: str, spa: int, bits: tuple[int, ...], rule: str) -> Case:
        def run(answer: Answer) -> object:
            engine = machine("naples-xe")
            engine.write(GUEST, spa, b"a known message.")
            found = answer(b"a known message.", spa, lambda to: _moved(engine, spa, to), bits)
            return {bit: _as_bytes(v) for bit, v in found.items()} if isinstance(found, Mapping) else found

        known = _constants(machine("naples-xe"))
        return Case(name, run, {bit: known[bit] for bit in bits}, rule, _CITE)

    return [
        case("t4 from a message at address 0", 0, (4,),
             "the guest reads m ⊕ T(p ⊕ q): XOR the message away"),
        case("t4, t5 and t6 from a message elsewhere", 0x1000, (4, 5, 6),
             "p and q must differ in one bit alone, so that T(p ⊕ q) is its constant"),
        case("bits that are set in the message's address", 0xD5550, (4, 6, 8, 16, 5),
             "flip the bit with p ^ (1 << bit): adding carries into the next bits where it is set"),
        case("every bit", 0x0, tuple(_BITS), "one move for each bit is enough"),
    ]  # fmt: skip


def find_constants(
    message: bytes, spa: int, read_moved: Callable[[int], bytes], bits: Iterable[int]
) -> dict[int, bytes]:
    """The constant of each address bit, from a known message at `spa`."""
    result = {}
    for bit in bits:
        seen = read_moved(spa ^ (1 << bit))
        result[bit] = bytes(a ^ b for a, b in zip(seen, message, strict=True))
    return result


def _forgets_the_message(message: bytes, spa: int, read_moved: Callable[[int], bytes], bits: Iterable[int]) -> object:
    return {bit: read_moved(spa ^ 1 << bit) for bit in bits}


def _as_numbers(message: bytes, spa: int, read_moved: Callable[[int], bytes], bits: Iterable[int]) -> object:
    return {bit: int.from_bytes(c, "little") for bit, c in find_constants(message, spa, read_moved, bits).items()}


def _moves_to_the_bit(message: bytes, spa: int, read_moved: Callable[[int], bytes], bits: Iterable[int]) -> object:
    return {bit: xor(message, read_moved(1 << bit)) for bit in bits}


def _adds(message: bytes, spa: int, read_moved: Callable[[int], bytes], bits: Iterable[int]) -> object:
    return {bit: xor(message, read_moved(spa + (1 << bit))) for bit in bits}


register(
    Exercise(
        id="memory_encryption.5",
        title="The constants of Naples",
        minutes=15,
        difficulty=2,
        prerequisites=("the lab on Naples", "XOR of bytes"),
        task=(
            "On an EPYC 7251 (XE) you are the host. A guest has a message of 16 bytes, which you know, at the address "
            "spa. read_moved(q) copies its ciphertext to the address q and tells what the guest then reads there. "
            "Return a dict from each bit of `bits` to its constant, 16 bytes."
        ),
        stub='''\
def find_constants(message, spa, read_moved, bits):
    """The constant of each address bit, from a known message at `spa`."""
    ...
''',
        reference=find_constants,
        wrong=(
            Wrong(_forgets_the_message, "XOR the message away"),
            Wrong(_as_numbers, "expected 16 bytes, found a number"),
            Wrong(_moves_to_the_bit, "must differ in one bit alone"),
            Wrong(_adds, "adding carries"),
        ),
        hints=(
            "The identity of the lab: Dec(Enc(m, p), q) = m ⊕ T(p ⊕ q). For which q is T(p ⊕ q) a single constant?",
            "T(1 << bit) is t_bit. So q has to be p with just this bit flipped.",
            "For each bit: seen = read_moved(spa ^ (1 << bit)); the constant is seen XOR message, byte by byte.",
        ),
        solution=(
            "One known block and one move for each bit give the whole function. That is how Du et al. and the authors "
            "of SEVurity read Naples's constants off real machines, without any key."
        ),
        cases=_constant_cases,
    )
)


# 6: the mask


def _mask_cases() -> list[Case]:
    def case(name: str, source: int, destination: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            engine = machine("naples-xex")
            engine.write(GUEST, source, b"pay one euro to:")
            mask = _as_bytes(answer(_constants(engine), source, destination))
            if not isinstance(mask, bytes) or len(mask) != 16:
                return mask
            return _moved(engine, source, destination, mask)

        bits = [bit for bit in _BITS if (source ^ destination) >> bit & 1]
        known = _constants(machine("naples-xex"))
        seen = reduce(xor, (known[bit] for bit in bits), b"pay one euro to:")
        return Case(f"{name}; the guest then reads", run, seen, rule, _CITE)

    return [
        case("from address 0 to the next block", 0, 0x10,
             "XEX adds the tweak behind AES as well: without the XOR of both tweaks the block turns to nonsense"),
        case("between blocks of another page", 0x1000, 0x1010,
             "the tweak of the source must go and that of the destination come: T(p) ⊕ T(q)"),
        case("where more than one bit differs", 0x1010, 0x1020,
             "T depends on the bits that differ, p ^ q, not on the distance q - p"),
        case("from the first page to the last", 0x7F0, 0x1FF800, "every bit from 4 up that differs counts"),
    ]  # fmt: skip


def move_mask(constants: Constants, source: int, destination: int) -> bytes:
    """What to XOR on the ciphertext of an XEX block when it is moved."""
    mask = bytes(16)
    for bit, constant in constants.items():
        if (source ^ destination) >> bit & 1:
            mask = bytes(a ^ b for a, b in zip(mask, constant, strict=True))
    return mask


def _no_mask(constants: Constants, source: int, destination: int) -> bytes:
    return bytes(16)


def _as_a_number(constants: Constants, source: int, destination: int) -> int:
    return int.from_bytes(move_mask(constants, source, destination), "little")


def _destination_only(constants: Constants, source: int, destination: int) -> bytes:
    return move_mask(constants, 0, destination)


def _distance(constants: Constants, source: int, destination: int) -> bytes:
    return move_mask(constants, 0, abs(destination - source))


register(
    Exercise(
        id="memory_encryption.6",
        title="Move a block",
        minutes=15,
        difficulty=2,
        prerequisites=("exercise 5",),
        task=(
            "On an EPYC 7401P (XEX) you know the constants, a dict from address bit to 16 bytes. Return the 16 bytes "
            "that the host must XOR on the ciphertext when it moves a block from the address `source` to "
            "`destination`, so that the guest reads m ⊕ T(p) ⊕ T(q) there and not nonsense."
        ),
        stub='''\
def move_mask(constants, source, destination):
    """What to XOR on the ciphertext of an XEX block when it is moved."""
    ...
''',
        reference=move_mask,
        wrong=(
            Wrong(_no_mask, "behind AES as well"),
            Wrong(_as_a_number, "expected 16 bytes, found a number"),
            Wrong(_destination_only, "the tweak of the source must go"),
            Wrong(_distance, "not on the distance"),
        ),
        hints=(
            "C = E(m ⊕ T(p)) ⊕ T(p). What has to stand behind AES for the block to decrypt at q?",
            "T(p) ⊕ T(q) is the XOR of the constants of those bits in which p and q differ.",
            "Start with bytes(16). For each bit, constant: if (source ^ destination) >> bit & 1, XOR the constant on.",
        ),
        solution=(
            "The mask takes T(p) away and brings T(q), so that AES itself sees the input it made. What is left is the "
            "difference before AES: the guest reads m ⊕ T(p) ⊕ T(q), a known change of all 16 bytes. XE needs no mask "
            "at all, and gives the same."
        ),
        cases=_mask_cases,
    )
)


# 7: a block of one's own choice


def _plant_cases() -> list[Case]:
    def case(name: str, bits: Iterable[int], rule: str, *, reachable: bool = True) -> Case:
        def run(answer: Answer) -> object:
            engine = machine("naples-xex")
            known = _constants(engine)
            wanted = reduce(xor, (known[bit] for bit in bits), bytes(16))
            wanted = wanted if reachable else xor(wanted, bytes(15) + b"\x01")
            source = answer(known, _KNOWN, xor(_KNOWN, wanted), _TARGET)
            if source is None or source is Ellipsis or not reachable:
                return source
            if not isinstance(source, Integral) or source % 16 or source not in range(engine.size):
                return f"{source}, which is the address of no block"
            engine.write(GUEST, int(source), _KNOWN)
            seen = _moved(engine, int(source), _TARGET, move_mask(known, int(source), _TARGET))
            return "the wanted block" if seen == xor(_KNOWN, wanted) else f"{seen.hex()} from {int(source):#x}"

        return Case(name, run, "the wanted block" if reachable else -1, rule, _CITE)

    return [
        case("one constant away", (9,), "source and destination differ in the bits of d: source = destination ^ d"),
        case("two constants away", (5, 12), "T(d) is the XOR of several constants: one alone need not be enough"),
        case("many constants away", (4, 6, 7, 11, 13, 14, 17, 20),
             "this is a system of linear equations over XOR: eliminate bit by bit, or try all 131,072 differences"),
        case("a block that no move gives", (5, 8), "17 constants span few of all blocks: return -1 for the others",
             reachable=False),
    ]  # fmt: skip


def source_for(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int:
    """From where to move the block `known`, so that the guest reads `wanted` at the destination; -1 if from nowhere."""
    basis: list[tuple[int, int]] = []  # XOR of some constants and their address bits, without top bits of those before
    for bit, constant in constants.items():
        value, used = int.from_bytes(constant, "big"), 1 << bit
        for other, others in basis:
            if value ^ other < value:
                value, used = value ^ other, used ^ others
        if value:
            basis.append((value, used))
    rest, difference = int.from_bytes(known, "big") ^ int.from_bytes(wanted, "big"), 0
    for value, used in basis:
        if rest ^ value < rest:
            rest, difference = rest ^ value, difference ^ used
    return -1 if rest else destination ^ difference


def _forgets_the_destination(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int:
    source = source_for(constants, known, wanted, destination)
    return source if source < 0 else source ^ destination


def _one_constant(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int:
    found = [bit for bit, constant in constants.items() if constant == xor(known, wanted)]
    return destination ^ 1 << found[0] if found else -1


def _pairs(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int:
    for one in constants:
        for other in constants:
            value = constants[one] if one == other else xor(constants[one], constants[other])
            if value == xor(known, wanted):
                return destination ^ (1 << one | 1 << other)
    return -1


def _says_nothing_of_others(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int | None:
    found = [bit for bit, constant in constants.items() if constant == xor(known, wanted)]
    return destination ^ 1 << found[0] if found else None


def _nothing_where_there_is_none(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int | None:
    source = source_for(constants, known, wanted, destination)
    return None if source < 0 else source


def _never_gives_up(constants: Constants, known: bytes, wanted: bytes, destination: int) -> int:
    return max(source_for(constants, known, wanted, destination), 0)


register(
    Exercise(
        id="memory_encryption.7",
        title="Plant a block",
        minutes=30,
        difficulty=3,
        prerequisites=("exercise 6", "linear equations, or patience"),
        task=(
            "The guest has the block `known` in many places; you want it to read `wanted` at the address "
            "`destination`. Return the address from which to move the block there (with the mask of exercise 6), or "
            "-1 if there is none. `constants` are those of the bits 4 to 20: the machine has 2 MB of memory."
        ),
        stub='''\
def source_for(constants, known, wanted, destination):
    """From where to move the block `known`, so that the guest reads `wanted` at the destination; -1 if from nowhere."""
    ...
''',
        reference=source_for,
        wrong=(
            Wrong(_forgets_the_destination, "source = destination ^ d"),
            Wrong(_one_constant, "one alone need not be enough"),
            Wrong(_says_nothing_of_others, "one alone need not be enough (your function does not return a value here)"),
            Wrong(_pairs, "eliminate bit by bit"),
            Wrong(_nothing_where_there_is_none, "for the others (your function does not return a value here)"),
            Wrong(_never_gives_up, "return -1 for the others"),
        ),
        hints=(
            "You need a difference d of addresses with T(d) = known ⊕ wanted. Then source = destination ^ d.",
            "T(d) is the XOR of constants: which subset gives known ⊕ wanted? There are 2 ** 17 subsets, few enough to "
            "try them all with Python's integers; Gaussian elimination is faster.",
            "Keep a dict from XOR to address bits: start with {0: 0}, and for each constant add every entry combined "
            "with it. Then look known ⊕ wanted up.",
        ),
        solution=(
            "Because T is linear, finding the address is solving linear equations over bits. Constants that repeat 4 "
            "bytes leave at most 32 bits of a block to choose; SEVurity's authors strung such partly chosen blocks "
            "together with jumps, until they had code of their own running. A tweak that takes a key ends it."
        ),
        cases=_plant_cases,
    )
)
