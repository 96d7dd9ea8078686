"""The write-back cache: unseen where domains are coherent, stale lines and lost lines where they are not."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.cache import Cache
from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption, MissingKeyError
from tests.hardware.schemes import KEY_SIZES, PAGE

LINE = 64
SIZE = 4 << 20
BORDER = 2 << 20  # where the dictionary's first region ends
HOST = 1023
SPA = 5 * PAGE
OLD, NEW = b"old text".ljust(LINE, b"."), b"new text".ljust(LINE, b".")


def engine(scheme: str, *, mapping: bool = True) -> tuple[MemoryEncryption, Dram]:
    dram = Dram(SIZE, mapping=mapping)
    result = MemoryEncryption(dram, scheme, b"machine")
    for asid in (1, 2):
        result.install(asid, hashlib.shake_256(bytes([asid])).digest(KEY_SIZES[scheme]))
    return result, dram


def naples() -> tuple[Cache, MemoryEncryption, Dram]:
    memory, dram = engine("naples-xex")
    return Cache(memory, coherent=False), memory, dram


def milan() -> tuple[Cache, MemoryEncryption, Dram]:
    memory, dram = engine("xex-aes-128")
    return Cache(memory, coherent=True), memory, dram


def lines(cache: Cache) -> list[tuple[int, int, bool]]:
    return [tuple(line) for line in cache.lines().tolist()]


# A cache, seen from one domain


def test_writes_wait_in_the_cache_until_they_are_written_back() -> None:
    cache, memory, dram = milan()
    cache.write(1, SPA + 8, b"secret")
    assert cache.read(1, SPA + 8, 6) == b"secret"
    assert dram.read(SPA, LINE) == bytes(LINE)
    assert lines(cache) == [(SPA, 1, True)]
    cache.wbinvd()
    assert lines(cache) == []
    assert memory.read(1, SPA + 8, 6) == b"secret"


def test_a_read_brings_in_the_lines_that_it_touches() -> None:
    cache, _, _ = milan()
    cache.read(2, SPA + PAGE - 1, 2)
    cache.write(2, SPA + 200, b"x")
    assert lines(cache) == [(SPA + 192, 2, True), (SPA + PAGE - LINE, 2, False), (SPA + PAGE, 2, False)]
    assert repr(cache) == "Cache(3 lines, 1 dirty)"
    assert cache.words(2, np.array([SPA + 8, SPA + 128], np.uint64)).size == 2
    assert lines(cache)[:2] == [(SPA, 2, False), (SPA + 128, 2, False)]
    cache.clflush(2, SPA, 3 * LINE)
    assert cache.read(2, SPA, 0) == b""
    cache.write(2, SPA, b"")
    assert len(lines(cache)) == 3


@pytest.mark.parametrize("touched", ["first write", "read before"])
def test_a_line_written_in_part_keeps_its_rest(touched: str) -> None:
    cache, memory, _ = milan()
    memory.write(1, SPA, OLD)
    if touched == "read before":
        cache.read(1, SPA, 1)
    cache.write(1, SPA + 3, b"XY")
    cache.evict(SPA, 1)
    assert memory.read(1, SPA, LINE) == OLD[:3] + b"XY" + OLD[5:]


# Coherence between domains: the same story on Naples and on Milan


def story(cache: Cache) -> bytes:
    """The guest has written a line, then the host reads it; what the host sees, and the guest's line is dirty."""
    cache.read(0, SPA, LINE)
    cache.write(1, SPA, NEW)
    return cache.read(0, SPA, LINE)


def test_milan_keeps_domains_coherent() -> None:
    cache, memory, dram = milan()
    seen = story(cache)
    assert seen == dram.read(SPA, LINE) != bytes(LINE)
    assert memory.read(1, SPA, LINE) == NEW
    assert lines(cache) == [(SPA, 0, False)]


def test_naples_reads_stale_lines() -> None:
    cache, _, dram = naples()
    assert story(cache) == bytes(LINE) == dram.read(SPA, LINE)
    assert lines(cache) == [(SPA, 0, False), (SPA, 1, True)]
    assert cache.read(1, SPA, LINE) == NEW


