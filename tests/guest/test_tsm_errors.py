"""What the attestation directory answers where neither user nor host have done anything wrong that it could see."""

from __future__ import annotations

import errno

import pytest

from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.guest.sev_guest import SevGuest
from snpbook.guest.tsm import ReportEntry
from snpbook.hardware.guest_cpu import GuestCpu
from tests.guest.booted import fresh

NONCE = bytes(range(64))


def test_a_counter_that_comes_round() -> None:
    """2^64 - 1 writes after a read: the next would make the counter what was read, and an old report would pass."""
    guest = fresh()

    async def body(cpu: GuestCpu) -> list[int]:
        entry = ReportEntry(SevGuest(await Kernel.attach(cpu, Layout.of(guest.vmm.image))))
        entry.write_inblob(NONCE)
        await entry.outblob()
        entry._written = 0  # as after all these writes
        found = []
        for act in (lambda: entry.write_inblob(NONCE), lambda: entry.write_privlevel(0)):
            with pytest.raises(OSError, match="EBUSY") as caught:
                act()
            found.append(caught.value.errno or 0)
        return [*found, entry.generation]

    assert guest.run(body) == [errno.EBUSY, errno.EBUSY, 0]


@pytest.mark.parametrize(
    ("status", "number"), [(0x16, errno.EINVAL), (0x27, errno.EINVAL), (0x1, errno.ENXIO), (0xFFFFFFFF, errno.ENXIO)]
)
def test_statuses_of_the_firmware(status: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the firmware's answer, which is authentic: the key stays."""
    guest = fresh()

    async def answered(*arguments: object, **options: object) -> bytes:
        return status.to_bytes(4, "little") + bytes(28)

    monkeypatch.setattr(Channel, "exchange", answered)

    async def body(cpu: GuestCpu) -> int:
        entry = ReportEntry(SevGuest(await Kernel.attach(cpu, Layout.of(guest.vmm.image))))
        entry.write_inblob(NONCE)
        with pytest.raises(RequestFailed) as caught:
            await entry.outblob()
        return caught.value.errno or 0

    assert guest.run(body) == number
