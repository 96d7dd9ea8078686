"""Migration, compaction, swap and KSM on a guest's private pages: who refuses, and what a guest reads otherwise."""

from __future__ import annotations

import pytest

from snpbook.regimes.host_actions import COUNT, Action, act
from tests.host.regimes import ENCRYPTED
from tests.sampling import sampled

MOVES = (Action.MIGRATE, Action.COMPACT, Action.SWAP)


@pytest.mark.parametrize(("kind", "backend", "action"), sampled([(*each, a) for each in ENCRYPTED for a in Action], 14))
def test_private_pages_stay_where_they_are(kind: str, backend: str, action: Action) -> None:
    found = act(action, kind, backend)
    assert (found.taken, found.intact) == (0, True)


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
@pytest.mark.parametrize("action", MOVES)
def test_an_encrypted_page_that_moves_is_noise(kind: str, action: Action) -> None:
    """Its registration was taken back; the tweak is made of the address."""
    found = act(action, kind, "registered", pinned=False)
    assert (found.taken, found.intact) == (COUNT, False)


def test_equal_pages_are_not_equal_when_they_are_encrypted() -> None:
    assert act(Action.KSM, "sev", "registered", pinned=False).taken == 0
    assert act(Action.KSM, "plain", "null").taken == COUNT - 1


def test_pages_that_nobody_encrypts_move_and_keep_their_content() -> None:
    found = act(Action.MIGRATE, "plain", "null")
    assert (found.taken, found.intact) == (COUNT, True)


@pytest.mark.parametrize(("kind", "backend", "message"), [
    ("snp", "guest_memfd", "guest_memfd memory is not registered"),
    ("snp", "registered", "does not outlive its registration"),
])  # fmt: skip
def test_what_cannot_be_unpinned(kind: str, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(Action.SWAP, kind, backend, pinned=False)
