"""Lies about messages between guest and firmware, which the host carries and cannot read.

Sources: SNP ABI, guest messages; GHCB specification, guest requests.
"""

from __future__ import annotations

from snpbook.attacks.attacker import REGISTERS, Attacker
from snpbook.attacks.ghcb import Moment, Stage
from snpbook.spec.ghcb import VmmError
from snpbook.spec.messages import MESSAGE_HEADER
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.status import Status

_CODES = 1 << 8


# Messages to the firmware.


def _places(m: Moment) -> tuple[int, int]:
    assert m.page is not None
    return m.page.sw_exit_info_1, m.page.sw_exit_info_2


def change_message(host: Attacker, m: Moment) -> bool:
    """A bit of the request or of the answer: in the tag, the header or the payload."""
    gpa = _places(m)[m.stage is Stage.ENTRY]
    page = m.read(gpa, PAGE_SIZE)
    size = MESSAGE_HEADER.unpack(page).msg_size
    m.write(gpa, host.flipped(page, 0, min(MESSAGE_HEADER.size + size, PAGE_SIZE)))
    return True


def replay(host: Attacker, m: Moment) -> bool:
    """An old answer; half the time under the new number."""
    if not host.responses:
        return False
    old, (request, response) = host.random.choice(host.responses), _places(m)
    if host.random.random() < 0.5:
        number = MESSAGE_HEADER.unpack(m.read(request, PAGE_SIZE)).msg_seqno + 1
        old = bytes(MESSAGE_HEADER.unpack(old).replace(msg_seqno=number)) + old[MESSAGE_HEADER.size :]
    m.write(response, old)
    return True


def reflect(host: Attacker, m: Moment) -> bool:
    """The guest's own request as the answer; half the time with number and type raised."""
    request, response = _places(m)
    page = m.read(request, PAGE_SIZE)
    header = MESSAGE_HEADER.unpack(page)
    if host.random.random() < 0.5:
        header = header.replace(msg_seqno=header.msg_seqno + 1, msg_type=header.msg_type + 1)
    m.write(response, bytes(header) + page[MESSAGE_HEADER.size :])
    return True


def other_key(host: Attacker, m: Moment) -> bool:
    """Request or answer under the name of another VMPL's key."""
    gpa = _places(m)[m.stage is Stage.ENTRY]
    page = m.read(gpa, PAGE_SIZE)
    m.write(
        gpa,
        bytes(MESSAGE_HEADER.unpack(page).replace(msg_vmpck=host.random.randint(1, 3))) + page[MESSAGE_HEADER.size :],
    )
    return True


def change_lengths(host: Attacker, m: Moment) -> bool:
    """A field of the header that says how the message is to be read."""
    gpa = _places(m)[m.stage is Stage.ENTRY]
    page = m.read(gpa, PAGE_SIZE)
    name = host.random.choice(("msg_size", "msg_size", "hdr_size", "hdr_version", "algo", "msg_version", "msg_type"))
    value = host.number() % (MESSAGE_HEADER.fields[name].limit + 1)
    m.write(gpa, bytes(MESSAGE_HEADER.unpack(page).replace(**{name: value})) + page[MESSAGE_HEADER.size :])
    return True


def drop_request(host: Attacker, m: Moment) -> bool:
    """The firmware never hears of it, and the guest is told of success."""
    m.keep()
    m.put(sw_exit_info_1=0, sw_exit_info_2=0, rbx=host.number())
    m.mark("sw_exit_info_1", "sw_exit_info_2", *REGISTERS)
    return True


def refuse_request(host: Attacker, m: Moment) -> bool:
    """By KVM in the place of the firmware, which has answered or not."""
    status, vmm = host.random.choice([*Status, 0]), host.random.choice([*VmmError, 0, host.random.randrange(_CODES)])
    if m.stage is Stage.EXIT:
        m.keep()
        m.mark("sw_exit_info_1", "sw_exit_info_2", *REGISTERS)
    m.put(sw_exit_info_1=0, sw_exit_info_2=vmm << 32 | status, rbx=host.number())
    return True


def change_certificates(host: Attacker, m: Moment) -> bool:
    """What is in the certificates' buffer, or how many pages it would take."""
    assert m.page is not None
    if m.stage is Stage.ENTRY and m.page.rbx:
        m.write(m.page.rax, host.random.randbytes(min(m.page.rbx, 4) * PAGE_SIZE))
        return True
    if m.stage is Stage.EXIT:
        m.keep()
        m.mark("sw_exit_info_1", "sw_exit_info_2", *REGISTERS)
        m.put(sw_exit_info_1=0, sw_exit_info_2=VmmError.INVALID_LEN << 32, rbx=host.number())
        return True
    return False
