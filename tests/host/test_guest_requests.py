"""Guest requests: real messages through KVM, what happens when one fails, and certificates beside the report."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.host.refusal import KernelError
from snpbook.spec.eras import era as find_era
from snpbook.spec.msr import Msr
from snpbook.spec.status import Status
from tests.host.askers import CODE, INFO1, INFO2, PAGE, RAX, RBX, REQ_CERTS, Asker, Serve, fails, ghcb, infos, snp, u64

PLAIN, EXTENDED = 0x80000011, 0x80000012
REPORT, TSC = 5, 17
CERTS = 0x100000
"""Where the guest wants certificates; shared on the host's side, whatever the guest thinks."""
INVALID_PARAM, INVALID_ADDRESS = 0x16, 0x09
BOTH = pytest.mark.parametrize("code", [PLAIN, EXTENDED])
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])


async def seal(cpu: GuestCpu, asker: Asker, kind: int = REPORT) -> None:
    """A good message of the guest in its request page."""
    secrets: bytes = await cpu.read(asker.place.secrets, PAGE)
    number = struct.unpack_from("<I", secrets, 0xA0)[0] + 1
    await cpu.write(asker.place.secrets + 0xA0, struct.pack("<I", number + 1))
    body = bytes(96) if kind == REPORT else bytes(128)
    head = struct.pack("<BBHBBHIB35x", 1, 1, 0x60, kind, 1, len(body), 0, 0)
    sealed = AESGCM(secrets[0x20:0x40]).encrypt(struct.pack("<Q4x", number), body, head)
    page = sealed[-16:] + bytes(16) + struct.pack("<Q8x", number) + head + sealed[:-16]
    await cpu.write(asker.place.request, page.ljust(PAGE, b"\0"))


def request(
    asker: Asker, code: int = PLAIN, *, good: bool = True, kind: int = REPORT, serve: Serve | None = None, **names: int
) -> tuple[bytes, bytes]:
    """A guest request: the GHCB and the response page that come back."""
    offsets = {"rax": RAX, "rbx": RBX}
    fields = {CODE: code, INFO1: asker.place.request, INFO2: asker.place.response}
    fields |= {offsets[name]: value for name, value in names.items()}

    async def program(cpu: GuestCpu) -> tuple[bytes, bytes]:
        if good:
            await seal(cpu, asker, kind)
        else:
            await cpu.write(asker.place.request, bytes(0x34) + bytes([kind]) + bytes(PAGE - 0x35))
        await cpu.write(asker.ghcb, ghcb(fields))
        await cpu.wrmsr(Msr.GHCB, asker.ghcb)
        await cpu.vmgexit()
        return await cpu.read(asker.ghcb, PAGE), await cpu.read(asker.place.response, PAGE)

    answer: tuple[bytes, bytes] = asker.drive(program, serve)
    return answer


# The message.


@ERAS
@BOTH
def test_a_good_message_is_answered(era: str, code: int) -> None:
    asker = snp(era)
    page, response = request(asker, code, rax=CERTS, rbx=0)
    assert infos(page) == (0, 0)
    assert response[0x34] == REPORT + 1


@ERAS
@BOTH
def test_a_refused_message_is_told_with_the_firmwares_status(era: str, code: int) -> None:
    asker = snp(era)
    page, _ = request(asker, code, good=False, rax=CERTS, rbx=0)
    assert infos(page) == (0, INVALID_PARAM)


def test_after_a_refusal_the_guest_gets_what_was_left() -> None:
    """KVM copies its own response page in either case, and the last answer is still there."""
    asker = snp()
    _, first = request(asker)
    page, second = request(asker, good=False)
    assert infos(page)[1] == INVALID_PARAM
    assert second == first


@ERAS
def test_pages_are_the_hypervisors_again(era: str) -> None:
    asker = snp(era)
    free, listed = asker.kernel.memory.free, asker.kernel.ccp.leaks.count
    request(asker)
    request(asker, good=False)
    assert (asker.kernel.memory.free, asker.kernel.ccp.leaks.count) == (free, listed)
    asker.vmm.write(asker.place.response, bytes(PAGE))


