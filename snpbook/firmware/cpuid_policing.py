"""CPUID policing: what a host may tell a guest about the processor, in a launch's CPUID page or by MSG_CPUID_REQ.

A table that says too much is refused, and whoever asked gets it back corrected. Source: SNP ABI (CPUID page,
MSG_CPUID_REQ), firmware 1.55.25; the rules are `snpbook.spec.cpuid_policy`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.spec.cpuid import Registers
from snpbook.spec.cpuid_policy import (
    CHECKED_LEAVES,
    CORRECTION_QUIRKS,
    CPUID_RULES,
    XSAVE_BASE,
    XSAVE_COMPACTED_SIZES,
    XSAVE_STANDARD_ENDS,
    Rule,
    RuleKind,
)
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import CPUID_ENTRIES, CPUID_ENTRY
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.payloads import CPUID_REQUEST, CPUID_RESPONSE
from snpbook.spec.products import Product
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.spec.vmsa import CpuidSignature

_VALUES_FROM, _VALUES_TO = CPUID_ENTRY.offset("eax"), CPUID_ENTRY.offset("edx") + 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many entries of a table were looked at, the entries as they should be, and the first violation."""

    checked: int
    entries: bytes
    violation: FirmwareRefusal | None


def police_page(psp: SecureProcessor, page: int) -> FirmwareRefusal | None:
    """Judge a CPUID page before it is launched; of one with violations the corrected form is written back."""
    spa = page << PAGE_SHIFT
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, PAGE_SIZE)
    try:
        count = _count(data)
    except FirmwareRefusal as refusal:
        return refusal
    verdict = police(psp.machine.product, _table(data, count))
    if verdict.violation is not None:
        psp.machine.memory.write(KeyId.UNENCRYPTED, spa + CPUID_REQUEST.size, verdict.entries)
    return verdict.violation


def cpuid_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_CPUID_REQ: STATUS, how many entries were checked, and all of them corrected, in as many bytes as came."""
    data = message.ljust(CPUID_REQUEST.size, b"\0")
    try:
        count = _count(data)
    except FirmwareRefusal as refusal:
        return CPUID_RESPONSE.pack(status=refusal.status) + message[CPUID_REQUEST.size :]
    verdict = police(psp.machine.product, _table(data, count))
    status = verdict.violation.status if verdict.violation else Status.SUCCESS
    head = CPUID_RESPONSE.pack(status=status, count=verdict.checked)
    rest = data[CPUID_REQUEST.size + len(verdict.entries) :]
    return (head + verdict.entries + rest)[: len(message)]


def _count(data: bytes) -> int:
    """The number of entries that a header announces, if the header is right."""
    count: int = CPUID_REQUEST.unpack(data).count
    require(count <= CPUID_ENTRIES, Status.INVALID_PARAM, "number of CPUID entries", CPUID_ENTRIES, count)
    stray = CPUID_REQUEST.reserved_set(data)
    require(not stray, Status.INVALID_PARAM, "reserved bytes before the CPUID entries are zero", 0, stray)
    return count


def _table(data: bytes, count: int) -> bytes:
    """The entries; those that a message lacks read as zero."""
    size = count * CPUID_ENTRY.size
    return data[CPUID_REQUEST.size :][:size].ljust(size, b"\0")


def police(product: Product, entries: bytes) -> Verdict:
    """Judge entries (48 bytes each) by what the product itself answers."""
    corrected, violation, checked = bytearray(entries), None, 0
    for start in range(0, len(entries), CPUID_ENTRY.size):
        entry = CPUID_ENTRY.unpack(entries, start)
        if not any(entry.eax_in in leaves for leaves in CHECKED_LEAVES):
            continue
        checked += 1
        given = Registers(entry.eax, entry.ebx, entry.ecx, entry.edx)
        right = _correct(product, entry, given)
        corrected[start + _VALUES_FROM : start + _VALUES_TO] = b"".join(value.to_bytes(4, "little") for value in right)
        reserved = CPUID_ENTRY.reserved_set(entries[start : start + CPUID_ENTRY.size])
        if violation is None and (right != given or reserved):
            rule = f"CPUID {entry.eax_in:#010x}, subleaf {entry.ecx_in:#x}"
            found = f"{given} and reserved bits" if reserved else given
            violation = FirmwareRefusal(Status.INVALID_PARAM, rule, right, found)
    return Verdict(checked, bytes(corrected), violation)


def _correct(product: Product, entry: Record, given: Registers) -> Registers:
    """The registers as the firmware would have them; a leaf without rules is zero throughout."""
    key: tuple[int, int | None] = (entry.eax_in, entry.ecx_in)
    if key not in CPUID_RULES:
        key = (entry.eax_in, None)
    if key not in CPUID_RULES:
        return Registers()
    own = product.cpuid(entry.eax_in, entry.ecx_in)
    right = []
    for number, (rule, value, real) in enumerate(zip(CPUID_RULES[key], given, own, strict=True)):
        good = _allowed(rule, value, real, entry)
        if good != value and (quirk := CORRECTION_QUIRKS.get((*key, number))):
            survive, cleared = quirk
            good = (good | value & survive) & ~cleared
        right.append(good)
    return Registers(*right)


def _allowed(rule: Rule, value: int, own: int, entry: Record) -> int:
    """The value itself if the rule has nothing against it, else what the firmware writes instead (inferred)."""
    match rule.kind:
        case RuleKind.AT_MOST:
            return min(value, own if rule.value is None else rule.value)
        case RuleKind.SUBSET:
            return value & (own | rule.free) | rule.required
        case RuleKind.EXACT:
            return own if rule.value is None else rule.value
        case RuleKind.SIGNATURE:
            return value if _is_signature_up_to(own, value) else own
        case RuleKind.XSAVE_STANDARD:
            return next((size for bit, size in XSAVE_STANDARD_ENDS.items() if entry.xcr0_in >> bit & 1), XSAVE_BASE)
        case RuleKind.XSAVE_COMPACTED:
            enabled = entry.xcr0_in | entry.xss_in
            return XSAVE_BASE + sum(size for bit, size in XSAVE_COMPACTED_SIZES.items() if enabled >> bit & 1)
        case RuleKind.UNCHECKED:
            value &= ~rule.reserved
            for part in rule.parts:
                limit, field = (1 << part.width) - 1, value >> part.lo & (1 << part.width) - 1
                good = part.value if part.kind is RuleKind.EXACT else min(field, part.value)
                value = value & ~(limit << part.lo) | good << part.lo
            return value


def _is_signature_up_to(own: int, value: int) -> bool:
    """Whether a value is a signature, without reserved bits, of no later part than one's own."""
    found, real = CpuidSignature.from_int(value), CpuidSignature.from_int(own)
    return int(found) == value and astuple(found) <= astuple(real)
