"""Exercises on what is old: lines of a guest that are left in the cache, and ciphertext that a host puts back.

Each runs the reader's answer on an engine of the model, with a cache or a small guest of its own. Sources: APM2
15.34.9; Linux sev_flush_encrypted_page; AMD's SEV-SNP white paper (replay).
"""

from collections.abc import Callable
from dataclasses import dataclass

from snpbook.exercises.memory_encryption import GUEST, OTHER, machine
from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.hardware.cache import Cache
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.spec.encryption import LINE_SIZE, KeyId
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

# 3: which flush

_CLEAN = "no line of the old guest is left"
_MINE, _ELSEWHERE, _OTHERS = 3, 4, 5


def _flush_cases() -> list[Case]:
    def case(name: str, coherent: bool, page_flush: bool, retire: bool, rule: str) -> Case:
        def run(answer: Answer) -> object:
            flush = answer(coherent, page_flush, retire)
            return flush if flush is None or flush is Ellipsis else _flushed(flush, coherent, page_flush, retire)

        return Case(name, run, _CLEAN, rule, "APM2 15.34.9; Linux sev_flush_encrypted_page")

    return [
        case("Milan takes a page back", True, True, False,
             "WBINVD empties the caches of the whole machine; where they are coherent, CLFLUSH finds every line"),
        case("Rome takes a page back", False, True, False,
             "without coherence CLFLUSH finds only lines of the host's own key; VMPAGE_FLUSH names the guest's ASID"),
        case("an early part without the MSR takes a page back", False, False, False,
             "without the MSR VMPAGE_FLUSH a write to it is a #GP, and WBINVD is all that is left"),
        case("Milan gives an ASID to another guest", True, True, True,
             "lines of the old guest may be in any page, and the new one would hit them: all of the cache must go"),
        case("Rome gives an ASID to another guest", False, True, True,
             "VMPAGE_FLUSH names one page, and lines of the old guest may be in any: WBINVD, coherent or not"),
        case("an early part without the MSR gives an ASID to another guest", False, False, True,
             "retiring an ASID takes WBINVD, whatever the part can do for single pages"),
    ]  # fmt: skip


def _flushed(flush: object, coherent: bool, page_flush: bool, retire: bool) -> str:
    """What a flush leaves, where guest 1 has lines in two pages and guest 2 in one."""
    cache = Cache(machine("xex-aes-128"), coherent=coherent)
    for asid, page in ((GUEST, _MINE), (GUEST, _ELSEWHERE), (OTHER, _OTHERS)):
        cache.write(asid, page << PAGE_SHIFT, bytes(4 * LINE_SIZE))
    if flush == "VMPAGE_FLUSH" and not page_flush:
        return "#GP: this part has no such MSR"
    flushes: dict[str, Callable[[], None]] = {
        "CLFLUSH": lambda: cache.clflush(KeyId.UNENCRYPTED, _MINE << PAGE_SHIFT, PAGE_SIZE),
        "VMPAGE_FLUSH": lambda: cache.vmpage_flush(GUEST, _MINE),
        "WBINVD": cache.wbinvd,
    }
    if not isinstance(flush, str) or flush not in flushes:
        return f"{flush!r} is none of {', '.join(flushes)}"
    flushes[flush]()
    lines = cache.lines()
    pages = range(_MINE, _ELSEWHERE + 1 if retire else _MINE + 1)
    stale = sum(line["key_id"] == GUEST and line["spa"] >> PAGE_SHIFT in pages for line in lines)
    if stale:
        return f"{stale} lines of the old guest are left"
    needless = not retire and not (lines["key_id"] == OTHER).any() and (coherent or page_flush)
    return f"{_CLEAN}, but those of all other guests are gone, too" if needless else _CLEAN


def flush_for(coherent: bool, page_flush: bool, retire: bool) -> str:
    """The cheapest flush that leaves no line of the guest: "CLFLUSH", "VMPAGE_FLUSH" or "WBINVD"."""
    if retire:
        return "WBINVD"
    if coherent:
        return "CLFLUSH"
    return "VMPAGE_FLUSH" if page_flush else "WBINVD"