@ERAS
@BOTH
def test_addresses_outside_of_memory(era: str, code: int) -> None:
    """Later kernels fail KVM_RUN; the v7 series has a status of the firmware for it."""
    asker, away = snp(era), 1 << 40
    for info1, info2 in ((away, asker.place.response), (asker.place.request, away)):
        fields = {CODE: code, INFO1: info1, INFO2: info2, RAX: CERTS, RBX: 0}
        asker.restored()
        if era == "rfc-v7":
            assert infos(asker.page(ghcb(fields))) == (0, INVALID_ADDRESS)
        else:
            with fails(errno.EIO):
                asker.page(ghcb(fields))


def test_addresses_in_the_v7_series() -> None:
    asker = snp("rfc-v7")
    place = asker.place

    def told(code: int, info1: int, info2: int, rax: int = CERTS, rbx: int = 0) -> tuple[int, int]:
        return infos(asker.page(ghcb({CODE: code, INFO1: info1, INFO2: info2, RAX: rax, RBX: rbx})))

    assert told(PLAIN, place.request + 1, place.response) == (0, INVALID_PARAM)
    assert told(PLAIN, place.request, place.response + 8) == (0, INVALID_PARAM)
    assert told(EXTENDED, place.request, place.response, rax=CERTS + 8) == (0, INVALID_ADDRESS)
    assert told(EXTENDED, place.request, place.response, rbx=6) == (0, INVALID_PARAM)
    assert told(EXTENDED, place.request + 1, place.response, rax=CERTS + 8) == (0, INVALID_ADDRESS), "first of two"


def test_a_response_page_that_the_v7_series_cannot_lend() -> None:
    asker = Asker("rfc-v7")
    gfn = asker.place.response >> 12
    slot = asker.vm.slots.of(gfn)
    frame = int(slot.shared_frames(asker.vm.process.space, range(gfn, gfn + 1))[0])
    page = range(frame, frame + 1)
    asker.kernel.cpu.rmpupdate(page, range(1), NewState(assigned=True, asid=77, immutable=True))
    fields = {CODE: PLAIN, INFO1: asker.place.request, INFO2: asker.place.response}
    assert infos(asker.page(ghcb(fields))) == (0, INVALID_ADDRESS)


@pytest.mark.parametrize(("number", "era"), [(errno.ETIMEDOUT, "mainline"), (errno.EBUSY, "mainline"), (0, "rfc-v7")])
def test_a_dead_secure_processor(monkeypatch: pytest.MonkeyPatch, number: int, era: str) -> None:
    """KVM_RUN fails, and the guest learns nothing; the v7 series tells it of success."""
    asker = Asker(era)

    def dead(*_: Any, **__: Any) -> None:
        raise KernelError(number or errno.ETIMEDOUT, "the secure processor answers", "a response", "none")

    monkeypatch.setattr(asker.kernel.ccp, "command", dead)
    if number:
        with fails(number):
            request(asker)
    else:
        assert infos(request(asker)[0]) == (0, 0)


# Certificates.


def test_an_empty_table_comes_with_a_report() -> None:
    asker = snp()
    for pages, expected in ((1, bytes(24) + b"\xff" * 8), (0, b"\xff" * 32)):
        asker.vmm.write(CERTS, b"\xff" * 32)
        page, response = request(asker, EXTENDED, rax=CERTS, rbx=pages)
        assert infos(page) == (0, 0)
        assert response[0x34] == REPORT + 1
        assert asker.vmm.read(CERTS, 32) == expected
        assert u64(page, RBX) == pages


def test_the_table_comes_before_the_request() -> None:
    asker = snp()
    asker.vmm.write(CERTS, b"\xff" * 32)
    assert infos(request(asker, EXTENDED, good=False, rax=CERTS, rbx=1)[0]) == (0, INVALID_PARAM)
    assert asker.vmm.read(CERTS, 32) == bytes(24) + b"\xff" * 8


