"""Module parameters: what modprobe passes on when it loads a module, and what the module makes of it.

Options of modprobe.d come first, those of the kernel command line after them, and the last word counts. An unknown name
is told and ignored; a value that is none of its type keeps the module from loading. Sources: Linux kernel/params.c,
kernel/module/main.c; kmod.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from snpbook.host.cmdline import Word, boolean
from snpbook.spec.bring_up import BAD_MODULE_PARAMETER, UNKNOWN_MODULE_PARAMETER
from snpbook.spec.kernel_parameters import MODULES

Value = bool | int | str
_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")


def load(module: str, given: Iterable[Word], era: str, log: Callable[[str], None]) -> dict[str, Value] | None:
    """The parameters with which a module is loaded, or None where it is not: the log says why."""
    known = {name: fact for name, fact in MODULES[module].items() if era not in fact.absent}
    values: dict[str, Value] = {name: fact.default for name, fact in known.items()}
    for written, text in given:
        name = written.replace("-", "_")
        if name not in known:
            log(UNKNOWN_MODULE_PARAMETER.format(module=module, name=written))
            continue
        value = _read(text, known[name].default)
        if value is None:
            log(BAD_MODULE_PARAMETER.format(module=module, value=text or "", name=written))
            return None
        values[name] = value
    return values


def shown(value: Value) -> str:
    """A parameter as its file in /sys reads."""
    if isinstance(value, bool):
        return "Y" if value else "N"
    return str(value) or "(null)"


def _read(text: str | None, default: Value) -> Value | None:
    """A value of the type of `default`; None for what is none. A bool alone is true."""
    if isinstance(default, bool):
        return True if text is None else boolean(text)
    if text is None:
        return None
    if isinstance(default, int):
        number = _NUMBER.fullmatch(text)
        return int(text, _base(number[1])) if number else None
    return text


def _base(digits: str) -> int:
    if digits[:2].lower() == "0x":
        return 16
    return 8 if digits.startswith("0") else 10
