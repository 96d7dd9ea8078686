"""A field for an address: what cannot be used is told beside it, in words, and to screen readers as an alert.

Which addresses can be used is its owner's to say; the field only knows numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from snpbook.attest.checks import Result
from snpbook.views.palette import VERDICTS
from snpbook.widgets.view import scripts


class AddressField(anywidget.AnyWidget):
    """`value` is the text, sent on Enter and on leaving the field; `complaint` is what is wrong with it, or empty."""

    _esm = scripts("address_field.js")
    _css = Path(__file__).with_name("address_field.css")

    description = traitlets.Unicode().tag(sync=True)
    value = traitlets.Unicode().tag(sync=True)
    complaint = traitlets.Unicode().tag(sync=True)
    _alert = traitlets.Unicode(VERDICTS[Result.FAILED].light, help="the colour of a complaint").tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.on_msg(lambda _, typed, __: self.set_state({"value": typed}))

    @property
    def number(self) -> int:
        """The number typed, in any notation of Python; `ValueError` names the field."""
        try:
            return int(self.value, 0)
        except ValueError:
            raise ValueError(f"{self.description}: {self.value!r} is no number; try 0x10000") from None
