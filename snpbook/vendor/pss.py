"""RSASSA-PSS with a salt of our choosing, so that a certificate's bytes depend on its content alone.

Libraries draw the salt at random. Here RFC 8017's EMSA-PSS encoding (section 9.1.1) stands in full, for the profile
that AMD uses: SHA-384 (on Naples SHA-256), MGF1 with the same, a salt as long. Not for secrets: Python's arithmetic
takes varying time.
"""

import hashlib
import hmac

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from snpbook.spec.certificates import PSS_SALT_SIZE

SHA384 = hashes.SHA384()
PADDING = padding.PSS(padding.MGF1(SHA384), PSS_SALT_SIZE)
SALT_SEED = b"snpbook toy roots"


def sign(key: rsa.RSAPrivateKey, message: bytes, algorithm: hashes.HashAlgorithm = SHA384) -> bytes:
    """The signature of `message`, its salt derived from `SALT_SEED` and the message; verified before it is returned."""
    salt = hmac.digest(SALT_SEED, message, algorithm.name)
    encoded = emsa_pss(message, salt, key.key_size - 1, algorithm.name)
    signature = _private_operation(key, encoded).to_bytes(key.key_size // 8, "big")
    key.public_key().verify(signature, message, padding.PSS(padding.MGF1(algorithm), len(salt)), algorithm)
    return signature


def emsa_pss(message: bytes, salt: bytes, bits: int, algorithm: str = SHA384.name) -> int:
    """The encoded message, an integer of at most `bits` bits (the modulus has one more)."""
    size = -(-bits // 8)
    digest = hashlib.new(algorithm, bytes(8) + hashlib.new(algorithm, message).digest() + salt).digest()
    block = (b"\x01" + salt).rjust(size - len(digest) - 1, b"\0")
    mask = _mgf1(digest, len(block), algorithm)
    masked = int.from_bytes(block, "big") ^ int.from_bytes(mask, "big")
    masked &= (1 << (bits - 8 * (len(digest) + 1))) - 1
    return int.from_bytes(masked.to_bytes(len(block), "big") + digest + b"\xbc", "big")


def _mgf1(seed: bytes, size: int, algorithm: str) -> bytes:
    blocks = range(-(-size // len(seed)))  # the seed is a digest
    return b"".join(hashlib.new(algorithm, seed + i.to_bytes(4, "big")).digest() for i in blocks)[:size]


def _private_operation(key: rsa.RSAPrivateKey, value: int) -> int:
    """`value` to the private exponent, by the Chinese remainder theorem (RFC 8017 section 5.1.2)."""
    k = key.private_numbers()
    low, high = pow(value, k.dmq1, k.q), pow(value, k.dmp1, k.p)
    return low + k.q * ((high - low) * k.iqmp % k.p)
