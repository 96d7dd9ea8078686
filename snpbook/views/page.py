"""The page inspector: one page of memory, its place and the decoded fields of its RMP entry, as name and value.

The entry is decoded by the layout in `spec`; this file only chooses words.
"""

from collections.abc import Mapping

from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PageSize, PageState, VmplPermission
from snpbook.views.palette import PAGES
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.views.values import show

Fields = Mapping[str, object]

_LETTERS = {
    VmplPermission.READ: "R", VmplPermission.WRITE: "W", VmplPermission.EXECUTE_USER: "Xu",
    VmplPermission.EXECUTE_SUPERVISOR: "Xs", VmplPermission.SUPERVISOR_SHADOW_STACK: "SSS",
}  # fmt: skip


def permissions(value: int) -> str:
    """One VMPL's rights: R, W, Xu (execute as user), Xs (as supervisor), SSS (supervisor shadow stack)."""
    return " ".join(letter for right, letter in _LETTERS.items() if value & right) or "none"


def entry_fields(entry: Record) -> Fields:
    """The fields of a raw RMP entry (`spec.rmp.RMP_ENTRY`) in the words of the inspector."""
    return {
        "gpa": f"{entry.gfn << PAGE_SHIFT:#_x}",
        "asid": str(entry.asid),
        "assigned": bool(entry.assigned),
        "validated": bool(entry.validated),
        "immutable": bool(entry.immutable),
        "page size": "2 MB" if entry.page_size == PageSize.SIZE_2M else "4 KB",
        "vmsa": bool(entry.vmsa),
        **{f"VMPL{n}": permissions(getattr(entry, f"vmpl{n}")) for n in range(4)},
    }


def page_rows(pfn: int, state: int, fields: Fields) -> list[tuple[str, str]]:
    """What the inspector lists for a page: state, page frame number, system physical address, then `fields`."""
    look = PAGES[PageState(state)]
    place = [("state", f"{look.letter}  {look.label}"), ("pfn", f"{pfn:#_x}"), ("spa", f"{pfn << PAGE_SHIFT:#_x}")]
    return place + [(name, show(value)) for name, value in fields.items()]


def page(pfn: int, state: int, fields: Fields) -> Static:
    """The inspector's table for one page."""
    return table(f"Page {pfn:#_x}", [], page_rows(pfn, state, fields))
