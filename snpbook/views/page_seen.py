"""One page of a guest as host and guest see it, side by side: what each can read of it, and what each knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snpbook.attest.checks import Result
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import table

_A_LINE = 16


@dataclass(frozen=True, slots=True)
class Seen:
    """A page at guest address `gpa`, and who knows what.

    `host` and `guest` are the first bytes as each reads them (None where it cannot), `why` is the reason of the guest.
    `spa` is 0 where the host has no memory behind the page, `entry` the entry of the RMP in words, empty without a
    page. `private` is the attribute that the host keeps, `c_bit` the guest's own, `accepted` what the guest remembers.
    """

    gpa: int
    host: bytes | None
    guest: bytes | None
    why: str
    spa: int
    entry: Mapping[str, object]
    private: bool
    c_bit: bool
    accepted: bool


def page_seen(page: Seen) -> Static:
    """The table, with the host's eye on the left and the guest's on the right."""
    entry = page.entry
    whose = f"guest, ASID {entry['asid']}" if entry.get("assigned") else "the hypervisor's" if entry else "no page"
    host, guest = _bytes(page.host, "no memory behind it yet"), _bytes(page.guest, page.why)
    rows = [
        ("where", f"SPA {page.spa:#_x}" if page.spa else "nowhere yet", f"GPA {page.gpa:#_x}"),
        *((f"bytes from {_A_LINE * n:#04x}", h, g) for n, (h, g) in enumerate(zip(host, guest, strict=True))),
        ("as text", _text(page.host), _text(page.guest)),
        ("private or shared", _side(page.private, "attribute in KVM"), _side(page.c_bit, f"C-bit {int(page.c_bit)}")),
        ("whose (RMP)", whose, "cannot be read from here"),
        ("GPA in the RMP", str(entry["gpa"]) if entry.get("assigned") else "", "cannot be read from here"),
        ("validated", _validated(entry), "accepted by itself" if page.accepted else "not accepted by itself"),
    ]
    return table(f"The page at GPA {page.gpa:#_x}", ["", "the host's eye", "the guest's eye"], rows,
                 mono=["the host's eye", "the guest's eye"])  # fmt: skip


def _bytes(data: bytes | None, why: str) -> tuple[str, str]:
    if data is None:
        return mark(Result.FAILED, why), ""
    return data[:_A_LINE].hex(" "), data[_A_LINE : 2 * _A_LINE].hex(" ")


def _text(data: bytes | None) -> str:
    return "" if data is None else "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data[: 2 * _A_LINE])


def _side(private: bool, how: str) -> str:
    return f"{'private' if private else 'shared'} ({how})"


def _validated(entry: Mapping[str, object]) -> str:
    return "" if not entry.get("assigned") else "yes" if entry["validated"] else "no"
