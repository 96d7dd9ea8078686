"""Lies in KVM's answers: registers, results and the bitmap of the GHCB page, lists of page state changes, the MSR.

Sources: GHCB specification; what Linux checks of it (arch/x86/coco/sev).
"""

from __future__ import annotations

from snpbook.attacks.attacker import REGISTERS, Attacker
from snpbook.attacks.ghcb import Moment, Stage
from snpbook.host.kvm.ap_creation import Queued
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import AP_CREATION, GHCB, PSC_ENTRY, PSC_HEADER, ApCreation, MsrCode
from snpbook.spec.uapi_kvm import MpState
from snpbook.spec.vmcb import EVENT, EventKind, Vector

_WORD = 1 << 64
_VECTORS = 1 << 8


# Answers in the page.


def change_registers(host: Attacker, m: Moment) -> bool:
    """Some of the registers that every event returns."""
    for name in host.random.sample(REGISTERS, host.random.randint(1, len(REGISTERS))):
        m.put(**{name: host.number()})
    return True


def change_result(host: Attacker, m: Moment) -> bool:
    """SW_EXITINFO1 or 2."""
    m.put(**{host.random.choice(("sw_exit_info_1", "sw_exit_info_2")): host.number()})
    return True


def answer_with_event(host: Attacker, m: Moment) -> bool:
    """SW_EXITINFO1 = 1: the guest shall take an event, of any kind and vector."""
    vector = host.random.choice((Vector.GP, Vector.UD, host.random.randrange(_VECTORS)))
    kind, valid = host.random.choice((EventKind.EXCEPTION, EventKind.EXCEPTION, *EventKind)), host.random.random() < 0.9
    event = EVENT.pack(vector=vector, kind=kind, valid=int(valid), has_error=host.random.randrange(2))
    m.put(sw_exit_info_1=spec.INJECT, sw_exit_info_2=int.from_bytes(event, "little"))
    return True


def change_bitmap(host: Attacker, m: Moment) -> bool:
    """Nothing marked, anything, or all but one field that KVM marks."""
    size = GHCB.fields["valid_bitmap"].size
    left_out = host.random.choice(("sw_exit_info_1", "sw_exit_info_2", *REGISTERS))
    rest = [name for name in ("sw_exit_info_1", "sw_exit_info_2", *REGISTERS) if name != left_out]
    junk = host.random.choice((bytes(size), host.random.randbytes(size), spec.valid_bitmap(*rest)))
    m.put(valid_bitmap=junk)
    return True


def change_buffer(host: Attacker, m: Moment) -> bool:
    """The whole shared buffer: list, string or device data."""
    m.put(shared_buffer=host.random.randbytes(spec.SHARED_BUFFER_SIZE))
    return True


def change_counts(host: Attacker, m: Moment) -> bool:
    """Count, exit information and scratch address, as if the guest had asked for another size."""
    m.put(**{host.random.choice(("sw_exit_info_2", "sw_scratch", "rcx", "sw_exit_code")): host.number()})
    return True


def withhold(host: Attacker, m: Moment) -> bool:
    """The guest finds its own request; half the time marked as an answer."""
    m.keep()
    if host.random.random() < 0.5:
        m.mark("sw_exit_info_1", "sw_exit_info_2", *REGISTERS)
    return True


# Page state changes.


def _header(m: Moment) -> bytes:
    return m.read(m.value + spec.SHARED_BUFFER_OFFSET, PSC_HEADER.size)


def change_header(host: Attacker, m: Moment) -> bool:
    """One field of the header: near its value, or anything; or the bytes that must be zero."""
    header, near = PSC_HEADER.unpack(_header(m)), (-512, -64, -2, -1, 1, 2, 64, 512)
    name = host.random.choice(("cur_entry", "end_entry", "reserved"))
    data = _header(m)
    if name == "reserved":
        data = host.flipped(data, PSC_HEADER.offset("end_entry") + 2)
    else:
        value = host.random.choice((getattr(header, name) + host.random.choice(near), host.number()))
        data = bytes(header.replace(**{name: value % (PSC_HEADER.fields[name].limit + 1)}))
    m.write(m.value + spec.SHARED_BUFFER_OFFSET, data)
    return True


def change_entry(host: Attacker, m: Moment) -> bool:
    """Before or after KVM reads it: another page, operation or size, or one that is done in part."""
    stop = PSC_HEADER.unpack(_header(m)).end_entry + 1
    at = m.value + spec.SHARED_BUFFER_OFFSET + PSC_HEADER.size + host.random.randrange(stop) * PSC_ENTRY.size
    m.write(at, host.flipped(m.read(at, PSC_ENTRY.size)))
    return True


def fail_list(host: Attacker, m: Moment) -> bool:
    """An error of the whole list, after it was done."""
    m.put(sw_exit_info_2=host.random.choice((spec.PSC_INVALID_HEADER, spec.PSC_INVALID_ENTRY, spec.PSC_FAILURE, 1)))
    return True


def feign_list(host: Attacker, m: Moment) -> bool:
    """Say that a list is done, and do nothing or a part of it."""
    header = PSC_HEADER.unpack(_header(m))
    done = host.random.choice((header.end_entry + 1, host.random.randint(header.cur_entry, header.end_entry + 1)))
    m.keep()
    m.put(sw_exit_info_1=0, sw_exit_info_2=0)
    m.mark("sw_exit_info_1", "sw_exit_info_2")
    m.write(m.value + spec.SHARED_BUFFER_OFFSET, bytes(header.replace(cur_entry=done)))
    return True


# Processors.


def change_creation(host: Attacker, m: Moment) -> bool:
    """A request to create or end a processor: feigned, another one, refused though it was done, or undone."""
    assert m.page is not None
    asked = AP_CREATION.unpack(m.page.sw_exit_info_1.to_bytes(AP_CREATION.size, "little"))
    target = m.vcpu.vm.vcpus.get(asked.apic_id)
    if m.stage is Stage.EXIT and host.random.random() < 0.5:
        m.keep()
        m.put(sw_exit_info_1=0, sw_exit_info_2=0)
        m.mark("sw_exit_info_1", "sw_exit_info_2")
    elif m.stage is Stage.EXIT:
        other = asked.replace(request=host.random.choice([*ApCreation]), apic_id=host.random.randrange(3))
        m.put(sw_exit_info_1=int.from_bytes(bytes(other), "little"))
        m.put(sw_exit_info_2=host.random.choice((m.page.sw_exit_info_2, *host.private)))
    elif target is None or host.random.random() < 0.3:
        m.put(sw_exit_info_1=host.random.choice((spec.MALFORMED, spec.INJECT)), sw_exit_info_2=host.number())
    else:
        target.queued[0] = Queued(host.random.choice((None, *host.private)))
        target.mp_state = MpState.RUNNABLE
    return True


# The MSR.


def answer_msr(host: Attacker, m: Moment) -> bool:
    """Another code, other data, or both."""
    code = host.random.choice((m.value & spec.MSR_CODE_MASK | 1, host.random.choice([*MsrCode]), host.number()))
    data = host.random.choice((host.number(), m.vcpu.control().ghcb_gpa >> spec.MSR_DATA_SHIFT, 0))
    m.answer_msr((data << spec.MSR_DATA_SHIFT | code & spec.MSR_CODE_MASK) % _WORD)
    return True


def point_msr(host: Attacker, m: Moment) -> bool:
    """The MSR's value leads to another page than the guest's GHCB."""
    m.answer_msr(host.random.choice((*host.private, *host.shared)))
    return True
