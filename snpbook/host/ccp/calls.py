"""The sub-commands of /dev/sev: one function each, with its checks in the kernel's order.

Blobs pass through kernel memory, and as many bytes go back to the caller as the firmware names, whatever it was that
he asked for, also when it refused (mended in later kernels). A legacy command on a platform that is not initialised
initialises it for its own time, and then shuts everything down, SNP too. Sources: Linux 6.12
drivers/crypto/ccp/sev-dev.c; RFC v7 patch 31 (SNP_SET_EXT_CONFIG, SNP_GET_EXT_CONFIG).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from snpbook.host.address_space import AddressSpace
from snpbook.host.ccp.mailbox import CommandRefused, answered
from snpbook.host.ccp.platform import Ccp
from snpbook.host.refusal import KernelError, check
from snpbook.spec import uapi_psp as uapi
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.snp_buffers import SNP_COMMIT
from snpbook.spec.states import LegacyPlatformState
from snpbook.spec.uapi_psp import BLOB_LIMIT, ENOTSUPP, NO_FW_CALL, PspCommand
from snpbook.spec.uapi_sev import CERTS_LIMIT_V7

GET_ID_API = (0, 16)
"""The oldest API that has GET_ID."""
_State = LegacyPlatformState


class IssuedCommand:
    """One call: the caller's memory, the address that he gave, his rights, and what he will find in `error`."""

    def __init__(self, ccp: Ccp, space: AddressSpace, data: int, writable: bool, error: int) -> None:
        self.ccp, self.space, self.data, self.writable, self.error = ccp, space, data, writable, error

    def require_writable(self) -> None:
        check(self.writable, errno.EPERM, "the descriptor may be written", "O_RDWR or O_WRONLY", "O_RDONLY")

    def require_data(self) -> None:
        check(self.data != 0, errno.EINVAL, "`data` points to a structure", "an address", 0)

    def read(self, layout: Layout) -> Record:
        """copy_from_user of the structure behind `data` (EFAULT)."""
        return layout.unpack(self.space.copy_in(self.data, layout.size))

    def write(self, data: bytes) -> None:
        """copy_to_user (EFAULT)."""
        self.space.copy_out(self.data, data)

    def user_blob(self, address: int, size: int, limit: int = BLOB_LIMIT) -> bytes:
        """A blob of the caller's: EINVAL for none or one that is too large."""
        good = address and 0 < size <= limit
        check(bool(good), errno.EINVAL, "a blob", f"up to {limit:#x} bytes at an address", f"{size:#x} at {address:#x}")
        return self.space.copy_in(address, size)

    @contextmanager
    def told(self, otherwise: int | None = None) -> Iterator[None]:
        """What the firmware answers to a command is told in `error`: `otherwise` where it was not asked."""
        try:
            yield
        except KernelError as error:
            code = answered(error)
            if code is not None or otherwise is not None:
                self.error = (otherwise or 0) if code is None else code
            raise
        self.error = 0

    def submit(self, command: Command, data: bytes = b"") -> None:
        """Issue a command whose answer is its status."""
        with self.told():
            self.ccp.submit(command, data)

    def issue(self, command: Command, **fields: Any) -> Record:
        """Issue a command: its buffer as the firmware left it."""
        with self.told():
            return self.ccp.command(command, **fields)

    def attempt(self, command: Command, **fields: Any) -> tuple[Record, KernelError | None]:
        """Issue a command whose output goes to the caller even if it fails: its buffer, and the failure."""
        try:
            return self.issue(command, **fields), None
        except KernelError as error:
            layout = BUFFERS[command]
            assert layout is not None, command
            left = error.buffer if isinstance(error, CommandRefused) else layout.pack(**fields)
            return layout.unpack(left), error

    @contextmanager
    def initialised(self, needed: bool) -> Iterator[None]:
        """Initialise the platform for one command, where that is `needed`, and shut all of it down again."""
        if not needed:
            yield
            return
        with self.told(otherwise=NO_FW_CALL):
            self.ccp.platform_init()
        try:
            yield
        finally:
            with suppress(KernelError):
                self.ccp.shutdown()

    @contextmanager
    def buffer(self, size: int, data: bytes = b"") -> Iterator[int]:
        """Zeroed kernel memory with `data` in it, for as long as the block runs: its address, 0 for size 0 (ENOMEM)."""
        if not size:
            yield 0
            return
        pages = self.ccp.memory.allocate(-(-size // PAGE_SIZE))
        try:
            self.ccp.cpu.zero(pages.start << PAGE_SHIFT, len(pages) << PAGE_SHIFT)
            self.ccp.cpu.write(pages.start << PAGE_SHIFT, data)
            yield pages.start << PAGE_SHIFT
        finally:
            self.ccp.memory.release(pages)

    def hand_out(self, address: int, buffer: int, size: int) -> None:
        """Kernel memory to the caller (EFAULT); none where there was no buffer."""
        if buffer:
            self.space.copy_out(address, self.ccp.cpu.read(buffer, size))


def _factory_reset(call: IssuedCommand) -> None:
    call.require_writable()
    state = call.issue(Command.PLATFORM_STATUS).state
    check(state != _State.WORKING, errno.EBUSY, "no guest lives", "INIT or UNINIT", "WORKING")
    if state == _State.INIT:
        with call.told():
            call.ccp.shutdown_sev()
    call.submit(Command.PLATFORM_RESET)


def _platform_status(call: IssuedCommand) -> None:
    call.write(bytes(call.issue(Command.PLATFORM_STATUS)))


def _generate(command: Command) -> Callable[[IssuedCommand], None]:
    """PEK_GEN and PDH_GEN."""

    def generate(call: IssuedCommand) -> None:
        call.require_writable()
        with call.initialised(call.ccp.state is _State.UNINIT):
            call.submit(command)

    return generate


def _pek_csr(call: IssuedCommand) -> None:
    call.require_writable()
    asked = call.read(uapi.PEK_CSR)
    size = asked.length if asked.address else 0
    check(size <= BLOB_LIMIT, errno.EFAULT, "length of the request", BLOB_LIMIT, size)
    with call.buffer(size) as blob, call.initialised(call.ccp.state is _State.UNINIT):
        answer, failure = call.attempt(Command.PEK_CSR, paddr=blob, len=size)
        call.write(bytes(asked.replace(length=answer.len)))
        call.hand_out(asked.address, blob, answer.len)
    if failure is not None:
        raise failure


def _pdh_cert_export(call: IssuedCommand) -> None:
    asked = call.read(uapi.PDH_CERT_EXPORT)
    sizes = asked.pdh_cert_len, asked.cert_chain_len
    if not (asked.pdh_cert_address and asked.cert_chain_address and all(sizes)):
        sizes = 0, 0
    check(max(sizes) <= BLOB_LIMIT, errno.EFAULT, "lengths of the certificates", BLOB_LIMIT, sizes)
    needed = call.ccp.state is not _State.INIT
    with call.buffer(sizes[0]) as pdh, call.buffer(sizes[1]) as chain:
        if needed:
            call.require_writable()
        with call.initialised(needed):
            answer, failure = call.attempt(
                Command.PDH_CERT_EXPORT,
                pdh_cert_paddr=pdh,
                pdh_cert_len=sizes[0],
                cert_chain_paddr=chain,
                cert_chain_len=sizes[1],
            )
            lengths = {"pdh_cert_len": answer.pdh_cert_len, "cert_chain_len": answer.cert_chain_len}
            call.write(bytes(asked.replace(**lengths)))
            call.hand_out(asked.pdh_cert_address, pdh, answer.pdh_cert_len)
            call.hand_out(asked.cert_chain_address, chain, answer.cert_chain_len)
    if failure is not None:
        raise failure


def _pek_cert_import(call: IssuedCommand) -> None:
    call.require_writable()
    asked = call.read(uapi.PEK_CERT_IMPORT)
    certs = [
        call.user_blob(asked.pek_cert_address, asked.pek_cert_len),
        call.user_blob(asked.oca_cert_address, asked.oca_cert_len),
    ]
    with call.buffer(len(certs[0]), certs[0]) as pek, call.buffer(len(certs[1]), certs[1]) as oca:
        fields = {"pek_cert_paddr": pek, "pek_cert_len": len(certs[0])}
        fields |= {"oca_cert_paddr": oca, "oca_cert_len": len(certs[1])}
        with call.initialised(call.ccp.state is not _State.INIT):
            call.issue(Command.PEK_CERT_IMPORT, **fields)


def _require_get_id(call: IssuedCommand) -> None:
    known = call.ccp.at_least(GET_ID_API)
    check(known, ENOTSUPP, "the firmware's API", GET_ID_API, call.ccp.version)


def _get_id(call: IssuedCommand) -> None:
    _require_get_id(call)
    size = uapi.GET_ID.size
    with call.buffer(size) as blob:
        answer = call.issue(Command.GET_ID, paddr=blob, len=size)
        call.hand_out(call.data, blob, answer.len)


def _get_id2(call: IssuedCommand) -> None:
    _require_get_id(call)
    asked = call.read(uapi.GET_ID2)
    size = asked.length if asked.address else 0
    with call.buffer(size) as blob:
        answer, failure = call.attempt(Command.GET_ID, paddr=blob, len=size)
        call.write(bytes(asked.replace(length=answer.len)))
        call.hand_out(asked.address, blob, answer.len)
    if failure is not None:
        raise failure


def _snp_platform_status(call: IssuedCommand) -> None:
    call.require_data()
    with call.told():
        status = call.ccp.platform_status()
    call.write(bytes(status))


def _snp_commit(call: IssuedCommand) -> None:
    call.issue(Command.SNP_COMMIT, length=SNP_COMMIT.size)


def _require_snp(call: IssuedCommand, number: int) -> None:
    check(call.ccp.snp_initialised, number, "SNP is initialised", "SNP_INIT_EX", "not yet")


def _snp_set_config(call: IssuedCommand) -> None:
    """The structure goes to the firmware as it is, reserved bytes and all."""
    call.require_data()
    call.require_writable()
    _require_snp(call, errno.ENODEV)
    call.submit(Command.SNP_CONFIG, call.space.copy_in(call.data, uapi.SNP_CONFIG.size))


def _snp_vlek_load(call: IssuedCommand) -> None:
    call.require_data()
    call.require_writable()
    _require_snp(call, errno.ENODEV)
    asked = call.read(uapi.SNP_VLEK_LOAD)
    good = asked.len == uapi.SNP_VLEK_LOAD.size and asked.vlek_wrapped_version == 0
    check(good, errno.EINVAL, "length and version of the structure", (uapi.SNP_VLEK_LOAD.size, 0), asked)
    blob = call.user_blob(asked.vlek_wrapped_address, uapi.SNP_WRAPPED_VLEK_HASHSTICK.size)
    with call.buffer(len(blob), blob) as address:
        call.issue(Command.SNP_VLEK_LOAD, length=asked.len, vlek_wrapped_paddr=address)


def _snp_set_ext_config(call: IssuedCommand) -> None:
    """SNP_CONFIG if there is a configuration, and the host's certificates: those that are passed, or none."""
    _require_snp(call, errno.EINVAL)
    call.require_data()
    call.require_writable()
    asked = call.read(uapi.SNP_EXT_CONFIG_V7)
    certificates = b""
    if asked.certs_address:
        whole = asked.certs_len > 0 and asked.certs_len % PAGE_SIZE == 0
        check(whole, errno.EINVAL, "certs_len is whole pages", PAGE_SIZE, asked.certs_len)
        certificates = call.user_blob(asked.certs_address, asked.certs_len, CERTS_LIMIT_V7)
    if asked.config_address:
        config = call.space.copy_in(asked.config_address, uapi.SNP_CONFIG.size)
        call.submit(Command.SNP_CONFIG, config)
        call.ccp.config = config
    call.ccp.certificates = certificates


def _snp_get_ext_config(call: IssuedCommand) -> None:
    """What was last set: ENOSR, with the length that is needed, for too little room for the certificates."""
    _require_snp(call, errno.EINVAL)
    call.require_data()
    asked, held = call.read(uapi.SNP_EXT_CONFIG_V7), call.ccp.certificates
    if asked.config_address:
        call.space.copy_out(asked.config_address, call.ccp.config or bytes(uapi.SNP_CONFIG.size))
    short = bool(asked.certs_address and held) and asked.certs_len < len(held)
    if asked.certs_address and not short:
        call.space.copy_out(asked.certs_address, held)
    call.write(bytes(asked.replace(certs_len=len(held)) if short else asked))
    check(not short, errno.ENOSR, "the certificates fit", len(held), asked.certs_len)


HANDLERS: Mapping[PspCommand, Callable[[IssuedCommand], None]] = {
    PspCommand.FACTORY_RESET: _factory_reset,
    PspCommand.PLATFORM_STATUS: _platform_status,
    PspCommand.PEK_GEN: _generate(Command.PEK_GEN),
    PspCommand.PEK_CSR: _pek_csr,
    PspCommand.PDH_GEN: _generate(Command.PDH_GEN),
    PspCommand.PDH_CERT_EXPORT: _pdh_cert_export,
    PspCommand.PEK_CERT_IMPORT: _pek_cert_import,
    PspCommand.GET_ID: _get_id,
    PspCommand.GET_ID2: _get_id2,
    PspCommand.SNP_PLATFORM_STATUS: _snp_platform_status,
    PspCommand.SNP_COMMIT: _snp_commit,
    PspCommand.SNP_SET_CONFIG: _snp_set_config,
    PspCommand.SNP_VLEK_LOAD: _snp_vlek_load,
    PspCommand.SNP_SET_EXT_CONFIG: _snp_set_ext_config,
    PspCommand.SNP_GET_EXT_CONFIG: _snp_get_ext_config,
}
