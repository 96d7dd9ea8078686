"""Small programs that keep secrets in a guest's private memory, use it, and notice what somebody does to it.

Each is a class on the guest's CPU and on addresses that its kernel gave it. All that it keeps lies in that memory, so
that a further program of the same guest goes on where the last one ended. They run on every kind of guest:

    async def work(cpu):
        await Kernel.attach(cpu, Layout.of(image))  # snpbook.guest.boot: the #VC handler, as after any boot
        store = KeyValueStore(cpu, range(0x400000, 0x408000))
        await store.create()
        await store.put(b"name", b"secret")
        return await store.get(b"name")

    guest.run(work)  # the value; raises `Corrupted` where memory is not what was left there
"""

from snpbook.guest.workloads.corruption import Corrupted, Corruption, Finding
from snpbook.guest.workloads.key_holder import KeyHolder, RecordRefused
from snpbook.guest.workloads.store import KeyValueStore
from snpbook.guest.workloads.toucher import MemoryToucher

__all__ = ["Corrupted", "Corruption", "Finding", "KeyHolder", "KeyValueStore", "MemoryToucher", "RecordRefused"]
