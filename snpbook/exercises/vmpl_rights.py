"""The exercise on RMPADJUST: a guest at VMPL0 opens some of its pages to VMPL1, and to nobody else.

The permission bytes of all entries are compared, as the table holds them in the end.
"""

from collections import Counter

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.exercises.reverse_map_table import FIRST, give
from snpbook.exercises.watched_guest import NOTHING, WatchedGuest
from snpbook.hardware.workbench import BareGuest, Workbench
from snpbook.spec.pages import PAGES_PER_LARGE, VmplPermission

_ASID, _GFN = 1, 0x200


def _grant_cases() -> list[Case]:
    def case(name: str, count: int, large: bool, rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench()
            guest = WatchedGuest(bench, _ASID)
            step = PAGES_PER_LARGE if large else 1
            pages = range(FIRST, FIRST + (count + 1) * step, step)
            for number, page in enumerate(pages):
                give(bench, guest, page, _GFN + number * step, large=large)
            done = guest.executed(lambda: answer(guest, _GFN, count, large))
            return done and _rights(bench, pages)

        wanted = {"VMPL0": f"ALL on {count}", "VMPL1": f"READ on {count}", "VMPL2": f"NONE on {count}",
                  "VMPL3": f"NONE on {count}", "others on the page behind": "NONE"}  # fmt: skip
        return Case(name, run, wanted, rule, "APM2 15.36.7", NOTHING)

    return [
        case(
            "one page of 4 KB", 1, False,
            "the mask is all that the target may do from now on: READ alone, for VMPL1 alone, on these pages alone",
        ),
        case("four pages of 4 KB", 4, False, "each entry has its own rights: every page must be adjusted"),
        case("a page of 2 MB", 1, True, "RMPADJUST must name the size of the entry, or it faults with SIZEM"),
    ]  # fmt: skip


def _rights(bench: Workbench, pages: range) -> dict[str, str]:
    """What the permission bytes say: of each VMPL on all pages but the last, and of VMPL1 to VMPL3 on the last."""
    *entries, behind = (bench.host.rmp_entry(page) for page in pages)
    told = {}
    for vmpl in ("vmpl0", "vmpl1", "vmpl2", "vmpl3"):
        counts = Counter(_named(getattr(entry, vmpl)) for entry in entries)
        told[vmpl.upper()] = ", ".join(f"{rights} on {count}" for rights, count in counts.items())
    return {**told, "others on the page behind": _named(behind.vmpl1 | behind.vmpl2 | behind.vmpl3)}


def _named(rights: int) -> str:
    return "ALL" if rights == VmplPermission.ALL else str(VmplPermission(rights).name)


GRANT_STUB = '''\
def grant(guest, gfn, count, large):
    """Let VMPL1 read `count` pages from `gfn` on, which are 2 MB pages if `large`, and do nothing else with them."""
    ...
'''


def grant(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    """Let VMPL1 read `count` pages from `gfn` on, which are 2 MB pages if `large`, and do nothing else with them."""
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ, large=large)


def _grants_everything(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.ALL, large=large)


def _also_vmpl3(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    grant(guest, gfn, count, large)
    return guest.rmpadjust(gfn, count, target=3, rights=VmplPermission.READ, large=large)


def _also_execute(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    rights = VmplPermission.READ | VmplPermission.EXECUTE_USER | VmplPermission.EXECUTE_SUPERVISOR
    return guest.rmpadjust(gfn, count, target=1, rights=rights, large=large)


def _one_page_too_many(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, count + 1, target=1, rights=VmplPermission.READ, large=large)


def _first_page_only(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, 1, target=1, rights=VmplPermission.READ, large=large)


def _small_pages_only(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ)


GRANT = register(
    Exercise(
        id="reverse_map_table.6",
        title="A window for VMPL1",
        minutes=8,
        difficulty=2,
        prerequisites=(),
        task=(
            "VMPL0 runs a small service module, VMPL1 the operating system. Some validated pages are the module's. Let "
            "VMPL1 read them, but not write or execute, and leave VMPL2 and VMPL3 without any right. "
            "guest.rmpadjust(gfn, count, target=..., rights=..., large=...) executes RMPADJUST at VMPL0: target is the "
            "number of a VMPL, rights a VmplPermission (READ, WRITE, EXECUTE_USER, EXECUTE_SUPERVISOR, several joined "
            "by |, or NONE). What counts is the rights afterwards, not what you return."
        ),
        stub=GRANT_STUB,
        reference=grant,
        wrong=(
            Wrong(_grants_everything, "READ alone"),
            Wrong(_also_vmpl3, "'VMPL3': 'READ on 1'"),
            Wrong(_also_execute, "'VMPL1': 'READ|EXECUTE_USER|EXECUTE_SUPERVISOR on 1'"),
            Wrong(_one_page_too_many, "'others on the page behind': 'READ'"),
            Wrong(_first_page_only, "every page must be adjusted"),
            Wrong(_small_pages_only, "must name the size of the entry"),
        ),
        hints=(
            "After RMPUPDATE only VMPL0 has rights. Which of the others needs any?",
            "The mask does not add to the old rights, it replaces them. What is the smallest that lets VMPL1 read?",
            "guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ, large=large)",
        ),
        solution=(
            "RMPADJUST writes the permission byte of one less privileged level, and can grant only what the caller "
            "holds. "
            "VMPL0 never loses its own rights, which is why software there can protect itself from the rest of the "
            "guest."
        ),
        cases=_grant_cases,
    )
)
