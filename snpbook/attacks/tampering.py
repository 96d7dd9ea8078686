"""What a hostile host tries at the GHCB, with KVM's answers and with pages: the classes of its actions, in one table.

Nothing here knows the guest's code: the host sees exits, shared bytes and addresses. Sources: GHCB specification; the
published attacks that an entry names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from snpbook.attacks import tamper_answers as answers
from snpbook.attacks import tamper_events as events
from snpbook.attacks import tamper_messages as messages
from snpbook.attacks import tamper_pages as pages
from snpbook.attacks.attacker import REQUESTS, Attacker, Tampering
from snpbook.attacks.ghcb import Moment, Stage
from snpbook.spec.ghcb import Nae


def _answered(*kinds: Nae) -> Callable[[Moment], bool]:
    """KVM has answered one of these events, or any."""
    return lambda m: m.stage is Stage.ENTRY and m.page is not None and (not kinds or m.event in kinds)


def _asked(*kinds: Nae) -> Callable[[Moment], bool]:
    """KVM has not seen it yet."""
    return lambda m: m.stage is Stage.EXIT and m.page is not None and (not kinds or m.event in kinds)


def _carried(*kinds: Nae) -> Callable[[Moment], bool]:
    """On its way to KVM or back."""
    return lambda m: m.event in kinds


def _by_msr(m: Moment) -> bool:
    return m.stage is Stage.ENTRY and m.code is not None


def _entered(m: Moment) -> bool:
    return m.stage is Stage.ENTRY


TAMPERINGS: Mapping[str, Tampering] = {
    "CPUID": Tampering("other values for CPUID", _answered(Nae.CPUID), answers.change_registers),
    "registers": Tampering("other values in what comes back", _answered(), answers.change_registers),
    "exit information": Tampering("junk in SW_EXITINFO1 and 2", _answered(), answers.change_result),
    "exception answers": Tampering("an exception as the answer", _answered(), answers.answer_with_event),
    "valid bitmap": Tampering("fields marked or not at will", _answered(), answers.change_bitmap),
    "buffer": Tampering("other bytes in the shared buffer", _answered(), answers.change_buffer),
    "counts": Tampering("short, huge and negative counts and addresses", _answered(), answers.change_counts),
    "withheld": Tampering("the guest goes on without an answer", _asked(), answers.withhold),
    "list header": Tampering("a list that goes back, grows, or is done", _answered(Nae.PAGE_STATE_CHANGE),
                             answers.change_header),
    "list entries": Tampering("other entries in a list", _carried(Nae.PAGE_STATE_CHANGE), answers.change_entry),
    "list result": Tampering("a list that has failed", _answered(Nae.PAGE_STATE_CHANGE), answers.fail_list),
    "list feigned": Tampering("a list that is done and was not", _asked(Nae.PAGE_STATE_CHANGE), answers.feign_list),
    "processors": Tampering("processors created and ended that were not, or otherwise", _carried(Nae.AP_CREATION),
                            answers.change_creation),
    "message bits": Tampering("a changed message", _carried(*REQUESTS), messages.change_message),
    "message replayed": Tampering("an old answer", _answered(*REQUESTS), messages.replay),
    "message reflected": Tampering("a request for an answer", _answered(*REQUESTS), messages.reflect),
    "message key": Tampering("another VMPL's key", _carried(*REQUESTS), messages.other_key),
    "message lengths": Tampering("another size, type or version", _carried(*REQUESTS), messages.change_lengths),
    "message dropped": Tampering("a message that never arrives", _asked(*REQUESTS), messages.drop_request),
    "message refused": Tampering("a refusal or busyness", _carried(*REQUESTS), messages.refuse_request),
    "certificates": Tampering("other certificates and lengths", _carried(Nae.EXTENDED_GUEST_REQUEST),
                              messages.change_certificates),
    "shared memory": Tampering("other bytes in shared pages", _entered, pages.change_shared),
    "between check and use": Tampering("shared bytes change as the guest faults", _entered, pages.step),
    "pages remapped": Tampering("another page at an address, and the old one again", _entered, pages.remap),
    "pages aliased": Tampering("one page at two addresses", _entered, pages.alias),
    "pages dropped": Tampering("a page taken away", _entered, pages.drop),
    "pages dropped midway": Tampering("a page taken away in the middle of a read", _entered, pages.drop_midway),
    "pages overwritten": Tampering("the host writes to private memory", _entered, pages.overwrite),
    "validated twice": Tampering("two pages that were validated at one address", _entered, pages.validate_twice),
    "pages as devices": Tampering("private memory that faults like a device's registers", _entered, pages.as_device),
    "GHCB private": Tampering("the GHCB becomes a private page", _answered(), pages.take_ghcb),
    "MSR answers": Tampering("other answers by the MSR protocol", _by_msr, answers.answer_msr),
    "MSR pointed": Tampering("the GHCB MSR leads elsewhere", _answered(), answers.point_msr),
    "#VC injected": Tampering("WeSee: a #VC that is the host's idea", _entered, events.inject_vc),
    "exceptions injected": Tampering("Heckler: exceptions that nothing raised", _entered, events.inject_exception),
    "interrupts injected": Tampering("interrupts and NMIs", _entered, events.inject_interrupt),
    "intercepts": Tampering("instructions intercepted at will", _entered, events.intercept),
}  # fmt: skip


def attacker(name: str, seed: int, *, private: Sequence[int], shared: Sequence[int]) -> Attacker:
    """An attempt of a class by its name, at these private and shared pages of the guest."""
    return Attacker(name, TAMPERINGS[name], seed, private, shared)
