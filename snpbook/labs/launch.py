"""The chapter on the launch of a guest: a command line taken apart, a launch step by step, policies, two launches."""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.exercises.launches import INSTALLED
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.command_line import options_of, printed, read
from snpbook.host.vmm.options import GuestOptions
from snpbook.system import SAMPLE_NAME, Guest, System, sample_image
from snpbook.views.command_line import taken_apart
from snpbook.views.static import Static
from snpbook.widgets.launch_stepper import LaunchStepper
from snpbook.widgets.parting_desk import PartingDesk
from snpbook.widgets.policy_builder import PolicyBuilder

FILES = {SAMPLE_NAME: sample_image().data, "vmlinuz": b"a kernel", "initrd.img": b"an initrd"}


class Lab:
    """`stepper`, `policy` and `parting` launch on machines of their own; `host` runs the guests of command lines."""

    def __init__(self, product: str = "milan", seed: str = "launch", era: str = "mainline") -> None:
        self.system = System(product, seed, installed=INSTALLED)
        self.system.host.boot(era)
        self.stepper = LaunchStepper()
        self.policy = PolicyBuilder()
        self.parting = PartingDesk()

    def __repr__(self) -> str:
        return f"Lab({self.system!r})"

    def take_apart(self, command_line: str) -> Static:
        """Each part of each option, with its meaning."""
        return taken_apart(command_line)

    def read(self, command_line: str) -> GuestOptions:
        """What it builds. `VmmError` in QEMU's words."""
        return read(command_line)

    def start(self, command_line: str, files: Mapping[str, bytes] | None = None) -> Guest:
        """Build and launch the guest of a command line, the last one gone; the files of the lab are at hand."""
        for guest in self.system.guests:
            guest.vmm.close()
        self.system.guests.clear()
        guest = self.system.qemu(command_line, {**FILES, **(files or {})})
        guest.launch()
        return guest

    def complaint(self, command_line: str) -> str:
        """What QEMU prints for a command line that comes to nothing; empty for one that is well."""
        try:
            self.start(command_line)
        except (KernelError, ValueError) as error:
            return "\n".join(getattr(error, "__notes__", None) or [str(error)])
        return ""

    def command_line(self, guest: Guest) -> str:
        """The command line that builds such a guest."""
        return printed(options_of(guest.vmm, SAMPLE_NAME), self.system.host)
