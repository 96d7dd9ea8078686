"""The workloads: they work on every kind of guest, what they keep is not in the clear, and they notice what is done."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.guest.workloads import Corrupted, Corruption, KeyHolder, KeyValueStore, MemoryToucher, RecordRefused
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.system import Guest
from tests.guest.booted import fresh
from tests.machines import PAGE, frame_of

KINDS = ["plain", "sev", "sev-es", "snp"]
STORE, PATTERN, KEY = range(0x400000, 0x408000), range(0x500000, 0x503000), 0x410000


def running(guest: Guest, work: Callable[[GuestCpu], Any]) -> Any:
    """A program of a guest that has booted."""
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        await Kernel.attach(cpu, place)
        return await work(cpu)

    return guest.run(program)


def spa(guest: Guest, gpa: int) -> int:
    """Where a page of the guest lies."""
    vm = guest.vmm.vm
    if guest.vmm.private_memory:
        return frame_of(vm, gpa)
    slot = vm.slots.of(gpa >> 12)
    assert slot is not None
    return int(slot.shared_frames(vm.process.space, range(gpa >> 12, (gpa >> 12) + 1))[0]) << 12


@pytest.mark.parametrize("kind", KINDS)
def test_they_work_on_every_kind_and_go_on_in_a_later_program(kind: str) -> None:
    guest = fresh(kind=kind)

    async def begin(cpu: GuestCpu) -> Any:
        store, toucher = KeyValueStore(cpu, STORE), MemoryToucher(cpu, PATTERN)
        await store.create()
        await store.put(b"a name", b"a secret of the guest")
        await toucher.fill(1)
        return await KeyHolder(cpu, KEY).create()

    async def go_on(cpu: GuestCpu) -> Any:
        store = KeyValueStore(cpu, STORE)
        await store.check()
        kept = await store.get(b"a name"), await store.get(b"another")
        return kept, await MemoryToucher(cpu, PATTERN).check(1), await KeyHolder(cpu, KEY).public()

    public = running(guest, begin)
    assert running(guest, go_on) == ((b"a secret of the guest", None), 3, public)
    memory = b"".join(guest.system.machine.dram.read(spa(guest, gpa), PAGE) for gpa in STORE[::PAGE])
    assert (b"a secret of the guest" in memory) == (kind == "plain")


def test_the_store_is_a_dictionary() -> None:
    """Random calls against a dict, on two buckets that fill up."""
    draw = random.Random("store")
    keys = [bytes([65 + i]) * (i + 1) for i in range(12)]
    calls = [(draw.choice(["put", "get"]), draw.choice(keys), draw.randbytes(draw.randrange(1500))) for _ in range(120)]

    async def work(cpu: GuestCpu) -> tuple[int, int]:
        store, model, full = KeyValueStore(cpu, range(0x400000, 0x403000)), dict[bytes, bytes](), 0
        await store.create()
        for name, key, value in calls:
            if name == "get":
                assert await store.get(key) == model.get(key)
                continue
            try:
                await store.put(key, value)
            except ValueError:
                full += 1
            else:
                model[key] = value
        for key in keys:
            assert await store.get(key) == model.get(key)
        return full, len(model)

    full, kept = running(fresh(), work)
    assert full
    assert kept > 3


@pytest.mark.parametrize("memory", [range(0x400000, 0x401000), range(0x400001, 0x408001), range(600 * PAGE)])
def test_memory_that_is_no_stores(memory: range) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        KeyValueStore(GuestCpu(), memory)


# What they notice. Without SNP the host has the pages in its hands; with it, the DIMMs are left.


def replay(guest: Guest, gpa: int, act: Callable[[], Any]) -> None:
    """Take what is in DRAM, let the guest write, and put it back."""
    dram, place = guest.system.machine.dram, spa(guest, gpa)
    old = dram.read(place, PAGE)
    act()
    dram.write(place, old)


def remap(guest: Guest, gpa: int, other: int) -> None:
    """The host's nested tables lead from one page to another."""
    guest.vmm.vm.mmu.tables.map(gpa >> 12, np.array([spa(guest, other) >> 12], np.uint64))


def flip(guest: Guest, gpa: int) -> None:
    dram, place = guest.system.machine.dram, spa(guest, gpa)
    dram.write(place + 32, bytes([dram.read(place + 32, 1)[0] ^ 1]))


def filled(guest: Guest, number: int) -> None:
    running(guest, lambda cpu: MemoryToucher(cpu, PATTERN).fill(number))


