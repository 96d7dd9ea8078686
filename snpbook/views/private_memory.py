"""Private memory as tables: which guests have which back end, what hooks they need, and how experiments ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snpbook.regimes.content import Flip
from snpbook.regimes.host_actions import COUNT, Acted
from snpbook.regimes.host_writes import Write
from snpbook.spec.private_memory import CELLS, HOOKS, KINDS, Backend, Hook, NoSuchCell, cell
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.views.values import show


def cells() -> Static:
    """Kind of guest by back end: the kernel that has it, or why none has."""
    rows = [(backend, *(_cell(kind, backend) for kind in KINDS)) for backend in Backend]
    note = f"{len(CELLS)} of {len(KINDS) * len(Backend)} exist. [u]: unconfirmed."
    return table("Kind of guest by back end", ["back end", *KINDS], rows, note=note)


def _cell(kind: str, backend: Backend) -> str:
    try:
        found = cell(kind, backend)
    except NoSuchCell as refusal:
        return f"none: {str(refusal).partition(': ')[2]}"
    return f"{found.era}{' [u]' * found.unconfirmed}"


def hooks(shown: Sequence[Hook] = HOOKS) -> Static:
    """Where KVM asks the architecture: what each kind of guest needs there, then what became of the hooks upstream."""
    head = ["hook", "asked", "null", "SEV", "SNP", "TDX (unconfirmed)"]
    needs = table(
        "Hooks for private memory in v7", head,
        [(each.name, each.when, each.null, each.sev, each.snp, each.tdx) for each in shown],
    )  # fmt: skip
    after = table(
        "What became of them", ["hook", "upstream", "source"],
        [(each.name, each.upstream, str(each.cite)) for each in shown],
    )  # fmt: skip
    return Static(f"{needs.text}\n\n{after.text}", needs.html + after.html)


def endings(caption: str, stories: Mapping[str, Mapping[str, object] | None]) -> Static:
    """How stories ended, by their names; None where the VMM did nothing at all."""
    counted = ("private pages", "pages with both sides")
    rows = []
    for story, outcome in stories.items():
        found = outcome or {"the guest": "waits: the VMM makes no call"}
        rows.append((story, str(found["the guest"]), *(str(found.get(name, "")) for name in counted)))
    return table(caption, ["what the guest does", "how it ends: the guest", *counted], rows)


def host_actions(acted: Sequence[tuple[str, Acted]]) -> Static:
    """What the host's memory management did to pages, each line under the name of a regime."""
    rows = [
        (regime, each.action, f"{each.taken} of {COUNT}", "what it wrote" if each.intact else "noise")
        for regime, each in acted
    ]
    return table(
        "What the host does behind the guest's back", ["regime", "action", "pages taken", "the guest reads"], rows
    )


def stray_writes(writes: Mapping[str, Write]) -> Static:
    """What stray writes did, each under the name of writer and regime."""
    rows = []
    for name, write in writes.items():
        read = write.read.decode() if write.read.isascii() else show(write.read)
        rows.append((name, write.damage, read, write.stopped))
    return table("A stray write", ["who, where", "outcome", "the guest reads", "the writer meets"], rows)


def flips(found: Mapping[str, Flip]) -> Static:
    """What came back after private, shared, private, each under the name of a regime."""
    rows = []
    for name, flip in found.items():
        validated = "has none" if flip.pvalidate is None else "changes nothing" if flip.pvalidate[1] else "accepts"
        rows.append((name, validated, flip.found))
    return table("Private, shared, private again", ["regime", "PVALIDATE", "the guest reads"], rows)
