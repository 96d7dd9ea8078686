"""What a host does to pages: changes shared ones at the worst moment, and moves, doubles or takes away private ones.

Sources: APM2 15.36; AMD SEV-SNP white paper (remapping, aliasing, replay).
"""

from __future__ import annotations

from snpbook.attacks.attacker import Attacker
from snpbook.attacks.ghcb import Moment
from snpbook.hardware.exits import Npf
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import PSC_ENTRY, PSC_HEADER, Nae
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

_BLOCK = 16


# Shared memory.


def change_shared(host: Attacker, m: Moment) -> bool:
    """Some bytes of a shared page: a number at its beginning, or anything anywhere; or what was there before."""
    if host.changed and host.random.random() < 0.5:
        m.write(*host.changed.pop())
        return True
    gpa, data = host.random.choice(host.shared), host.number().to_bytes(8, "little")
    if host.random.random() < 0.5:
        gpa += host.random.randrange(PAGE_SIZE - _BLOCK)
        data = host.random.randbytes(_BLOCK)
    host.changed.append((gpa, m.read(gpa, len(data))))
    m.write(gpa, data)
    return True


def step(host: Attacker, m: Moment) -> bool:
    """Drop all mappings, so that the guest stops at every page it touches; change shared bytes while it waits."""
    if not isinstance(m.exit, Npf):
        for gpa in (*host.private, *host.shared):
            m.unmap(range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1))
    return change_shared(host, m)


# Pages.


def remap(host: Attacker, m: Moment) -> bool:
    """Another page behind an address that the guest has validated; the old one is put aside, and comes back."""
    if host.held and host.random.random() < 0.5:
        gpa, frame = host.held.popitem()
        m.map(gpa, frame)
        return True
    gpa = host.random.choice(host.private)
    frame_now = m.frame(gpa)
    if frame_now is None:
        return False
    host.held.setdefault(gpa, frame_now)
    m.fresh(gpa)
    return True


def alias(host: Attacker, m: Moment) -> bool:
    """Two addresses lead to one page: of the guest's own, or of shared memory."""
    gpa, other = host.random.choice(host.private), host.random.choice(host.private)
    found = m.frame(other)
    if found is None or other == gpa:
        return False
    m.map(gpa, found)
    return True


def drop(host: Attacker, m: Moment) -> bool:
    """The page is the hypervisor's again; half the time it is given back, empty and not validated."""
    gpa = host.random.choice(host.private)
    found = m.frame(gpa)
    if found is None:
        return False
    m.take_away(found)
    m.unmap(range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1))
    if host.random.random() < 0.5:
        m.fresh(gpa)
    return True


def drop_midway(host: Attacker, m: Moment) -> bool:
    """Drop mappings of some pages, so that the guest stops within a read of them; take one away while it waits."""
    if isinstance(m.exit, Npf):
        return drop(host, m)
    for gpa in host.random.sample(host.private, host.random.randint(1, len(host.private))):
        m.unmap(range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1))
    return False


def overwrite(host: Attacker, m: Moment) -> bool:
    """Write to a private page from the host's side."""
    found = m.frame(host.random.choice(host.private))
    if found is not None:
        m.vcpu.vm.kernel.cpu.write(found << PAGE_SHIFT, host.random.randbytes(_BLOCK))
    return found is not None


def validate_twice(host: Attacker, m: Moment) -> bool:
    """Have one address validated with two pages: another page before the guest rescinds, one more before it validates
    again, and in the end the first.
    """
    gpa = host.private[-1]
    asked = None
    if m.event is Nae.PAGE_STATE_CHANGE and m.page is not None:
        asked = PSC_ENTRY.unpack(m.page.shared_buffer[PSC_HEADER.size : PSC_HEADER.size + PSC_ENTRY.size])
    if asked is not None and asked.gfn << PAGE_SHIFT == gpa and asked.operation == spec.PageOperation.PRIVATE:
        if gpa not in host.held:
            return False
        m.fresh(gpa)
        host.often = 0.5
        return True
    if asked is None and gpa not in host.held:
        found = m.frame(gpa)
        if found is None:
            return False
        host.held[gpa] = found
        m.fresh(gpa)
        return True
    if asked is None and host.often == 0.5:
        m.map(gpa, host.held[gpa])
        return True
    return False


def as_device(host: Attacker, m: Moment) -> bool:
    """A nested entry with a reserved bit: an access is #VC for MMIO, and the guest would hand out what it stores."""
    m.vcpu.vm.mmu.tables.map_mmio(host.random.choice(host.private) >> PAGE_SHIFT)
    return True


def take_ghcb(host: Attacker, m: Moment) -> bool:
    """The page of the GHCB becomes a private one of the guest's."""
    m.fresh(m.value & -PAGE_SIZE)
    return True
