"""The vTPM protocol: commands for the TPM, through a page of the guest.

Sources: Secure VM Service Module for SEV-SNP Guests (58019), chapter 8; COCONUT-SVSM kernel/src/protocols/vtpm.rs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from snpbook.guest.svsm.call import Answer, Call, Processor
from snpbook.guest.svsm.errors import check
from snpbook.guest.svsm.tpm import Tpm
from snpbook.spec.svsm import VTPM_REQUEST, VTPM_RESPONSE, VTPM_SEND_COMMAND, SvsmCode, Vtpm


async def _query(processor: Processor, call: Call) -> Answer:
    """RCX: a bit for each platform command, RDX: features, of which there are none."""
    return Answer(rcx=1 << VTPM_SEND_COMMAND, rdx=0)


async def _command(processor: Processor, call: Call) -> Answer:
    """RCX: the buffer, of one page, which takes the answer. INVALID_PARAMETER for what it asks but a TPM command."""
    check(call.rcx != 0, SvsmCode.INVALID_PARAMETER, "a buffer for the command")
    asked = VTPM_REQUEST.unpack(await processor.memory.read(call.rcx, VTPM_REQUEST.size))
    good = asked.command == VTPM_SEND_COMMAND and not asked.locality and asked.size <= len(asked.data)
    found = f"command {asked.command}, locality {asked.locality}, {asked.size} bytes"
    check(good, SvsmCode.INVALID_PARAMETER, f"a TPM command at locality 0 in one page: {found}")
    answer = await Tpm(processor.cpu, processor.places).execute(asked.data[: asked.size])
    head = len(answer).to_bytes(VTPM_RESPONSE.fields["size"].size, "little")
    await processor.memory.write(call.rcx, head + answer)
    return Answer()


CALLS: Mapping[int, Callable[[Processor, Call], Awaitable[Answer]]] = {Vtpm.QUERY: _query, Vtpm.COMMAND: _command}
