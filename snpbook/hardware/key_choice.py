"""Who decides encryption: the key under which an access reaches memory.

The rows are data, `spec.encryption.KEY_RULES`; this file only finds the guest's effective C-bit and looks up the row.
It changes nothing. Sources: APM2 15.34 (tables 15-30 and 15-31), 15.36.8 (vTOM), appendix B (VTE).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.encryption import KEY_RULES, Context, KeyId, KeyRule, KeySource, Kind, Paging, Vtom

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class KeyChoice:
    """For each access its key id, whether that is the guest's own (the effective C-bit), and whether it faults first:
    #PF, reserved bit set, then the key has no meaning.
    """

    keys: NDArray[np.uint16]
    private: Flags
    reserved: Flags


def choose_keys(
    context: Any,
    kind: Any,
    guest_c: Any,
    host_c: Any,
    asid: Any,
    *,
    paging: Any = Paging.LONG,
    vtom: Any = Vtom.OFF,
    vte: Any = False,
    encryption_enabled: Any = True,
    tsme: Any = False,
) -> KeyChoice:
    """The key of each access; arguments are arrays or single values and are broadcast.

    `guest_c` and `host_c` are the C-bits of the guest's tables and of the host's or nested ones, `asid` the guest's,
    `vte` bit 5 of VMCB 0x90, `encryption_enabled` SYSCFG.MemEncryptionModEn. A guest without paging or with legacy
    paging has no C-bit: all its accesses are private, vTOM or not (unconfirmed). VTE counts without SEV-ES only, vTOM
    for SNP guests only. TSME gives the host's key to whatever would stay unencrypted, also with MemEncryptionModEn
    clear (unconfirmed); a guest's own key goes before it.
    """
    context, kind, paging, vtom = (np.asarray(value, np.int8) for value in (context, kind, paging, vtom))
    guest_c, host_c, vte, enabled, tsme = (
        np.asarray(value, bool) for value in (guest_c, host_c, vte, encryption_enabled, tsme)
    )
    has_c_bit = paging >= Paging.PAE
    top = (context == Context.SNP) & (vtom != Vtom.OFF)
    effective = ~has_c_bit | np.where(top, vtom == Vtom.BELOW, guest_c) | (vte & (context == Context.SEV))
    sources = np.where(enabled, _SOURCES[context, kind, effective.astype(np.int8), host_c.astype(np.int8)], 0)
    plain = np.where(tsme, KeyId.HOST, KeyId.UNENCRYPTED)
    keys = np.choose(sources, (plain, np.full_like(plain, KeyId.HOST), np.asarray(asid, np.int64)))
    reserved = enabled & top & has_c_bit & guest_c & (kind != Kind.NESTED_WALK)
    return KeyChoice(keys.astype(np.uint16), sources == KeySource.GUEST, reserved)


def _matches(rule: KeyRule, context: Context, kind: Kind, guest_c: bool, host_c: bool) -> bool:
    fits = context in rule.contexts and kind in rule.kinds
    return fits and rule.guest_c in (None, guest_c) and rule.host_c in (None, host_c)


def _table() -> NDArray[np.int8]:
    """The rows as an array, by context, kind, the guest's effective C-bit and the host's."""
    cases = list(product(Context, Kind, (False, True), (False, True)))
    sources: list[KeySource] = []
    for case in cases:
        (rule,) = (rule for rule in KEY_RULES if _matches(rule, *case))
        sources.append(rule.source)
    return np.array(sources, np.int8).reshape(len(Context), len(Kind), 2, 2)


_SOURCES = _table()
