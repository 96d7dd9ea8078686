"""The chapter on the secure processor: a machine without host software, its mailbox, its states and its launches."""

from __future__ import annotations

import numpy as np

from snpbook.firmware.bench import Bench
from snpbook.firmware.growth import Page
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.products import product as find_product
from snpbook.spec.vmsa import BSP_RESET_EIP, INITIAL_VMSA_GPA, SNP_ACTIVE, reset_vmsa
from snpbook.views.bits import bits
from snpbook.views.mailbox import answers
from snpbook.views.static import Static
from snpbook.widgets.launch_desk import LaunchDesk
from snpbook.widgets.mailbox_console import MailboxConsole
from snpbook.widgets.state_machines import StateMachines

_FIRST_GFN = 256


class Lab:
    """A machine with its secure processor, powered on: `console` and `machines` work on it.

    `launch` launches a small guest on machines of its own.
    """

    def __init__(self, product: str = "milan", seed: str = "secure processor") -> None:
        self.product, self.seed = find_product(product), seed
        self.bench = self._power_on()
        self.console = MailboxConsole(self.bench)
        self.machines = StateMachines(self.console)
        self.launch = LaunchDesk(self._power_on, self._guest())

    def __repr__(self) -> str:
        return f"Lab({self.bench!r})"

    def commands(self, last: int = 8) -> Static:
        """The last commands sent, a row for each."""
        made = self.bench.made
        return answers(made[-last:], max(len(made) - last, 0) + 1)

    def buffer(self, command: Command) -> Static:
        """The layout of a command's buffer. `ValueError` for a command that has none."""
        layout = BUFFERS[command]
        if layout is None:
            raise ValueError(f"{command.name} has no buffer: the address registers are zero")
        return bits(layout)

    def asid(self, number: int) -> AsidState:
        """The state of an ASID."""
        return self.bench.asid(number)

    def _power_on(self) -> Bench:
        return Bench(self.product.name, self.seed, rng=np.random.default_rng(list(self.seed.encode())).bytes)

    def _guest(self) -> list[Page]:
        """A page of each type: two of code, one of zeros, one that nobody measures, and what the firmware fills in."""
        code = [bytes([number]) * PAGE_SIZE for number in (1, 2)]
        kinds = (LaunchPage.NORMAL, LaunchPage.NORMAL, LaunchPage.ZERO, LaunchPage.UNMEASURED, LaunchPage.SECRETS,
                 LaunchPage.CPUID)  # fmt: skip
        blank = bytes(PAGE_SIZE)
        pages = [
            Page(kind, _FIRST_GFN + number << PAGE_SHIFT, code[number] if kind is LaunchPage.NORMAL else blank)
            for number, kind in enumerate(kinds)
        ]
        vcpu = bytes(reset_vmsa(BSP_RESET_EIP, self.product.vcpu_signature, SNP_ACTIVE))
        return [*pages, Page(LaunchPage.VMSA, INITIAL_VMSA_GPA, vcpu)]
