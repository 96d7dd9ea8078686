"""What a row of the table of kernels stands or falls by: one look from outside, and what it must see on each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snpbook.host.refusal import KernelError
from tests.host.race_world import World
from tests.host.sev_hosts import DEFAULT, SNP, Handle, Host

OK = 0
V7, MAINLINE = "rfc-v7", "mainline"
Observed = Any
Look = Callable[[str], Observed]


class Probes(dict[str, tuple[Look, Observed, Observed]]):
    """Looks by the rows that they stand for, with what `rfc-v7` and `mainline` show."""

    def __call__(self, *names: str, v7: Observed, mainline: Observed) -> Callable[[Look], None]:
        """Decorate a look."""

        def keep(look: Look) -> None:
            self.update(dict.fromkeys(names, (look, v7, mainline)))

        return keep

    def check(self, name: str) -> None:
        look, v7, mainline = self[name]
        assert look(V7) == v7
        assert look(MAINLINE) == mainline


def tried(call: Callable[[], object]) -> int:
    """0, or the errno of a call."""
    try:
        call()
    except KernelError as error:
        return error.errno or 0
    return OK


def new_guest(host: Host) -> Handle:
    """An SNP guest before its launch, by the call of its era."""
    v7 = host.kernel.era.name == V7
    vm = host.vm(DEFAULT if v7 else SNP)
    vm.op(22, bytes(8 if v7 else 48))
    return vm


def world(era: str, **options: Any) -> World:
    return World("snp-v7" if era == V7 else "snp", **options)
