"""Guests that lack one check: a function of the guest runs from its own source, with one place of it changed.

For whoever wants to see what a check is good for, or to put another in its place. What a check guards, and by which
attacks its absence is found, stands beside it; where another check or the processor does the same work, it says so.
"""

from __future__ import annotations

import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from snpbook.guest import acceptance, boot, cpuid, direct_boot, msr_protocol, page_tables, processors, vc, vc_io
from snpbook.guest.conversions import BounceBuffers
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.messages import Channel


@contextmanager
def replaced(function: Callable[..., Any], old: str, new: str, **names: Any) -> Iterator[None]:
    """Have a function of the guest run with `new` in the place of `old` in its source; `names` are known there.

    A function that lacks one place can be made to lack another. `ValueError` where `old` is not in its source, or not
    once.
    """
    assert isinstance(function, FunctionType)
    source, mine = textwrap.dedent(inspect.getsource(function)), function.__globals__
    if source.count(old) != 1:
        raise ValueError(f"{function.__qualname__} has {source.count(old)} places {old!r}: name one")
    source, made = source.replace(old, new), dict[str, Any]()
    file = f"<{function.__qualname__} without {old!r}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), mine, made)
    before, held = function.__code__, {name: mine[name] for name in names if name in mine}
    function.__code__ = cast(FunctionType, made[function.__name__]).__code__
    mine.update(names)
    try:
        yield
    finally:
        function.__code__ = before
        for name in names:
            del mine[name]
        mine.update(held)


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the guest: the function that has it, the place, and what stands there without it.

    `found_by` are classes of `attacks.tampering` which then get the guest to a wrong value; with none of them the check
    is redundant, and `says` tells what does its work.
    """

    function: Callable[..., Any]
    old: str
    new: str
    says: str
    found_by: tuple[str, ...] = ()

    def removed(self, **names: Any) -> Any:
        """A context in which the guest lacks it."""
        return replaced(self.function, self.old, self.new, **names)


CHECKS: Mapping[str, Check] = {
    # The #VC handler.
    "instruction of an exit code": Check(
        vc.VcHandler.__call__, "if exception.instruction not in instructions:", "if False:",
        "WeSee: an exit code at another instruction writes registers, or hands them out", ("#VC injected",),
    ),
    "pages that are not validated": Check(
        vc.VcHandler.__call__, "    if known is None:",
        "    if exception.error == 0x404:\n"
        "        await cpu.pvalidate(exception.address & -4096, 1)\n"
        "        return False\n"
        "    if known is None:",
        "a guest that validates where it faults has two pages validated at one address", ("pages remapped",),
    ),
    "MMIO only where memory is shared": Check(
        vc_io.mmio, "if not entry or entry >> c_bit & 1:", "if not entry:",
        "an entry with a reserved bit makes private memory a device's, and stores go out", ("pages as devices",),
    ),
    "bits of CPUID that are the hypervisor's": Check(
        cpuid._mix, "own & ~bits | told & bits", "told",
        "of what the page has only the APIC ids are asked for", ("CPUID", "registers"),
    ),
    "DR7 is the guest's own": Check(
        vc._read_dr7, 'return {"rax": vc.dr7}',
        'return {"rax": (await vc.channel.call(Nae.READ_DR7)).rax}', "breakpoints are what the guest set",
        ("registers",),
    ),
    "nothing of MONITOR goes out": Check(
        vc._nothing, "    return {}",
        "    await vc.channel.call(Nae.MONITOR, **{name: registers[name] for name in ('rax', 'rcx', 'rdx')})\n"
        "    return {}",
        "the address that is watched is the guest's affair", ("registers",),
    ),
    "size of a port": Check(
        vc_io.port, "kept | answer.rax & mask", "answer.rax",
        "a byte from a port is a byte, and the rest of the register stays", ("registers",),
    ),
    "length of a string": Check(
        vc_io._string, "answer.shared_buffer[: count * size]", "answer.shared_buffer[: answer.sw_exit_info_2]",
        "the guest asked for so many bytes, and takes no more or fewer", ("counts", "exit information"),
    ),
    "size of a device's register": Check(
        vc_io.mmio, "answer.shared_buffer[:size]", "answer.shared_buffer[:8]",
        "as many bytes as the instruction loads: the processor takes no more of RAX either",
    ),
    # The GHCB.
    "exceptions that an answer may raise": Check(
        Ghcb._exception, "told.vector not in _INJECTABLE", "False",
        "an instruction raises #GP or #UD, and nothing that a handler takes for its own", ("exception answers",),
    ),
    "exceptions only for instructions": Check(
        Ghcb._answer, " and event in spec.INSTRUCTION_EVENTS", "",
        "a page state change or a message raises nothing: the program would go on without", ("exception answers",),
    ),
    "errors of an answer": Check(
        Ghcb._answer, "if error:", "if False:",
        "what was refused gave no result: a port would read as 0, which the host may say anyway; PVALIDATE and the "
        "tags of messages guard the rest",
    ),
    "fields that are marked": Check(
        Ghcb._answer, "if not all(marked):", "if False:",
        "an unmarked field holds what the guest wrote, which the host may answer anyway",
    ),
    "where the GHCB is": Check(
        Ghcb.call, "await self.cpu.write(self.gpa, ", "await self.cpu.write(await self.cpu.rdmsr(Msr.GHCB), ",
        "the MSR is the host's to write: the guest would write its requests over its own memory", ("MSR pointed",),
    ),
    # Pages.
    "carry of PVALIDATE": Check(
        acceptance._pvalidate, "(codes != RmpCode.SUCCESS) | unchanged", "codes != RmpCode.SUCCESS",
        "a page that was so before is another page: two are validated at one address", ("validated twice",),
    ),
    "code of PVALIDATE": Check(
        acceptance._pvalidate, "(codes != RmpCode.SUCCESS) | unchanged", "unchanged",
        "a page that was not validated is #VC 404 at its first use",
    ),
    "a list goes forward": Check(
        acceptance._ask_each, "before < state.cur_entry <= length == state.end_entry + 1", "state.cur_entry <= length",
        "what is not changed cannot be validated, and a list that never ends is a host that withholds service",
    ),
    "a list that failed": Check(
        acceptance._ask_each, "answer.sw_exit_info_2 or not honest", "not honest",
        "what is not changed cannot be validated",
    ),
    "CPUID that denies SEV": Check(
        vc._cpuid, "if vc.ghcb is None and cpuid.hides_sev(leaf, found.eax):", "if False:",
        "a guest that does without a C-bit finds that its memory is not encrypted; and has no GHCB, so that it ends at "
        "its first #VC",
    ),
    "the bit that encrypts": Check(
        page_tables.verify_c_bit, "if await _entry(cpu, last) != probe:", "if False:",
        "the firmware takes no page of CPUID with another C-bit; a guest with SEV-ES alone would leave all its memory "
        "in the clear",
    ),
    "save area taken back": Check(
        processors.stop, "await _mark(ghcb, page, vmsa=False)", "pass",
        "the host's word that a processor has ended is not enough: without the mark of a save area no processor enters",
        ("processors",),
    ),
    # The boot.
    "secrets page": Check(
        boot._check_secrets, "if not SECRETS_PAGE", "if None and not SECRETS_PAGE",
        "a launch without the page measures another digest, and zeros are no key: ENOTTY",
    ),
    "version of the protocol": Check(
        msr_protocol.negotiate, "if not max(info.min_version, spec.PROTOCOL_MINIMUM) <= version:", "if False:",
        "by an older protocol the guest asks for the same, and checks answers alike",
    ),
    "SNP among the features": Check(
        msr_protocol.features, "answer & MSR_CODE_MASK != MsrCode.FEATURES or not found & spec.FEATURE_SNP", "False",
        "a host without SNP answers no page state change: PVALIDATE guards",
    ),
    "which page was registered": Check(
        msr_protocol.register, "if answer != gpa | MsrCode.REGISTER_GPA:", "if False:",
        "a host that knows another page answers nothing: it withholds service",
    ),
    "hash of what is booted": Check(
        direct_boot.take, "if sha256(blob).digest() != hashes[name]:", "if False:",
        "kernel, initrd and command line are those that were measured", ("shared memory",),
    ),
    "the copy that is hashed": Check(
        direct_boot.take, "await cpu.read(target, size)", "await cpu.read(source, size)",
        "what is hashed in shared memory need not be what was copied", ("between check and use",),
    ),
    # Devices.
    "length of a mapping": Check(
        BounceBuffers.unmap, "await self.ghcb.cpu.read(address, size)",
        "await self.ghcb.cpu.read(address, max(claimed or 0, 0) % (1 << 12))",
        "a device's word of how much it wrote would reach beyond the buffer", ("shared memory",),
    ),
    # Messages.
    "tag of an answer": Check(
        Channel._open, "return AESGCM(key).decrypt(iv(number), sealed, page[AAD_FROM : MESSAGE_HEADER.size])",
        "return AESGCM(key).encrypt(iv(number), sealed[:-TAG_SIZE], b'')[:-TAG_SIZE]",
        "whoever changes a bit of an answer changes that bit of a report", ("message bits",),
    ),
    "number, type and version of an answer": Check(
        Channel._open, "if found != expected:", "if False:",
        "the guest's own number is the nonce, and the tag covers the header: an old answer does not decrypt",
    ),
    "size of an answer": Check(
        Channel._open, "if header.msg_size > limit or stop > PAGE_SIZE:", "if False:",
        "the tag covers the size, and nothing beyond the page is read",
    ),
    "number counted before the message": Check(
        Channel.exchange,
        "await self._count(number + 1)\n"
        "    await self.cpu.write(self.place.request, self._seal(key, number, kind, version, body))\n"
        "    try:\n"
        "        await self._send(certificate_pages)\n",
        "await self.cpu.write(self.place.request, self._seal(key, number, kind, version, body))\n"
        "    try:\n"
        "        await self._send(certificate_pages)\n"
        "        await self._count(number + 1)\n",
        "what is refused has been sent: the next message would be encrypted with the same nonce", ("certificates",),
    ),
    "key wiped after a failure": Check(
        Channel._wipe, "await self.cpu.write(", "_ = (",
        "the number was counted before the message went out: the next has another nonce, and the firmware refuses it",
    ),
}  # fmt: skip