def looked(guest: Guest, number: int) -> list[Any]:
    found: list[Any] = running(guest, lambda cpu: MemoryToucher(cpu, PATTERN).look(number))
    return [(finding.gpa, finding.corruption, finding.found) for finding in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_toucher_tells_what_became_of_a_page(kind: str) -> None:
    guest = fresh(kind=kind)
    filled(guest, 1)
    replay(guest, 0x501000, lambda: filled(guest, 2))
    assert looked(guest, 2) == [(0x501000, Corruption.STALE, "round 1, where 2 was written")]

    filled(guest, 3)
    flip(guest, 0x500000)
    ((gpa, corruption, found),) = looked(guest, 3)
    assert (gpa, corruption) == (0x500000, Corruption.GARBAGE)
    changed = 1 if kind == "plain" else 2
    assert found.startswith(f"{changed} of 512 words differ, the first at 0x500020"), "a block of the cipher"

    if kind != "snp":  # there the reverse map would not have it
        filled(guest, 4)
        remap(guest, 0x502000, 0x500000)
        assert looked(guest, 4) == [(0x502000, Corruption.SWAPPED, "page 0x500000, round 4")]
    with pytest.raises(Corrupted, match="page 0x500000"):
        running(guest, lambda cpu: MemoryToucher(cpu, PATTERN).check(5))


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
def test_the_store_notices_a_bucket_and_not_the_whole(kind: str) -> None:
    """An old bucket under a new index is told; an old bucket under its old index is what it was."""
    guest = fresh(kind=kind)

    async def begin(cpu: GuestCpu) -> int:
        store = KeyValueStore(cpu, STORE)
        await store.create()
        await store.put(b"balance", b"100")
        return store.page_of(b"balance")

    def spend() -> None:
        running(guest, lambda cpu: KeyValueStore(cpu, STORE).put(b"balance", b"0"))

    def balance() -> Any:
        return running(guest, lambda cpu: KeyValueStore(cpu, STORE).get(b"balance"))

    page = running(guest, begin)
    replay(guest, page, spend)
    with pytest.raises(Corrupted) as raised:
        balance()
    (finding,) = raised.value.findings
    assert (finding.gpa, finding.corruption) == (page, Corruption.STALE)
    assert finding.found == "version 1, where 2 was written"

    running(guest, begin)
    replay(guest, STORE.start, lambda: replay(guest, page, spend))
    assert balance() == b"100", "spent twice: nothing in the memory can know"

    other = STORE.start + PAGE + (page == STORE.start + PAGE) * PAGE
    remap(guest, page, other)
    with pytest.raises(Corrupted, match=f"page {page:#x} holds the content of another page: page {other:#x}"):
        balance()


@pytest.mark.parametrize("kind", ["sev", "snp"])
def test_junk_in_a_bucket(kind: str) -> None:
    guest = fresh(kind=kind)
    running(guest, lambda cpu: KeyValueStore(cpu, STORE).create())
    flip(guest, STORE.start + 2 * PAGE)
    with pytest.raises(Corrupted, match="nobody wrote") as raised:
        running(guest, lambda cpu: KeyValueStore(cpu, STORE).check())
    assert raised.value.findings[0].gpa == STORE.start + 2 * PAGE


# The key holder and its client, who is written down again here.


class Client:
    def __init__(self, seed: bytes) -> None:
        self.own = X25519PrivateKey.from_private_bytes(seed.ljust(32, b"\1"))
        self.hello = b"client random".ljust(32) + self.own.public_key().public_bytes_raw()

    def finish(self, answer: bytes, public: bytes) -> None:
        share, signature = answer[:32], answer[32:]
        said = b"snpbook key holder" + sha256(self.hello + share + public).digest()
        Ed25519PublicKey.from_public_bytes(public).verify(signature, said)
        shared = self.own.exchange(X25519PublicKey.from_public_bytes(share))
        keys = HKDF(SHA256(), 64, said, b"snpbook session").derive(shared)
        self.reads, self.writes = AESGCM(keys[:32]), AESGCM(keys[32:])


def test_a_session() -> None:
    guest, client = fresh(), Client(b"x")
    public = running(guest, lambda cpu: KeyHolder(cpu, KEY).create())
    client.finish(running(guest, lambda cpu: KeyHolder(cpu, KEY).accept(client.hello)), public)
    for number, text in enumerate([b"first", b"", b"third" * 100]):
        nonce = number.to_bytes(12, "big")
        sealed = running(guest, lambda cpu, text=text: KeyHolder(cpu, KEY).send(text))
        assert client.reads.decrypt(nonce, sealed, None) == text
        record = client.writes.encrypt(nonce, text, None)
        assert running(guest, lambda cpu, record=record: KeyHolder(cpu, KEY).receive(record)) == text
        with pytest.raises(RecordRefused, match=f"not number {number + 1}"):
            running(guest, lambda cpu, record=record: KeyHolder(cpu, KEY).receive(record))
    assert running(guest, lambda cpu: KeyHolder(cpu, KEY).public()) == public


def test_nothing_is_said_before_a_session() -> None:
    guest = fresh()
    running(guest, lambda cpu: KeyHolder(cpu, KEY).create())
    for program in (lambda cpu: KeyHolder(cpu, KEY).send(b"x"), lambda cpu: KeyHolder(cpu, KEY).receive(b"x" * 16)):
        with pytest.raises(ValueError, match="no session"):
            running(guest, program)
    with pytest.raises(ValueError, match="share of 32"):
        running(guest, lambda cpu: KeyHolder(cpu, KEY).accept(b"short"))


def test_a_replayed_key_page_repeats_a_number() -> None:
    """Without SNP: two texts under one nonce, of which the host learns the difference."""
    guest, client = fresh(kind="sev-es"), Client(b"y")
    public = running(guest, lambda cpu: KeyHolder(cpu, KEY).create())
    client.finish(running(guest, lambda cpu: KeyHolder(cpu, KEY).accept(client.hello)), public)
    sealed = []

    def send(text: bytes) -> None:
        sealed.append(running(guest, lambda cpu: KeyHolder(cpu, KEY).send(text)))

    replay(guest, KEY, lambda: send(b"attack at dawn"))
    send(b"attack at dusk")
    difference = bytes(a ^ b for a, b in zip(sealed[0][:14], sealed[1][:14], strict=True))
    assert difference == bytes(a ^ b for a, b in zip(b"attack at dawn", b"attack at dusk", strict=True))


def test_a_holder_whose_page_was_changed_signs_nothing() -> None:
    guest = fresh()
    running(guest, lambda cpu: KeyHolder(cpu, KEY).create())
    flip(guest, KEY)
    with pytest.raises(Corrupted, match="page 0x410000"):
        running(guest, lambda cpu: KeyHolder(cpu, KEY).accept(Client(b"z").hello))
