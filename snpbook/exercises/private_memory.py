"""Exercises of the chapter on private memory: the reader is the VMM, and then says what each regime does.

Every answer is tried on guests that run: what is expected is read off the model, not written here.
"""

from __future__ import annotations

from functools import cache

from snpbook.exercises import vmm_seat
from snpbook.exercises.registry import Case, Exercise, Wrong, register
from snpbook.exercises.vmm_seat import OnExit, Run, Story

LINUX, QEMU = "LINUX virt/kvm/guest_memfd.c", "QEMU accel/kvm/kvm-all.c"

# 1: the exits


def on_exit(run: Run) -> None:
    """Serve one exit of KVM_RUN: give the pages the side that the guest wants."""
    if run.exit_reason == "HYPERCALL":
        gpa, pages, flags = run.hypercall.args[:3]
        size, private = pages * 4096, flags >> 4 & 1
    else:
        gpa, size = run.memory_fault.gpa, run.memory_fault.size
        private = run.memory_fault.flags >> 3 & 1
    run.set_attributes(gpa, size, 8 if private else 0)
    if private:
        run.discard(gpa, size)
    else:
        run.punch(gpa, size)


STORIES: dict[str, tuple[Story, str]] = {
    "a page is used as private": (
        Story(vmm_seat.by_use), "the attribute says which side a fault takes; what the other has is freed"),
    "a page is asked to be private": (
        Story(vmm_seat.on_request), "the second argument of the hypercall counts pages of 4096 bytes"),
    "a secret page becomes shared, and private again": (
        Story(vmm_seat.there_and_back), "a hole is punched for what becomes shared, or the old page comes back"),
    "one of eight private pages is used as shared": (
        Story(vmm_seat.shared_by_use), "the flags say which way the conversion goes, and only its own pages are freed"),
    "eight private pages are asked to be shared": (
        Story(vmm_seat.eight_shared), "one request may be for many pages: all of them are converted"),
    "the kernel cannot make a secret page shared": (
        Story(vmm_seat.refused, refused=2), "first the attribute: nothing may be freed that stays in use"),
}  # fmt: skip
"""Stories by name, and what is overlooked where they end differently."""


@cache
def meant(name: str) -> dict[str, object] | None:
    """How a story ends with a VMM that forgets nothing."""
    return vmm_seat.told(on_exit, STORIES[name][0])


def _exit_cases() -> list[Case]:
    def case(name: str) -> Case:
        story, rule = STORIES[name]

        def run(answer: OnExit) -> dict[str, object] | None:
            return vmm_seat.told(answer, story)

        return Case(name, run, meant(name), rule, QEMU, "makes no call")

    return [case(name) for name in STORIES]


def _wanted(run: Run) -> tuple[int, int, int]:
    """Address, size and side that an exit asks for."""
    if run.exit_reason == "HYPERCALL":
        gpa, pages, flags = run.hypercall.args[:3]
        return gpa, pages * 4096, flags >> 4 & 1
    return run.memory_fault.gpa, run.memory_fault.size, run.memory_fault.flags >> 3 & 1


def _no_attribute(run: Run) -> None:
    gpa, size, private = _wanted(run)
    (run.discard if private else run.punch)(gpa, size)


def _no_hole(run: Run) -> None:
    gpa, size, private = _wanted(run)
    run.set_attributes(gpa, size, 8 if private else 0)
    if private:
        run.discard(gpa, size)


def _no_discard(run: Run) -> None:
    gpa, size, private = _wanted(run)
    run.set_attributes(gpa, size, 8 if private else 0)
    if not private:
        run.punch(gpa, size)


def _hole_first(run: Run) -> None:
    _no_attribute(run)
    gpa, size, private = _wanted(run)
    run.set_attributes(gpa, size, 8 if private else 0)


def _first_alone(run: Run) -> None:
    gpa, _, private = _wanted(run)
    run.set_attributes(gpa, 4096, 8 if private else 0)
    (run.discard if private else run.punch)(gpa, 4096)


def _hole_too_large(run: Run) -> None:
    gpa, size, private = _wanted(run)
    run.set_attributes(gpa, size, 8 if private else 0)
    if private:
        run.discard(gpa, size)
    else:
        run.punch(gpa - 4096, size + 4096)


def _pages_for_bytes(run: Run) -> None:
    gpa, size, private = _wanted(run)
    if run.exit_reason == "HYPERCALL":
        size //= 4096
    run.set_attributes(gpa, size, 8 if private else 0)
    (run.discard if private else run.punch)(gpa, size)


OMISSIONS = {
    "nothing": on_exit,
    "the attribute": _no_attribute,
    "the hole": _no_hole,
    "to discard": _no_discard,
    "the order": _hole_first,
}
"""What a VMM may forget."""

ON_EXIT_STUB = '''\
def on_exit(run):
    """Serve one exit of KVM_RUN: give the pages the side that the guest wants."""
    ...  # run.exit_reason, run.memory_fault, run.hypercall; run.set_attributes, run.punch, run.discard
'''

ON_EXIT = register(
    Exercise(
        id="private_memory.1",
        title="You are the VMM",
        minutes=20,
        difficulty=2,
        prerequisites=(),
        task=(
            "Write `on_exit(run)`, which is called whenever KVM_RUN comes back with an exit that wants a conversion. "
            "Afterwards the guest runs on. It needs about ten lines: what is wanted, the attribute, the side to free."
        ),
        stub=ON_EXIT_STUB,
        reference=on_exit,
        wrong=(
            Wrong(_no_attribute, "does not get on: MEMORY_FAULT for 0x500000 again and again"),
            Wrong(_no_hole, "finds its old page again"),
            Wrong(_no_discard, "'pages with both sides': 1"),
            Wrong(_hole_first, "has lost what was in its page"),
            Wrong(_pages_for_bytes, "counts pages of 4096 bytes"),
            Wrong(_first_alone, "all of them are converted"),
            Wrong(_hole_too_large, "only its own pages are freed"),
        ),
        hints=(
            "Both exits say the same in two ways: an address, a length, a direction. Read these three first.",
            "`args` of a hypercall: address, number of pages, flags with bit 4 for private. A memory fault: `gpa`, "
            "`size` in bytes, `flags` with bit 3 for private. Then three calls are left, of which each exit needs two.",
            "run.set_attributes(gpa, size, 8 if private else 0), and only then run.discard(gpa, size) for what became "
            "private, or run.punch(gpa, size) for what became shared.",
        ),
        solution=(
            "The attribute says which side counts, and must come first: the call may fail, and then the guest goes on "
            "with the side it has. What is left is freed, or a page costs twice and its old content waits there."
        ),
        cases=_exit_cases,
    )
)
