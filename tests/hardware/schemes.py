"""The memory ciphers of every generation: constants, key sizes, and ciphertext by the slow references."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from snpbook.hardware.dram import Bytes
from snpbook.hardware.tweaks import boot_constants, naples_constants
from tests.reference import xex as reference

PAGE = 4096
KEY_SIZES = {"naples-xe": 16, "naples-xex": 16, "xex-aes-128": 16, "xts-aes-256": 64}
SCHEMES = list(KEY_SIZES)
SEED = b"machine"
BOOT, NAPLES = boot_constants(SEED), naples_constants()
CONSTANTS = {
    "naples-xe": [constant.value for constant in NAPLES],
    "naples-xex": [constant.value for constant in NAPLES],
    "xex-aes-128": [constant.value for constant in BOOT],
}
LINEAR = list(CONSTANTS)


def random_bytes(size: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def expected(scheme: str, key: bytes, spa: int, plain: bytes) -> bytes:
    """The reference for every scheme; `plain` starts at a page for XTS."""
    if scheme != "xts-aes-256":
        return reference.encrypt(CONSTANTS[scheme], key, spa, plain, after=scheme != "naples-xe")
    result = b""
    for start in range(0, len(plain), PAGE):
        number = ((spa + start) // PAGE).to_bytes(16, "little")
        result += Cipher(algorithms.AES(key), modes.XTS(number)).encryptor().update(plain[start : start + PAGE])
    return result
