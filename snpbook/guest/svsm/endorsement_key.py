"""The vTPM's endorsement key: an RSA-2048 key that follows from a seed, as a TPM's primary keys do.

The seed is all that there is of it: whoever reads the page where it lies has the key. How a TPM derives primes from a
seed is its maker's choice; here candidates are SHA-256 in counter mode (MODEL). Source: TCG TPM 2.0 Library part 1,
primary object generation.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from itertools import count
from math import gcd

from snpbook.spec.tpm import EK_BITS, EK_EXPONENT

_ROUNDS = 8
_SMALL_PRIMES = [n for n in range(3, 2000, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2))]


@cache
def modulus(seed: bytes) -> int:
    """The public modulus of the key."""
    p = _prime(seed, b"p")
    q = _prime(seed, b"q")
    return p * q


def _prime(seed: bytes, label: bytes) -> int:
    """A prime of half the modulus' length, its two highest bits set, to which the exponent is coprime."""
    for number in count():
        blocks = (sha256(seed + label + bytes([i]) + number.to_bytes(4, "big")).digest() for i in range(EK_BITS // 512))
        candidate = int.from_bytes(b"".join(blocks), "big") | 3 << EK_BITS // 2 - 2 | 1
        if gcd(candidate - 1, EK_EXPONENT) == 1 and _is_prime(candidate):
            return candidate
    raise AssertionError


def _is_prime(candidate: int) -> bool:
    """Miller-Rabin with the first bases that are prime."""
    if any(candidate % small == 0 for small in _SMALL_PRIMES):
        return False
    twos = (candidate - 1 & 1 - candidate).bit_length() - 1
    odd = candidate - 1 >> twos
    for base in (2, *_SMALL_PRIMES[: _ROUNDS - 1]):
        value = pow(base, odd, candidate)
        if value in (1, candidate - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % candidate
            if value == candidate - 1:
                break
        else:
            return False
    return True
