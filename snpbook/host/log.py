"""The kernel's log: what `dmesg` shows, and an event of the trace for each line."""

from __future__ import annotations

from snpbook.spec.bring_up import PSP_DEVICE
from snpbook.trace import Message, Trace


class KernelLog:
    """The lines since boot, as with `printk.time=0`: the model has no time of day."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.lines: list[str] = []

    def __repr__(self) -> str:
        return f"KernelLog({len(self.lines)} lines)"

    def __call__(self, text: str) -> None:
        """printk; an empty text is a step that the kernel does not mention."""
        if text:
            self.lines.append(text)
            if self._trace:
                self._trace.emit(Message(source="kernel", text=text))

    def psp(self, text: str) -> None:
        """dev_info and its kin of the secure processor's device; nothing for an empty text either."""
        if text:
            self(f"{PSP_DEVICE}: {text}")
