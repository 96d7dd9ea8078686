"""Hosts to set up: what a person chooses in the BIOS, on the command line and for modules, and a boot with that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from snpbook.hardware.bios import BiosSetup
from snpbook.host.cmdline import words
from snpbook.host.kernel import Kernel
from snpbook.spec.kernel_parameters import MODULES
from snpbook.system import System


@dataclass(frozen=True, slots=True)
class HostOptions:
    """All that a person chooses of a host. `changed` changes one setting, `boot` starts it."""

    product: str = "milan"
    installed: int = 1 << 30
    era: str = "mainline"
    bios: BiosSetup = field(default_factory=BiosSetup)
    cmdline: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)

    def changed(self, setting: str, value: object) -> HostOptions:
        """The same with one other setting: `bios.smee`, `kernel.iommu`, `kvm_amd.sev`; None takes a word away.

        `ValueError` for a setting or a value that does not exist.
        """
        group, _, name = setting.partition(".")
        if group == "bios" and name in {one.name for one in fields(BiosSetup)}:
            change: dict[str, Any] = {name: value}
            return replace(self, bios=replace(self.bios, **change))
        if group == "kernel" and name:
            return replace(self, cmdline=_reworded(self.cmdline, name, value))
        if name in MODULES.get(group, ()):
            options = _reworded(self.modules.get(group, ""), name, value)
            cmdline = _reworded(self.cmdline, setting, None)
            return replace(self, cmdline=cmdline, modules={**self.modules, group: options})
        raise ValueError(f"{setting!r} is no setting: bios.smee, kernel.iommu or kvm_amd.sev, for example")

    def boot(self) -> Kernel:
        """A machine with these options, booted."""
        system = System(self.product, "a host", installed=self.installed, cores=2, bios=self.bios)
        system.host.boot(self.era, cmdline=self.cmdline, modules=self.modules)
        return system.host


def _reworded(text: str, name: str, value: object) -> str:
    """Options with one of them set anew, or without it."""
    kept = [word for word in text.split() if words(word)[0][0] != name]
    if value is not None:
        written = str(int(value)) if isinstance(value, bool) else str(value)
        kept.append(f"{name}={written}")
    return " ".join(kept)