FLUSHES = {
    "wbinvd": lambda cache: cache.wbinvd(),
    "both": lambda cache: (cache.vmpage_flush(1, SPA // PAGE), cache.clflush(0, SPA, LINE)),
    "clflush of each domain": lambda cache: (cache.clflush(1, SPA, LINE), cache.clflush(0, SPA, LINE)),
}
HALVES = {
    "clflush by the host": lambda cache: cache.clflush(0, SPA, LINE),  # misses the guest's dirty line
    "vmpage_flush": lambda cache: cache.vmpage_flush(1, SPA // PAGE),  # leaves the host's own stale line
    "vmpage_flush of another guest": lambda cache: cache.vmpage_flush(2, SPA // PAGE),
    "vmpage_flush of another page": lambda cache: cache.vmpage_flush(1, SPA // PAGE + 1),
    "clflush of another line": lambda cache: (cache.clflush(0, SPA + LINE, LINE), cache.clflush(1, SPA + LINE, LINE)),
}


@pytest.mark.parametrize("flush", FLUSHES)
def test_what_mends_a_stale_line_on_naples(flush: str) -> None:
    cache, memory, _ = naples()
    story(cache)
    FLUSHES[flush](cache)
    assert cache.read(0, SPA, LINE) == memory.read(0, SPA, LINE) != bytes(LINE)
    assert memory.read(1, SPA, LINE) == NEW


@pytest.mark.parametrize("flush", HALVES)
def test_what_does_not_mend_it(flush: str) -> None:
    cache, _, _ = naples()
    story(cache)
    HALVES[flush](cache)
    assert cache.read(0, SPA, LINE) == bytes(LINE)


def test_vmpage_flush_is_enough_where_the_host_has_no_line_of_its_own() -> None:
    cache, memory, dram = naples()
    cache.write(1, SPA, NEW)
    cache.write(1, SPA + PAGE, NEW)
    cache.vmpage_flush(1, SPA // PAGE)
    assert cache.read(0, SPA, LINE) == dram.read(SPA, LINE) != bytes(LINE)
    assert memory.read(1, SPA, LINE) == NEW
    assert lines(cache) == [(SPA, 0, False), (SPA + PAGE, 1, True)]


def test_clflush_finds_every_domain_on_milan() -> None:
    for flush, left in ((milan, []), (naples, [(SPA, 1, True)])):
        cache, memory, _ = flush()
        cache.write(1, SPA, NEW)
        cache.clflush(0, SPA, LINE)
        assert lines(cache) == left
        assert (memory.read(1, SPA, LINE) == NEW) is not left


def test_a_stale_dirty_line_comes_back_over_newer_contents_on_naples() -> None:
    """A page changes hands without a flush: the old owner's line lands on the new owner's data."""
    for build, survives in ((milan, True), (naples, False)):
        cache, memory, _ = build()
        cache.write(0, SPA, OLD)
        cache.write(1, SPA, NEW)
        cache.clflush(1, SPA, LINE)
        cache.evict(SPA, LINE)
        assert (memory.read(1, SPA, LINE) == NEW) is survives
        assert (memory.read(0, SPA, LINE) == OLD) is not survives


@pytest.mark.parametrize("build", [naples, milan])
def test_launch_encrypts_what_the_host_has_just_written(build) -> None:  # type: ignore[no-untyped-def]
    cache, memory, _ = build()
    cache.write(0, SPA, OLD)
    cache.encrypt_in_place(1, range(SPA // PAGE, SPA // PAGE + 1))
    assert cache.read(1, SPA, LINE) == OLD
    cache.clflush(1, SPA, PAGE)
    assert memory.read(1, SPA, LINE) == OLD
    cache.evict(SPA, PAGE)  # without a flush of the host's lines the plaintext comes back over the ciphertext
    assert (memory.read(0, SPA, LINE) == OLD) is (build is naples)


# Devices


@pytest.mark.parametrize("build", [naples, milan])
def test_a_device_needs_a_flush_of_other_domains(build) -> None:  # type: ignore[no-untyped-def]
    cache, memory, dram = build()
    cache.write(1, SPA, NEW)
    assert cache.dma_read(0, SPA, LINE) == bytes(LINE)
    cache.vmpage_flush(1, SPA // PAGE)
    assert cache.dma_read(0, SPA, LINE) == dram.read(SPA, LINE) != bytes(LINE)
    cache.write(1, SPA, OLD)
    cache.dma_write(0, SPA, NEW)
    assert memory.read(0, SPA, LINE) == NEW
    cache.wbinvd()
    assert memory.read(1, SPA, LINE) == OLD


@pytest.mark.parametrize("build", [naples, milan])
def test_a_device_sees_lines_of_its_own_domain(build) -> None:  # type: ignore[no-untyped-def]
    cache, memory, _ = build()
    cache.write(0, SPA, OLD)
    assert cache.dma_read(0, SPA + 4, 4) == b"text"
    assert lines(cache) == [(SPA, 0, False)]
    cache.write(0, SPA, NEW)
    cache.dma_write(0, SPA + 4, b"mail")
    assert cache.read(0, SPA, 9) == b"new mail."
    assert memory.read(0, SPA, 9) == b"new mail."


# Attacks


def test_dropped_lines_take_the_victim_back_in_time() -> None:
    """INVD that does not write back (CVE-2023-20592): the guest's last stores vanish, its page stays valid."""
    cache, _, _ = milan()
    cache.write(1, SPA, OLD)
    cache.write(2, SPA + PAGE, OLD)
    cache.wbinvd()
    cache.write(1, SPA, NEW)
    cache.read(2, SPA + PAGE, 1)
    assert cache.read(1, SPA, LINE) == NEW
    assert cache.invd() == 1
    assert lines(cache) == []
    assert cache.read(1, SPA, LINE) == OLD


def test_single_lines_can_be_dropped() -> None:
    cache, memory, _ = milan()
    memory.write(1, SPA, 3 * OLD)
    cache.write(1, SPA, 3 * NEW)
    assert cache.drop(SPA + LINE, LINE) == 1
    assert cache.read(1, SPA, 3 * LINE) == NEW + OLD + NEW
    assert lines(cache) == [(SPA, 1, True), (SPA + LINE, 1, False), (SPA + 2 * LINE, 1, True)]
    assert cache.drop(SPA + LINE, LINE) == 0
    assert lines(cache) == [(SPA, 1, True), (SPA + 2 * LINE, 1, True)]


def test_a_dirty_line_lands_in_memory_that_was_rebuilt_meanwhile() -> None:
    """Whoever builds a table in memory behind the cache must have it flushed first (CVE-2025-0033)."""
    for flushed in (True, False):
        cache, memory, dram = milan()
        cache.write(0, SPA, OLD)
        if flushed:
            cache.wbinvd()
        memory.write_pages(0, range(SPA // PAGE, SPA // PAGE + 1), np.full((1, PAGE), 0x55, np.uint8))
        cache.evict(SPA, LINE)
        assert (dram.read(SPA, LINE) == OLD) is not flushed
        assert dram.read(SPA + LINE, LINE) == b"\x55" * LINE


def test_lines_whose_key_is_gone_are_lost() -> None:
    cache, memory, dram = milan()
    cache.write(1, SPA, NEW)
    memory.remove(1)
    cache.wbinvd()
    assert lines(cache) == []
    assert dram.read(SPA, LINE) == bytes(LINE)


# Cache on equals cache off, where nobody breaks the rules

WINDOW, WINDOW_SIZE = BORDER - 2 * PAGE, 4 * PAGE
PAGES = st.lists(st.integers(0, 3), max_size=5)
KEYS = st.sampled_from([0, 1, 2, HOST])
places = st.integers(0, WINDOW_SIZE)
steps = st.one_of(
    st.tuples(st.just("write"), KEYS, places, st.binary(max_size=200)),
    st.tuples(st.just("read"), KEYS, places, st.integers(0, 300)),
    st.tuples(st.just("write_pages"), KEYS, PAGES, st.integers(0, 255)),
    st.tuples(st.just("read_pages"), KEYS, PAGES, st.none()),
    st.tuples(st.just("encrypt_in_place"), KEYS, st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("words"), KEYS, st.integers(0, WINDOW_SIZE // 8 - 1), st.none()),
    st.tuples(st.just("clflush"), KEYS, places, st.integers(0, 300)),
    st.tuples(st.just("evict"), st.none(), places, st.integers(0, 300)),
    st.tuples(st.just("vmpage_flush"), st.sampled_from([1, 2]), st.integers(0, 3), st.none()),
    st.tuples(st.just("wbinvd"), st.none(), st.none(), st.none()),
)
FLUSHING = {"clflush", "evict", "vmpage_flush", "wbinvd"}


@given(st.sampled_from(list(KEY_SIZES)), st.booleans(), st.booleans(), st.lists(steps, max_size=25))
def test_cache_on_equals_cache_off(scheme: str, coherent: bool, mapping: bool, story: list[tuple]) -> None:  # type: ignore[type-arg]
    """Without hardware coherence the software flushes whenever a line changes its domain."""
    off, plain_dram = engine(scheme, mapping=mapping)
    behind, dram = engine(scheme, mapping=mapping)
    cache = Cache(behind, coherent=coherent)
    before = None
    for step in story:
        name, key = step[0], step[1]
        if not coherent and name not in FLUSHING:
            if before not in (None, key) or name == "encrypt_in_place":
                cache.wbinvd()
            before = key
        assert apply(cache, step) == (None if name in FLUSHING else apply(off, step)), step
        if not coherent and name == "encrypt_in_place":
            cache.clflush(0, 0, SIZE)
    cache.wbinvd()
    assert dram.read(WINDOW, WINDOW_SIZE) == plain_dram.read(WINDOW, WINDOW_SIZE)


def apply(memory, step):  # type: ignore[no-untyped-def]
    """One step on a cache or an engine; what it reads."""
    name, key, place, extra = step
    base = WINDOW // PAGE
    match name:
        case "write":
            memory.write(key, WINDOW + place, extra[: WINDOW_SIZE - place])
        case "read":
            return memory.read(key, WINDOW + place, min(extra, WINDOW_SIZE - place))
        case "write_pages":
            rows = np.random.default_rng(extra).integers(0, 256, (len(place), PAGE), np.uint8)
            memory.write_pages(key, base + np.array(place, np.uint64), rows)
        case "read_pages":
            return memory.read_pages(key, base + np.array(place, np.uint64)).tobytes()
        case "encrypt_in_place":
            memory.encrypt_in_place(key, range(base + min(place, extra), base + max(place, extra)))
        case "words":
            return memory.words(key, np.array([[WINDOW + 8 * place]], np.uint64)).tolist()
        case "clflush":
            memory.clflush(key, WINDOW + place, min(extra, WINDOW_SIZE - place))
        case "evict":
            memory.evict(WINDOW + place, min(extra, WINDOW_SIZE - place))
        case "vmpage_flush":
            memory.vmpage_flush(key, base + place)
        case "wbinvd":
            memory.wbinvd()
        case _:
            raise AssertionError(name)
    return None


def test_lines_of_a_snapshot_come_back() -> None:
    cache, memory, _ = naples()
    story(cache)
    before, held = cache.snapshot(), lines(cache)
    cache.write(1, SPA, OLD)
    cache.wbinvd()
    cache.restore(before)
    assert lines(cache) == held
    assert cache.read(1, SPA, LINE) == NEW
    cache.write(1, SPA, OLD)
    cache.restore(before)
    assert cache.read(1, SPA, LINE) == NEW
    assert cache.size == memory.size == SIZE


BAD = [
    (lambda c: c.read(3, 0, 4), MissingKeyError, "key_id = 3"),
    (lambda c: c.read(1, SIZE - 3, 4), ValueError, "outside DRAM"),
    (lambda c: c.write(1, -1, b"ab"), ValueError, "outside DRAM"),
    (lambda c: c.read(1, 0.5, 4), TypeError, "spa = 0.5"),
    (lambda c: c.read_pages(1, range(1024, 1025)), ValueError, "page 0x400 is beyond the last"),
    (
        lambda c: c.write_pages(1, range(2), np.zeros((1, PAGE), np.uint8)),
        ValueError,
        r"data: an array of uint8 \(2, 4",
    ),
    (lambda c: c.encrypt_in_place(3, range(2)), MissingKeyError, "key_id = 3"),
    (lambda c: c.vmpage_flush(0, 1), ValueError, "asid = 0"),
    (lambda c: c.vmpage_flush(1, 1024), ValueError, "page 0x400 is beyond the last"),
    (lambda c: c.dma_write(3, 0, b"ab"), MissingKeyError, "key_id = 3"),
    (lambda c: c.drop(SIZE, 1), ValueError, "outside DRAM"),
]


@pytest.mark.parametrize(("operation", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_operands_change_nothing(operation, error, message) -> None:  # type: ignore[no-untyped-def]
    cache, _, dram = naples()
    story(cache)
    before, raw = lines(cache), dram.read(0, SIZE)
    with pytest.raises(error, match=message):
        operation(cache)
    assert (lines(cache), dram.read(0, SIZE)) == (before, raw)
