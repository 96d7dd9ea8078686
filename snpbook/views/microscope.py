"""The DIMM microscope on paper: a few blocks on their way to memory, who reads what of them, and how they came there.

A `Sample` is one moment of an experiment on one machine; everything shown is computed from it and from the machine's
memory by `hardware.microscope`. The live microscope in `widgets` shows the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np

from snpbook.hardware.dram import Bytes
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.microscope import Slide, look
from snpbook.hardware.tweaks import BLOCK_SIZE
from snpbook.spec.encryption import SCHEMES, KeyId
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.views.palette import LIGHT, Theme
from snpbook.views.repetition import repetition
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table

SHOWN = 2
"""How many blocks the tables show of a longer write."""
REMEMBERED = 6
"""How many steps the diary shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """A machine to look into: its engine holds keys for the ASIDs 1 to `asids`."""

    title: str
    engine: MemoryEncryption
    asids: int

    @property
    def linear(self) -> bool:
        """Whether the tweak is linear in the address and the same under all keys."""
        return bool(self.engine.constants)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One line of the diary: what was done, and the blocks that memory held at `spa` afterwards.

    `plain` is what the writer meant; None where ciphertext was put there.
    """

    deed: str
    spa: int
    cipher: Bytes
    plain: Bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Blocks in the memory of a machine: the last write, and all steps since the first, the last of which is now.

    `asid` is that of the writer, 0 for the host.
    """

    machine: Machine
    asid: int
    slide: Slide
    steps: tuple[Step, ...]

    @property
    def now(self) -> Step:
        """The last step."""
        return self.steps[-1]

    @property
    def page(self) -> int:
        """The page under the microscope."""
        return self.now.spa >> PAGE_SHIFT

    @property
    def readers(self) -> Mapping[str, int]:
        """Who reads, the writer first, each with the key id of the access. The thief of the module has no key."""
        hosts = {"host, C-bit clear": KeyId.UNENCRYPTED.value, "host, C-bit set": KeyId.HOST.value}
        other = self.asid + 1 if self.asid < self.machine.asids else self.asid - 1
        if self.asid:
            guests = {f"this guest (ASID {self.asid})": self.slide.key_id, f"another guest (ASID {other})": other}
            return guests | hosts
        first = sorted(hosts.items(), key=lambda host: host[1] != self.slide.key_id)
        return dict([*first, (f"a guest (ASID {other})", other)])


def microscope(sample: Sample) -> Static:
    """All that the microscope shows, one view below the other."""
    views = (way(sample), readers(sample), diary(sample), heat(sample))
    return Static("\n\n".join(view.text for view in views), "".join(view.html for view in views))


def way(sample: Sample) -> Static:
    """The way of the written blocks to the DIMM, step by step from above, one column for each block."""
    slide, rows = sample.slide, []
    after = "DIMM = output ⊕ tweak" if SCHEMES[sample.machine.engine.scheme].tweaks_output else "DIMM = AES output"
    steps = {
        "plaintext": slide.plain, "tweak of the address": slide.tweak, "AES input = plaintext ⊕ tweak": slide.whitened,
        "AES output": slide.enciphered, after: slide.cipher,
    }  # fmt: skip
    if slide.key_id == KeyId.UNENCRYPTED:
        steps = {"plaintext": slide.plain, "DIMM = plaintext": slide.cipher}
    for name, blocks in steps.items():
        rows.append((name, *(grouped(block) for block in blocks[:SHOWN])))
    head = ["step", *(f"{slide.spa + n * BLOCK_SIZE:#_x}" for n in range(min(SHOWN, len(slide.plain))))]
    number = max(n for n, step in enumerate(sample.steps, 1) if step.plain is not None)
    under = "unencrypted" if slide.key_id == KeyId.UNENCRYPTED else key_name(slide.key_id)
    more = len(slide.plain) - SHOWN
    rest = f"and {more} block{'s' * (more > 1)} more" if more > 0 else ""
    caption = f"On the way to the DIMM, as written in #{number}: {sample.machine.title}, {under}"
    return table(caption, head, rows, mono=head[1:], note=rest)


def readers(sample: Sample) -> Static:
    """What each party reads now: what that is, its first block, and all that is shown as text."""
    now, rows = sample.now, []
    seen = {name: look(sample.machine.engine, key, now.spa, now.cipher) for name, key in sample.readers.items()}
    for name, blocks in (*seen.items(), ("thief of the DIMM", now.cipher)):
        key = key_name(sample.readers.get(name, KeyId.UNENCRYPTED))
        rows.append((name, key, meaning(sample, blocks), grouped(blocks[0]), printable(blocks[:SHOWN])))
    head = ["reader", "key", "reads", f"first block at {now.spa:#_x}", "as text"]
    return table("Who reads what", head, rows, mono=head[3:])


def diary(sample: Sample) -> Static:
    """The last steps with the first block that each left in memory, and where that was seen before."""
    rows = []
    for number, step in list(enumerate(sample.steps, 1))[-REMEMBERED:]:
        same = [n for n, s in enumerate(sample.steps[: number - 1], 1) if np.array_equal(s.cipher, step.cipher)]
        seen = f"as in #{same[-1]}" if same else ""
        rows.append((f"#{number}", _exact(step.deed), f"{step.spa:#_x}", grouped(step.cipher[0]), seen))
    head = ["step", "what was done", "address", "first block on the DIMM", "seen before"]
    return table("Diary", head, rows, mono=["address", "first block on the DIMM"])


def heat(sample: Sample, theme: Theme = LIGHT) -> Static:
    """The page under the microscope as a repetition heat map, the blocks of the last step outlined."""
    content = sample.machine.engine.read_pages(KeyId.UNENCRYPTED, range(sample.page, sample.page + 1))
    name, first = f"Page {sample.page:#x}", sample.now.spa % PAGE_SIZE // BLOCK_SIZE
    marked = range(first, first + len(sample.now.cipher))
    return repetition(content, [name], f"{name} on the DIMM", marked=marked, theme=theme)


def meaning(sample: Sample, seen: Bytes) -> str:
    """What was read, in words: a plaintext of the diary, ciphertext, a plaintext plus tweaks, or nonsense."""
    written = [(n, step.plain) for n, step in enumerate(sample.steps, 1) if step.plain is not None]
    for number, plain in reversed(written):
        if np.array_equal(seen, plain):
            return f"plaintext of #{number}"
    if np.array_equal(seen, sample.now.cipher):
        return "ciphertext"
    slide, tweaks = sample.slide, sample.machine.engine.key(sample.slide.key_id).tweaks
    shift = slide.tweak ^ tweaks(sample.now.spa, seen.size)
    if np.array_equal(seen, slide.plain ^ shift):
        return f"plaintext of #{written[-1][0]} ⊕ T(p) ⊕ T(q)"
    return "nonsense"


def key_name(key_id: int) -> str:
    """A key id in words."""
    names = {KeyId.UNENCRYPTED.value: "none", KeyId.HOST.value: "key of the host"}
    return names.get(key_id, f"key of ASID {key_id}")


def grouped(block: Bytes) -> str:
    """A block in hexadecimal, in groups of 4 bytes."""
    return block.tobytes().hex(" ", 4)


def printable(blocks: Bytes) -> Markup:
    """Bytes as text, every space of it kept, and a dot for each that is no printable ASCII."""
    return _exact("".join(chr(byte) if 0x20 <= byte < 0x7F else "·" for byte in blocks.tobytes()))


def _exact(text: str) -> Markup:
    """A cell whose spaces all show."""
    return Markup(escape(text).replace(" ", "&nbsp;"), text)
