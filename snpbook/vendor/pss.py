"""RSASSA-PSS with a salt of our choosing, so that a certificate's bytes depend on its content alone.

Libraries draw the salt at random. Here RFC 8017's EMSA-PSS encoding (section 9.1.1) stands in full, for the one
profile that AMD uses: SHA-384, MGF1-SHA-384, a 48-byte salt. Not for secrets: Python's arithmetic takes varying time.
"""

import hmac
from hashlib import sha384

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from snpbook.spec.certificates import PSS_SALT_SIZE

PADDING = padding.PSS(padding.MGF1(hashes.SHA384()), PSS_SALT_SIZE)
SALT_SEED = b"snpbook toy roots"


def sign(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    """The signature of `message`, its salt derived from `SALT_SEED` and the message; verified before it is returned."""
    salt = hmac.digest(SALT_SEED, message, "sha384")
    signature = _private_operation(key, emsa_pss(message, salt, key.key_size - 1)).to_bytes(key.key_size // 8, "big")
    key.public_key().verify(signature, message, PADDING, hashes.SHA384())
    return signature


def emsa_pss(message: bytes, salt: bytes, bits: int) -> int:
    """The encoded message, an integer of at most `bits` bits (the modulus has one more)."""
    size = -(-bits // 8)
    digest = sha384(bytes(8) + sha384(message).digest() + salt).digest()
    block = (b"\x01" + salt).rjust(size - len(digest) - 1, b"\0")
    mask = _mgf1(digest, len(block))
    masked = int.from_bytes(block, "big") ^ int.from_bytes(mask, "big")
    masked &= (1 << (bits - 8 * (len(digest) + 1))) - 1
    return int.from_bytes(masked.to_bytes(len(block), "big") + digest + b"\xbc", "big")


def _mgf1(seed: bytes, size: int) -> bytes:
    blocks = range(-(-size // sha384().digest_size))
    return b"".join(sha384(seed + i.to_bytes(4, "big")).digest() for i in blocks)[:size]


def _private_operation(key: rsa.RSAPrivateKey, value: int) -> int:
    """`value` to the private exponent, by the Chinese remainder theorem (RFC 8017 section 5.1.2)."""
    k = key.private_numbers()
    low, high = pow(value, k.dmq1, k.q), pow(value, k.dmp1, k.p)
    return low + k.q * ((high - low) * k.iqmp % k.p)