def _always_clflush(coherent: bool, page_flush: bool, retire: bool) -> str:
    return "CLFLUSH"


def _always_wbinvd(coherent: bool, page_flush: bool, retire: bool) -> str:
    return "WBINVD"


def _always_vmpage_flush(coherent: bool, page_flush: bool, retire: bool) -> str:
    return "VMPAGE_FLUSH"


def _page_by_page_without_coherence(coherent: bool, page_flush: bool, retire: bool) -> str:
    return flush_for(coherent, page_flush, retire and coherent)


def _one_page_only(coherent: bool, page_flush: bool, retire: bool) -> str:
    return flush_for(coherent, page_flush, retire=False)


register(
    Exercise(
        id="memory_encryption.3",
        title="Which flush?",
        minutes=10,
        difficulty=2,
        prerequisites=("the lab on the cache",),
        task=(
            "A guest has written lines that are still in the cache. Return the cheapest flush after which none of its "
            'lines is left: "CLFLUSH" or "VMPAGE_FLUSH" for one page, or "WBINVD" on all cores. You are told whether '
            "caches are coherent across keys, whether there is an MSR VMPAGE_FLUSH, and whether one page goes back to "
            "the host or the ASID is to be retired, with all pages that its guest may have written."
        ),
        stub='''\
def flush_for(coherent, page_flush, retire):
    """The cheapest flush that leaves no line of the guest: "CLFLUSH", "VMPAGE_FLUSH" or "WBINVD"."""
    ...
''',
        reference=flush_for,
        wrong=(
            Wrong(_always_clflush, "names the guest's ASID"),
            Wrong(_always_wbinvd, "empties the caches of the whole machine"),
            Wrong(_always_vmpage_flush, "WBINVD is all that is left"),
            Wrong(_one_page_only, "all of the cache must go"),
            Wrong(_page_by_page_without_coherence, "VMPAGE_FLUSH names one page"),
        ),
        hints=(
            "Lines carry the key under which they were brought in. Which flush finds a line of another key?",
            "CLFLUSH finds lines of all keys on coherent parts, of its own alone on others. VMPAGE_FLUSH is given an "
            "ASID and a page. WBINVD asks nothing and spares nothing.",
            "Retiring an ASID: WBINVD. Otherwise CLFLUSH if coherent, else VMPAGE_FLUSH if it exists, else WBINVD.",
        ),
        solution=(
            "This is what Linux does: CLFLUSH where the hardware keeps caches coherent across keys (Milan and later), "
            "else the MSR, else WBINVD on all cores. Before an ASID gets another guest's key, WBINVD on all cores is "
            "needed in any case, followed by the firmware's DF_FLUSH."
        ),
        cases=_flush_cases,
    )
)


# 4: replay


@dataclass(frozen=True, slots=True)
class SafeGuest:
    """A guest that asks for a PIN and locks itself after three wrong ones; its counter lies in encrypted memory."""

    engine: MemoryEncryption
    spa: int
    size: int
    pin: int

    def try_pin(self, pin: int) -> str:
        """What the guest answers: "open", "wrong" or "locked"."""
        left = int.from_bytes(self.engine.read(GUEST, self.spa, self.size), "little")
        if not 1 <= left <= _TRIES:
            return "locked"
        if pin == self.pin:
            return "open"
        self.engine.write(GUEST, self.spa, (left - 1).to_bytes(self.size, "little"))
        return "wrong"


@dataclass(frozen=True, slots=True)
class RawHost:
    """A host before SNP: it reads and writes all of memory, without a guest's key."""

    engine: MemoryEncryption

    def read(self, spa: int, size: int) -> bytes:
        """Bytes as the DIMM holds them."""
        return self.engine.read(KeyId.UNENCRYPTED, spa, size)

    def write(self, spa: int, data: bytes) -> None:
        """Change what the DIMM holds."""
        self.engine.write(KeyId.UNENCRYPTED, spa, data)


