"""What of TPM 2.0 the SVSM's vTPM speaks: codes of commands and answers, and the public area of its endorsement key.

Sources: TCG TPM 2.0 Library parts 2 and 3, numbers from memory; TCG EK Credential Profile (template L-1) as
COCONUT-SVSM has it. Everything of a TPM is big-endian.
"""

from __future__ import annotations

from enum import IntEnum


class TpmCommand(IntEnum):
    """TPM_CC of the commands that the model's vTPM executes; any other is TPM_RC_COMMAND_CODE."""

    STARTUP = 0x144
    READ_PUBLIC = 0x173
    GET_CAPABILITY = 0x17A
    GET_RANDOM = 0x17B
    PCR_READ = 0x17E
    PCR_EXTEND = 0x182


class TpmCode(IntEnum):
    """TPM_RC: what a command is answered with. Those below 0x100 gain what they are about (`about`)."""

    SUCCESS = 0x000
    BAD_TAG = 0x01E
    HASH = 0x083
    VALUE = 0x084
    HANDLE = 0x08B
    AUTH_FAIL = 0x08E
    SIZE = 0x095
    INSUFFICIENT = 0x09A
    INITIALIZE = 0x100
    AUTH_MISSING = 0x125
    COMMAND_SIZE = 0x142
    COMMAND_CODE = 0x143
    AUTHSIZE = 0x144
    LOCALITY = 0x907


_PARAMETER, _SESSION, _NUMBER_SHIFT = 0x40, 0x800, 8


def about(code: TpmCode, *, parameter: int = 0, handle: int = 0, session: int = 0) -> int:
    """A code with the parameter, handle or session that it is about, counted from 1."""
    kind = _PARAMETER if parameter else _SESSION if session else 0
    return code | kind | (parameter or handle or session) << _NUMBER_SHIFT


TAG_NO_SESSIONS, TAG_SESSIONS, TAG_BAD = 0x8001, 0x8002, 0x00C4
"""The last one heads the answer to a command with neither of the others."""
HANDLE_ENDORSEMENT = 0x4000000B
HANDLE_PASSWORD = 0x40000009
"""TPM_RS_PW: the session that is a password in the clear."""
HANDLE_EK = 0x81010001
"""Where the endorsement key is persistent (TCG EK Credential Profile)."""
HANDLE_TYPE = 0xFF000000
"""The bits of a handle that say of which kind it is."""
CAP_HANDLES, CAP_COMMANDS = 1, 2
COMMAND_HANDLES_SHIFT = 25
"""Where the attributes of a command (TPMA_CC) count its handles."""
STARTUP_CLEAR = 0
PCRS = 24
DYNAMIC_PCRS = range(17, 23)
"""PCRs of a dynamic launch: all ones after start-up, and out of reach at locality 0."""
DIGESTS = 8
"""As many as one answer to PCR_READ holds."""
ALG_RSA, ALG_AES, ALG_SHA256, ALG_NULL, ALG_CFB = 0x0001, 0x0006, 0x000B, 0x0010, 0x0043
EK_BITS, EK_EXPONENT = 2048, 65537
"""The exponent stands as 0 in a public area."""
AES_BITS = 128

_EK_ATTRIBUTES = 0x000300B2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt."""
_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret of the endorsement hierarchy."""


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


EK_HEAD = (
    _u16(ALG_RSA) + _u16(ALG_SHA256) + _EK_ATTRIBUTES.to_bytes(4, "big") + _u16(len(_POLICY_A)) + _POLICY_A
    + _u16(ALG_AES) + _u16(AES_BITS) + _u16(ALG_CFB) + _u16(ALG_NULL) + _u16(EK_BITS) + bytes(4)
)  # fmt: skip
"""The public area (TPMT_PUBLIC) of an RSA-2048 endorsement key up to its modulus, which has a length before it."""
EK_PUBLIC_SIZE = len(EK_HEAD) + 2 + EK_BITS // 8
"""314 bytes."""


def ek_public(modulus: int) -> bytes:
    """The public area of the endorsement key with that modulus; with 0 the template that asks for it."""
    return EK_HEAD + _u16(EK_BITS // 8) + modulus.to_bytes(EK_BITS // 8, "big")


def ek_modulus(public: bytes) -> int:
    """The modulus in an endorsement key's public area; `ValueError` where that is of another kind."""
    size = EK_BITS // 8
    if len(public) != EK_PUBLIC_SIZE or not public.startswith(EK_HEAD + _u16(size)):
        raise ValueError(f"{len(public)} bytes are no TPMT_PUBLIC of an RSA-2048 endorsement key")
    return int.from_bytes(public[-size:], "big")
