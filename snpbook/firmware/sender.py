"""Who sends a guest message: what its handler learns besides the payload. Source: SNP ABI, guest messages."""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.spec.layout import Record
from snpbook.spec.status import Status, require


@dataclass(frozen=True, slots=True)
class Sender:
    """A guest by its context and the context's address, the number of the key that it used, and MSG_VERSION."""

    gctx: int
    context: Record
    vmpck: int
    version: int

    def check_vmpl(self, vmpl: int) -> None:
        """Nobody asks in the name of a more privileged VMPL than the key's; there is no upper limit (1.55.25)."""
        require(vmpl >= self.vmpck, Status.INVALID_PARAM, "VMPL is not above the sender's", self.vmpck, vmpl)