_TRIES, _PINS = 3, 100


def _replay_cases() -> list[Case]:
    def case(name: str, spa: int, size: int, pin: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            engine = machine("xts-aes-256")
            engine.write(GUEST, spa // 16 * 16, bytes(16))
            engine.write(GUEST, spa, _TRIES.to_bytes(size, "little"))
            return answer(RawHost(engine), SafeGuest(engine, spa, size, pin), spa, size)

        return Case(name, run, pin, rule, "SNP white paper, table 1: replay")

    return [
        case("an easy PIN", 0x3000, 16, 2, "what a host writes is decrypted before the guest reads it: you can put "
             "back only what the guest itself has written"),
        case("any PIN", 0x3040, 16, 57, "after three wrong tries the guest is locked for good, unless its old counter "
             "comes back"),
        case("a counter of 8 bytes in the middle of a block", 0x30C8, 8, 99,
             "the cipher works on whole blocks: save and put back all 16 bytes of the block that holds the counter"),
    ]  # fmt: skip


def find_pin(host: RawHost, guest: SafeGuest, spa: int, size: int) -> int:
    """The guest's PIN, 0 to 99; its counter of `size` bytes lies at `spa`."""
    block = spa // 16 * 16
    before = host.read(block, 16)
    for pin in range(100):
        if guest.try_pin(pin) == "open":
            return pin
        host.write(block, before)
    return -1


def _without_replay(host: RawHost, guest: SafeGuest, spa: int, size: int) -> int:
    return next((pin for pin in range(_PINS) if guest.try_pin(pin) == "open"), -1)


def _gives_up_silently(host: RawHost, guest: SafeGuest, spa: int, size: int) -> int | None:
    return next((pin for pin in range(_PINS) if guest.try_pin(pin) == "open"), None)


def _writes_plaintext(host: RawHost, guest: SafeGuest, spa: int, size: int) -> int:
    for pin in range(_PINS):
        host.write(spa, _TRIES.to_bytes(size, "little"))
        if guest.try_pin(pin) == "open":
            return pin
    return -1


def _counter_alone(host: RawHost, guest: SafeGuest, spa: int, size: int) -> int:
    before = host.read(spa, size)
    for pin in range(_PINS):
        if guest.try_pin(pin) == "open":
            return pin
        host.write(spa, before)
    return -1


register(
    Exercise(
        id="memory_encryption.4",
        title="Unlimited tries",
        minutes=15,
        difficulty=2,
        prerequisites=("the lab on freshness",),
        task=(
            "A guest on an SEV machine, before SNP, opens a safe for a PIN from 0 to 99 and locks itself after three "
            "wrong tries. Its counter is encrypted with AES-256 XTS. You are the host: host.read(spa, size) and "
            "host.write(spa, data) reach all of memory, without the key, and guest.try_pin(pin) answers "
            '"open", "wrong" or "locked". You know where the counter is and how many bytes it has. Return the PIN.'
        ),
        stub='''\
def find_pin(host, guest, spa, size):
    """The guest's PIN, 0 to 99; its counter of `size` bytes lies at `spa`."""
    ...
''',
        reference=find_pin,
        wrong=(
            Wrong(_without_replay, "unless its old counter comes back"),
            Wrong(_gives_up_silently, "old counter comes back (your function does not return a value here)"),
            Wrong(_writes_plaintext, "decrypted before the guest reads it"),
            Wrong(_counter_alone, "all 16 bytes of the block"),
        ),
        hints=(
            "You cannot make a ciphertext. But you have seen one that the guest takes for three tries.",
            "Copy the counter's ciphertext before the first try, and put it back before it reaches zero.",
            "block = spa // 16 * 16; before = host.read(block, 16). After each wrong try: host.write(block, before).",
        ),
        solution=(
            "Nothing in the ciphertext says when it was written, so the guest takes an old block for the current one. "
            "No cipher of this kind can prevent that. SNP does it with the RMP: the host's write to the guest's page "
            "is refused."
        ),
        cases=_replay_cases,
    )
)
