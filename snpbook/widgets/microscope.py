"""The live DIMM microscope: write a few blocks to a machine's memory, then move them or put older ones back.

What a reader types is checked here before anything happens: a mistake is answered beside the field that holds it, and
all else stays. Tables, heat map and static twin are those of `snpbook.views`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from snpbook.attest.checks import Result
from snpbook.hardware.microscope import examine, look, move_mask
from snpbook.hardware.tweaks import BLOCK_SIZE
from snpbook.spec.encryption import KeyId
from snpbook.spec.pages import PAGE_SIZE
from snpbook.views import microscope as view
from snpbook.views.microscope import Machine, Sample, Step
from snpbook.views.palette import THEMES, VERDICTS
from snpbook.views.static import Static
from snpbook.widgets.view import View, scripts

_BLOCKS = PAGE_SIZE // BLOCK_SIZE
_LONGEST = 24

Form = Mapping[str, Any]
"""What the fields of the microscope hold: texts, and truth for the boxes to tick."""


class InputError(ValueError):
    """An operand that cannot be used; `field` names the one that holds it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Microscope(View, anywidget.AnyWidget):
    """The memories of some machines, by name, and the last experiment made on one of them.

    `write` begins an experiment or goes on with it, `move` and `replay` are what a host does with ciphertext that it
    cannot read. Each returns who reads what afterwards. They raise `InputError`, a `ValueError`, before anything
    changes; the browser shows its words instead.
    """

    _esm = scripts("microscope.js")
    _css = Path(__file__).with_name("microscope.css")

    _machines = traitlets.Dict(help="titles by name").tag(sync=True)
    _form = traitlets.Dict().tag(sync=True)
    _tables = traitlets.Dict(help="HTML by the name of the table").tag(sync=True)
    _heat = traitlets.Dict(help="HTML by theme").tag(sync=True)
    _status = traitlets.Unicode().tag(sync=True)
    _linear = traitlets.Bool(help="whether a host has T(p) on the machine of the experiment").tag(sync=True)
    _alert = traitlets.Unicode(VERDICTS[Result.FAILED].light, help="the colour of a mistake").tag(sync=True)
    _refusal = traitlets.Dict(help="field and words of the last mistake").tag(sync=True)

    def __init__(self, machines: Mapping[str, Machine], machine: str, plain: str, spa: int) -> None:
        self._known = dict(machines)
        self._sample: Sample | None = None
        super().__init__(_machines={name: known.title for name, known in self._known.items()})
        self.on_msg(self._hear)
        self._form = {"to": f"{spa + PAGE_SIZE:#x}", "corrected": False}
        self.write(plain, spa, machine=machine)

    @property
    def sample(self) -> Sample:
        """The experiment as it stands."""
        if self._sample is None:
            raise LookupError("nothing is under the microscope yet")
        return self._sample

    def write(
        self, plain: str | bytes, spa: int, *, asid: int = 1, c_bit: bool = True, copies: int = 1, machine: str = ""
    ) -> Static:
        """Write a text or bytes, filled up with zeros to whole blocks, `copies` times one after the other.

        The writer is the guest `asid`, or the host for 0; without `c_bit` it writes unencrypted. Another `machine`
        than before begins a new diary.
        """
        name = machine or self._form["machine"]
        if name not in self._known:
            raise InputError("machine", f"Machine: {name!r} is none of {', '.join(self._known)}")
        known = self._known[name]
        if not 1 <= copies <= _BLOCKS:
            raise InputError("copies", f"Copies: {copies} is not 1 to {_BLOCKS}, the blocks of a page")
        source = plain.encode() if isinstance(plain, str) else plain
        blocks = (source + bytes(-len(source) % BLOCK_SIZE)) * copies
        if not blocks:
            raise InputError("plain", "Plaintext: there is nothing to write")
        _check_place("spa", "Address", known, spa, len(blocks))
        if not 0 <= asid <= known.asids:
            raise InputError("asid", f"ASID: {known.title} has 1 to {known.asids}, and 0 for the host; not {asid}")
        slide = examine(known.engine, (asid or KeyId.HOST) if c_bit else KeyId.UNENCRYPTED, spa, blocks)
        known.engine.write(slide.key_id, spa, blocks)
        deed = f"{f'guest {asid}' if asid else 'the host'} wrote {_short(plain)}{f', {copies} times' * (copies > 1)}"
        before = self._sample.steps if self._sample and self._sample.machine is known else ()
        self._sample = Sample(known, asid, slide, (*before, Step(deed, spa, slide.cipher, slide.plain)))
        form: Form = {"plain": plain, "hex": False} if isinstance(plain, str) else {"plain": plain.hex(), "hex": True}
        if not known.linear:
            form = {**form, "corrected": False}
        return self._show(machine=name, **form, spa=f"{spa:#x}", asid=str(asid), c_bit=c_bit, copies=str(copies))

    def move(self, to: int, *, corrected: bool = False) -> Static:
        """Copy the ciphertext to another address, as a host can; with `corrected`, after XOR with T(p) ⊕ T(q)."""
        now, machine, slide = self.sample.now, self.sample.machine, self.sample.slide
        size = now.cipher.size
        _check_place("to", "Move to", machine, to, size)
        if to == now.spa:
            raise InputError("to", f"Move to: the blocks lie at {to:#x} already")
        if corrected and not machine.linear:
            raise InputError("corrected", f"T(p) ⊕ T(q): on {machine.title}, it takes the key, which no host has")
        mask = move_mask(machine.engine, slide.key_id, now.spa, to, size) if corrected else np.zeros_like(now.cipher)
        deed = f"the host copied it from {now.spa:#_x}{', with T(p) ⊕ T(q)' * corrected}"
        self._put(Step(deed, to, now.cipher ^ mask))
        return self._show(to=f"{to:#x}", corrected=corrected)

    def replay(self) -> Static:
        """Put back what the address held before, as a host can that has kept a copy."""
        now = self.sample.now
        for number, step in reversed(list(enumerate(self.sample.steps, 1))):
            same_place = step.spa == now.spa and step.cipher.shape == now.cipher.shape
            if same_place and not np.array_equal(step.cipher, now.cipher):
                self._put(Step(f"the host put back #{number}", now.spa, step.cipher))
                return self._show()
        raise InputError(
            "replay", f"Replay: nothing else was at {now.spa:#x} yet; write as many bytes there again first"
        )

    def static(self) -> Static:
        return view.microscope(self.sample)

    def _put(self, step: Step) -> None:
        """Ciphertext written past every key, as one more step of the experiment."""
        self.sample.machine.engine.write(KeyId.UNENCRYPTED, step.spa, step.cipher.reshape(-1))
        self._sample = replace(self.sample, steps=(*self.sample.steps, step))

    def _show(self, **form: Any) -> Static:
        """Send what is to be seen, with the fields that changed, to the browser."""
        sample, readers = self.sample, view.readers(self.sample)
        reader, key_id = next(iter(sample.readers.items()))
        found = view.meaning(sample, look(sample.machine.engine, key_id, sample.now.spa, sample.now.cipher))
        with self.hold_sync():
            self._form = {**self._form, **form}
            self._tables = {"way": view.way(sample).html, "readers": readers.html, "diary": view.diary(sample).html}
            self._linear = sample.machine.linear
            self._heat = {theme.name: view.heat(sample, theme).html for theme in THEMES}
            self._status = f"#{len(sample.steps)} {sample.now.deed}. Then {reader} reads: {found}."
            self._refusal = {}
        return readers

    def _hear(self, _: object, content: Form, __: object) -> None:
        """What a button of the browser asks for."""
        try:
            match content:
                case {"do": "write", "plain": plain, "hex": coded}:
                    self.write(
                        _bytes(plain) if coded else plain, _number("spa", "Address", content["spa"]),
                        asid=_number("asid", "ASID", content["asid"], "1, or 0 for the host"), c_bit=content["c_bit"],
                        copies=_number("copies", "Copies", content["copies"], "64"), machine=content["machine"],
                    )  # fmt: skip
                case {"do": "move", "to": to, "corrected": corrected}:
                    self.move(_number("to", "Move to", to), corrected=corrected)
                case {"do": "replay"}:
                    self.replay()
        except InputError as mistake:
            self._refusal = {"field": mistake.field, "text": str(mistake)}


def _check_place(field: str, name: str, machine: Machine, spa: int, size: int) -> None:
    """Refuse an address at which no whole blocks lie, or from which they would leave memory or their page."""
    if not 0 <= spa < machine.engine.size:
        raise InputError(field, f"{name}: {spa:#x} is outside memory, which ends at {machine.engine.size - 1:#x}")
    if spa % BLOCK_SIZE:
        near = spa // BLOCK_SIZE * BLOCK_SIZE
        raise InputError(field, f"{name}: {spa:#x} is no multiple of 16, where a block begins; {near:#x} is")
    if spa % PAGE_SIZE + size > PAGE_SIZE:
        raise InputError(field, f"{name}: {size} bytes at {spa:#x} would leave their page of 4 KB")


def _number(field: str, name: str, text: str, example: str = "4096 or 0x1000") -> int:
    try:
        return int(text.strip(), 0)
    except ValueError:
        raise InputError(field, f"{name}: {text!r} is no number; write it as {example}") from None


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InputError("plain", f"Plaintext: {text!r} is not hexadecimal, two digits 0-9 a-f for each byte") from None


def _short(plain: str | bytes) -> str:
    """A plaintext in the diary."""
    text = repr(plain) if isinstance(plain, str) else plain.hex()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
