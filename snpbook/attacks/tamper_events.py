"""Events and intercepts that are the host's idea: #VC, exceptions, interrupts, and instructions that it wants to see.

Sources: APM2 15.20, 15.35.5; WeSee and Heckler (2024).
"""

from __future__ import annotations

from snpbook.attacks.attacker import Attacker
from snpbook.attacks.ghcb import Moment
from snpbook.spec.vmcb import EXCEPTION_VECTORS, INTERCEPT_BYTES, EventKind, ExitCode, Vector

_VECTORS = 1 << 8
_HANDLED = (
    ExitCode.CPUID, ExitCode.MSR, ExitCode.IOIO, ExitCode.VMMCALL, ExitCode.RDTSC, ExitCode.RDTSCP, ExitCode.RDPMC,
    ExitCode.READ_DR7, ExitCode.WBINVD, ExitCode.NPF, ExitCode.PAGE_NOT_VALIDATED,
)  # fmt: skip
"""What a handler of #VC knows."""


def inject_vc(host: Attacker, m: Moment) -> bool:
    """#VC with an exit code of the host's choice, mostly one that a handler knows."""
    code = host.random.choice(host.random.choice((_HANDLED, [*ExitCode])))
    m.inject(Vector.VC, code % (1 << 32))
    return True


def inject_exception(host: Attacker, m: Moment) -> bool:
    """Any exception but #VC, with or without an error code."""
    vector = host.random.choice([n for n in range(EXCEPTION_VECTORS) if n != Vector.VC])
    m.inject(vector, host.random.choice((None, host.number() % (1 << 32))))
    return True


def inject_interrupt(host: Attacker, m: Moment) -> bool:
    """An interrupt, an NMI or a software interrupt."""
    kind = host.random.choice((EventKind.INTERRUPT, EventKind.NMI, EventKind.SOFTWARE_INTERRUPT))
    m.inject(Vector.NMI if kind == EventKind.NMI else host.random.randrange(EXCEPTION_VECTORS, _VECTORS), None, kind)
    return True


def intercept(host: Attacker, m: Moment) -> bool:
    """Intercepts of the host's choice: the guest gets #VC where it never had one."""
    held, more = m.vcpu.control().intercepts, host.random.randbytes(INTERCEPT_BYTES)
    both = int.from_bytes(held, "little") | int.from_bytes(more, "little")
    m.vcpu.vm.kernel.cpu.write(m.vcpu.vmcb, both.to_bytes(INTERCEPT_BYTES, "little"))
    return True
