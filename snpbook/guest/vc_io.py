"""Ports and MMIO in the #VC handler: the guest decodes its own instruction, and tells no more than that needs.

Data pass by RAX, or by the shared buffer of the GHCB: as many elements of a string at a time as fit there. Memory that
is encrypted is no MMIO, whatever the hypervisor's tables say: the guest ends before it hands a secret out. Sources:
Linux arch/x86/coco/sev/shared.c (vc_handle_ioio), arch/x86/coco/sev/core.c (vc_handle_mmio).
"""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.guest import page_tables
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import IOIO, SHARED_BUFFER_SIZE, Nae
from snpbook.spec.opcodes import Opcode
from snpbook.spec.termination import GeneralReason

Registers = Mapping[str, int]
Result = dict[str, int]

_SIZES = (1, 2, 4, 8)
_DS = 3


def _forms(name: str) -> dict[bytes, int]:
    """The sizes of an instruction's operands, by its bytes."""
    return {Opcode.of_size(name, size): size for size in _SIZES if Opcode.of_size(name, size)}


IN, OUT, INS, OUTS = (_forms(name) for name in ("IN", "OUT", "INS", "OUTS"))
LOADS, STORES = _forms("LOAD"), _forms("STORE")
PORT_INSTRUCTIONS = frozenset([*IN, *OUT, *INS, *OUTS])
MMIO_INSTRUCTIONS = frozenset([*LOADS, *STORES])


async def port(ghcb: Ghcb, instruction: bytes, registers: Registers) -> Result:
    """IN, OUT and their strings: the registers afterwards."""
    is_in = instruction in IN or instruction in INS
    size = (IN | OUT | INS | OUTS)[instruction]
    fields = {"port": registers["rdx"] & IOIO.fields["port"].limit, "is_in": int(is_in), f"size_{8 * size}": 1}
    if instruction in INS or instruction in OUTS:
        info = IOIO.pack(**fields, is_string=1, rep=1, address_64=1, segment=0 if is_in else _DS)
        return await _string(ghcb, int.from_bytes(info, "little"), size, registers, is_in=is_in)
    info, mask = IOIO.pack(**fields, address_64=1), (1 << 8 * size) - 1
    word = int.from_bytes(info, "little")
    if not is_in:
        await ghcb.call(Nae.IOIO, word, rax=registers["rax"] & mask)
        return {}
    answer = await ghcb.call(Nae.IOIO, word, needs=("rax",))
    kept = registers["rax"] & ~mask if size < IN[Opcode.IN_32.value] else 0
    return {"rax": kept | answer.rax & mask}


async def _string(ghcb: Ghcb, info: int, size: int, registers: Registers, *, is_in: bool) -> Result:
    name = "rdi" if is_in else "rsi"
    address, left = registers[name], registers["rcx"]
    while left:
        count = min(left, SHARED_BUFFER_SIZE // size)
        data = b"" if is_in else await ghcb.cpu.read(address, count * size)
        answer = await ghcb.call(
            Nae.IOIO, info, count,
            sw_scratch=ghcb.shared_buffer, shared_buffer=data.ljust(SHARED_BUFFER_SIZE, b"\0"),
        )  # fmt: skip
        if is_in:
            await ghcb.cpu.write(address, answer.shared_buffer[: count * size])
        address, left = address + count * size, left - count
    return {name: address, "rcx": 0}


async def mmio(ghcb: Ghcb, c_bit: int, instruction: bytes, address: int, registers: Registers) -> Result:
    """A load of RAX from, or a store of it to, a device's registers at a virtual address."""
    cpu: GuestCpu = ghcb.cpu
    entry, gpa = await page_tables.leaf(cpu, address)
    if not entry or entry >> c_bit & 1:
        what = "encrypted memory" if entry else "nothing"
        await terminate(cpu, GeneralReason.GENERAL, f"MMIO at {address:#x}, where the guest has {what}")
    if instruction in LOADS:
        size = LOADS[instruction]
        answer = await ghcb.call(Nae.MMIO_READ, gpa, size, sw_scratch=ghcb.shared_buffer)
        return {"rax": int.from_bytes(answer.shared_buffer[:size], "little")}
    size = STORES[instruction]
    data = registers["rax"].to_bytes(_SIZES[-1], "little")[:size].ljust(SHARED_BUFFER_SIZE, b"\0")
    await ghcb.call(Nae.MMIO_WRITE, gpa, size, sw_scratch=ghcb.shared_buffer, shared_buffer=data)
    return {}