@pytest.mark.parametrize("names", [{}, {"rax": CERTS}, {"rbx": 1}, {"rax": CERTS + 1, "rbx": 1}])
def test_where_certificates_should_go(names: dict[str, int]) -> None:
    asker = snp()
    assert infos(request(asker, EXTENDED, good=False, **names)[0]) == (2, 5)
    assert infos(request(asker, EXTENDED, kind=TSC, good=False, **names)[0]) == (0, INVALID_PARAM), "no report"


def test_certificates_outside_of_memory() -> None:
    asker = snp()
    with fails(errno.EIO):
        request(asker, EXTENDED, rax=1 << 40, rbx=1)


@pytest.mark.parametrize("own", [False, True])
def test_certificates_of_the_v7_series(own: bool) -> None:
    """The VM's own blob, else the host's; one page too few, and the guest is told how many it takes."""
    asker = snp("rfc-v7")
    blob = bytes(range(256)) * 32
    asker.kernel.ccp.certificates = b"\xee" * PAGE if own else blob
    asker.vm.sev.certificates = blob if own else b""
    try:
        asker.vmm.write(CERTS, bytes(2 * PAGE))
        page, _ = request(asker, EXTENDED, good=False, rax=CERTS, rbx=1)
        assert (infos(page), u64(page, RBX)) == ((0, 1 << 32), 2)
        page, response = request(asker, EXTENDED, rax=CERTS, rbx=4)
        assert (infos(page), u64(page, RBX)) == ((0, 0), 4)
        assert response[0x34] == REPORT + 1
        assert asker.vmm.read(CERTS, 2 * PAGE) == blob
        assert infos(request(asker, EXTENDED, rax=1 << 40, rbx=2)[0]) == (0, INVALID_ADDRESS), "no such memory"
    finally:
        asker.kernel.ccp.certificates = asker.vm.sev.certificates = b""


# Later options.


@pytest.fixture
def certificate_exit() -> Asker:
    asker = Asker()
    asker.kernel.era = find_era("mainline", "certificate-exit")
    asker.vm.sev.asks_certificates = True
    return asker


@pytest.mark.parametrize(
    ("ret", "pages", "info2"),
    [(0, 2, 0), (errno.ENOSPC, 7, 1 << 32), (errno.EAGAIN, 2, 2 << 32), (errno.EIO, 2, 3 << 32)],
)
def test_the_vmm_fetches_certificates(certificate_exit: Asker, ret: int, pages: int, info2: int) -> None:
    asker = certificate_exit

    def serve(reason: int) -> None:
        assert reason == REQ_CERTS
        assert asker.exit("<QQQ") == (CERTS, 2, 0)
        asker.put(struct.pack("<QQ", pages, ret), 8)

    page, response = request(asker, EXTENDED, serve=serve, rax=CERTS, rbx=2)
    assert infos(page) == (0, info2)
    assert u64(page, RBX) == pages
    assert (response[0x34] == REPORT + 1) is (ret == 0)
    asker.restored()
    with fails(errno.EINVAL):
        request(asker, EXTENDED, serve=lambda reason: asker.put(struct.pack("<Q", 77), 16), rax=CERTS, rbx=2)


def test_a_vm_that_has_not_asked_for_the_exit(certificate_exit: Asker) -> None:
    certificate_exit.vm.sev.asks_certificates = False
    assert infos(request(certificate_exit, EXTENDED, rax=CERTS, rbx=2)[0]) == (0, 0)


def test_throttling() -> None:
    """Off in every era; where it is on, a third request at once is told to wait."""
    asker = Asker()
    assert [infos(request(asker)[0])[1] for _ in range(4)] == [0] * 4
    asker.kernel.era = find_era("mainline", "guest-request-throttling")
    assert [infos(request(asker, good=False)[0])[1] for _ in range(4)] == [0x16, 0x16, 2 << 32, 0x16]


def test_statuses_are_those_of_the_specification() -> None:
    assert (Status.INVALID_PARAM, Status.INVALID_ADDRESS) == (INVALID_PARAM, INVALID_ADDRESS)
