"""What every renderer returns: one view in two forms, text and HTML, which say the same.

The text is what a terminal shows and what notebooks are compared by; the HTML uses only what survives JupyterLab's
sanitiser: tables, inline styles, `details`, and pictures as data addresses with a text alternative.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, repr=False)
class Static:
    """A view that no longer changes. In a notebook it shows as HTML, elsewhere as text."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html
