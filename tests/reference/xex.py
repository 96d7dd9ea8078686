"""XE and XEX with AES-128 block by block, as the papers write it: the slow form that the vectorised one must equal."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def tweak(constants: list[bytes], spa: int) -> bytes:
    """T(p): the XOR of t_i over the set address bits i >= 4; `constants` starts with t_4."""
    total = 0
    for bit in range(4, spa.bit_length()):
        if spa & 1 << bit:
            total ^= int.from_bytes(constants[bit - 4], "big")
    return total.to_bytes(16, "big")


def encrypt(constants: list[bytes], key: bytes, spa: int, plain: bytes, *, after: bool = True) -> bytes:
    """C = E(P ^ T(p)) ^ T(p), or C = E(P ^ T(p)) without `after`, for each block p from `spa`, a multiple of 16."""
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    result = b""
    for offset in range(0, len(plain), 16):
        t = tweak(constants, spa + offset)
        block = ecb.update(xor(plain[offset : offset + 16], t))
        result += xor(block, t) if after else block
    return result


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))
