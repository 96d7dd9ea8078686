"""Who decides encryption: every combination of inputs against a slow transcription, and the rows by name."""

import itertools

import numpy as np
import pytest

from snpbook.hardware.key_choice import choose_keys
from snpbook.spec.encryption import KEY_RULES, Context, KeyId, Kind, Paging, Vtom
from tests.reference.key_choice import choose

WHO = {"host": Context.HOST, "guest": Context.GUEST, "sev": Context.SEV, "sev-es": Context.SEV_ES, "snp": Context.SNP}
ACCESS = {
    "data": Kind.DATA,
    "fetch": Kind.FETCH,
    "guest walk": Kind.GUEST_WALK,
    "nested walk": Kind.NESTED_WALK,
}
PAGING = {"off": Paging.OFF, "legacy": Paging.LEGACY, "pae": Paging.PAE, "long": Paging.LONG}
VTOM = {"off": Vtom.OFF, "below": Vtom.BELOW, "above": Vtom.ABOVE}
BOTH = (False, True)
CASES = list(itertools.product(WHO, ACCESS, BOTH, BOTH, (1, 1006), PAGING, VTOM, BOTH, BOTH, BOTH))


def test_the_full_product() -> None:
    who, access, guest_c, host_c, asid, paging, vtom, vte, enabled, tsme = zip(*CASES, strict=True)
    found = choose_keys(
        [WHO[name] for name in who],
        [ACCESS[name] for name in access],
        guest_c,
        host_c,
        asid,
        paging=[PAGING[name] for name in paging],
        vtom=[VTOM[name] for name in vtom],
        vte=vte,
        encryption_enabled=enabled,
        tsme=tsme,
    )
    assert len(found.keys) == len(CASES) == 15360
    for case, key, fault in zip(CASES, found.keys.tolist(), found.reserved.tolist(), strict=True):
        assert (key, fault) == choose(*case), case


@pytest.mark.parametrize(
    ("context", "kind", "guest_c", "host_c", "options", "key"),
    [
        (Context.HOST, Kind.DATA, False, True, {}, 1023),
        (Context.HOST, Kind.DATA, False, True, {"encryption_enabled": False}, 0),
        (Context.HOST, Kind.DATA, False, False, {"tsme": True}, 1023),
        (Context.GUEST, Kind.DATA, True, False, {}, 0),
        (Context.SEV, Kind.FETCH, False, True, {}, 7),
        (Context.SEV, Kind.GUEST_WALK, False, False, {}, 7),
        (Context.SEV, Kind.NESTED_WALK, True, False, {}, 0),
        (Context.SEV, Kind.NESTED_WALK, False, True, {}, 1023),
        (Context.SNP, Kind.DATA, False, False, {}, 0),
        (Context.SNP, Kind.DATA, False, True, {}, 1023),
        (Context.SNP, Kind.DATA, True, True, {}, 7),
        (Context.SNP, Kind.DATA, True, True, {"tsme": True}, 7),
        (Context.SEV_ES, Kind.DATA, False, False, {"paging": Paging.LEGACY}, 7),
        (Context.SEV, Kind.DATA, False, False, {"vte": True}, 7),
        (Context.SEV_ES, Kind.DATA, False, False, {"vte": True}, 0),
        (Context.SNP, Kind.DATA, False, True, {"vtom": Vtom.BELOW}, 7),
        (Context.SNP, Kind.DATA, False, True, {"vtom": Vtom.ABOVE}, 1023),
        (Context.SNP, Kind.FETCH, False, True, {"vtom": Vtom.ABOVE}, 7),
    ],
)
def test_rows(
    context: Context, kind: Kind, guest_c: bool, host_c: bool, options: dict[str, bool | Paging | Vtom], key: int
) -> None:
    found = choose_keys(context, kind, guest_c, host_c, 7, **options)
    assert (int(found.keys), bool(found.reserved)) == (key, False)


def test_a_c_bit_under_vtom_is_reserved() -> None:
    found = choose_keys(Context.SNP, list(Kind), True, False, 7, vtom=Vtom.BELOW)
    assert found.reserved.tolist() == [True, True, True, False]


def test_arguments_are_broadcast() -> None:
    found = choose_keys(Context.SNP, Kind.DATA, np.array([[True], [False]]), np.array([False, True, True]), [5, 6, 7])
    assert found.keys.tolist() == [[5, 6, 7], [KeyId.UNENCRYPTED, KeyId.HOST, KeyId.HOST]]
    assert choose_keys(Context.SNP, Kind.DATA, np.zeros(0, bool), True, 5).keys.shape == (0,)


def test_each_rule_has_cases_of_its_own() -> None:
    combinations = itertools.product(Context, Kind, BOTH, BOTH)
    for context, kind, guest_c, host_c in combinations:
        fitting = [
            rule
            for rule in KEY_RULES
            if context in rule.contexts
            and kind in rule.kinds
            and rule.guest_c in (None, guest_c)
            and rule.host_c in (None, host_c)
        ]
        assert len(fitting) == 1
