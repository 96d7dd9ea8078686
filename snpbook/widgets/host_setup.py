"""The set-up desk: BIOS options, kernel command line and module options of a host, and what its boot makes of them.

Each press of `Boot` is a new machine with what the form says. Nothing is checked for sense: what the kernel thinks of
it stands in its log.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as w

from snpbook.hardware.bios import BiosSetup
from snpbook.host.checklist import checklist as look_over
from snpbook.host.kernel import Kernel
from snpbook.spec.eras import NAMES
from snpbook.spec.products import product as find_product
from snpbook.spec.products import product_names
from snpbook.spec.sizes import parse_size
from snpbook.system import System
from snpbook.views import host_state
from snpbook.views.checklist import checklist
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

INSTALLED = 4 << 30
ALL, NONE, CUSTOM = "all memory", "none", "custom"
_LOG = "<strong>The kernel's log</strong>"


class HostDesk(View, w.VBox):
    """A desk for one host of 4 GB. `boot()` presses the button: with names of fields it fills in the form first.

    `product`, `smee`, `smm_lock`, `coverage`, `covered`, `rmp_base`, `limit`, `iommu`, `nbio_snp` are the hardware and
    its BIOS, `era`, `cmdline`, `kvm_amd` the software. `system` is the machine that was booted last.
    """

    def __init__(self, product: str = "milan", seed: str = "host set-up", era: str = "mainline") -> None:
        self._seed = seed
        runnable = [name for name in product_names() if find_product(name).firmware]
        self.product = w.Dropdown(
            options=runnable, value=product, description="Processor", style=_LABEL, layout=_wide(170)
        )
        self.smee = _switch("SMEE")
        self.smm_lock = _switch("SMM Lock")
        self.iommu = _switch("IOMMU")
        self.nbio_snp = _switch("NBIO SEV-SNP Support")
        self.coverage = w.Dropdown(
            options=[ALL, NONE, CUSTOM], description="SNP Memory Coverage", style=_LABEL, layout=_wide(300)
        )
        self.covered = w.Text("2 GiB", description="Amount to cover", style=_LABEL, layout=_wide(240))
        self.rmp_base = w.Text(
            description="RMP at", placeholder="empty: top of memory", style=_LABEL, layout=_wide(300)
        )
        self.limit = w.BoundedIntText(min=1, description="SEV-ES ASID Space Limit", style=_LABEL, layout=_wide(260))
        self._bound()
        self.era = w.Dropdown(options=list(NAMES), value=era, description="Kernel", style=_LABEL, layout=_wide(170))
        self.cmdline = w.Text(description="Command line", placeholder="iommu=pt", style=_LABEL, layout=_wide(520))
        self.kvm_amd = w.Text(
            description="options kvm_amd", placeholder="sev=1 sev_es=1 sev_snp=1", style=_LABEL, layout=_wide(520)
        )
        self.button = w.Button(description="Boot", tooltip="A new machine with these options", layout=_wide(120))
        self.told = w.HTML()
        self.system = self._start()
        self.dmesg: Panel[Kernel] = Panel(lambda kernel: host_state.dmesg(kernel.dmesg), self.kernel)
        self.checks: Panel[Kernel] = Panel(lambda kernel: checklist(look_over(kernel)), self.kernel)
        self.machine: Panel[Kernel] = Panel(host_state.state, self.kernel)
        self._offer()
        self.product.observe(self._bound, "value")
        self.coverage.observe(self._offer, "value")
        self.button.on_click(self._pressed)
        super().__init__([
            _row(self.product, self.smee, self.smm_lock, self.iommu, self.nbio_snp),
            _row(self.coverage, self.covered), _row(self.rmp_base, self.limit), _row(self.era), self.cmdline,
            self.kvm_amd, _row(self.button, self.told),
            w.HTML(_LOG), self.dmesg, self.checks, self.machine,
        ])  # fmt: skip

    def boot(self, **choices: Any) -> Static:
        """Set fields of the form by their names, and boot: the log.

        `ValueError` for what does not fit the form or the machine; the desk then keeps the host that it has.
        """
        for name, value in choices.items():
            getattr(self, name).value = value
        self.system = self._start()
        for panel in (self.dmesg, self.checks, self.machine):
            panel.show(self.kernel)
        self.told.value = ""
        return self.dmesg.static()

    def static(self) -> Static:
        log, checks, machine = (panel.static() for panel in (self.dmesg, self.checks, self.machine))
        return Static(f"{log.text}\n\n{checks.text}", f"<p>{_LOG}</p>{log.html}{checks.html}{machine.html}")

    @property
    def kernel(self) -> Kernel:
        """The host of that machine."""
        return self.system.host

    def _start(self) -> System:
        base = self.rmp_base.value.strip()
        bios = BiosSetup(
            smee=self.smee.value, smm_lock=self.smm_lock.value, snp_coverage=self._coverage(),
            rmp_base=_address(base) if base else None, min_sev_asid=self.limit.value, iommu=self.iommu.value,
            nbio_snp=self.nbio_snp.value,
        )  # fmt: skip
        system = System(self.product.value, self._seed, installed=INSTALLED, bios=bios)
        system.host.boot(self.era.value, cmdline=self.cmdline.value, modules={"kvm_amd": self.kvm_amd.value})
        return system

    def _coverage(self) -> int | None:
        if self.coverage.value == CUSTOM:
            return parse_size(self.covered.value)
        return None if self.coverage.value == ALL else 0

    def _bound(self, _: object = None) -> None:
        """Another processor has other ASIDs."""
        chosen = find_product(self.product.value)
        self.limit.max, self.limit.value = chosen.asid_limit + 1, chosen.min_sev_asid

    def _offer(self, _: object = None) -> None:
        """An amount is asked for where the coverage is one's own."""
        self.covered.disabled = self.coverage.value != CUSTOM

    def _pressed(self, _: object) -> None:
        try:
            self.boot()
        except ValueError as error:
            self.told.value = f"<strong>{error}</strong>"


_LABEL = {"description_width": "initial"}


def _address(text: str) -> int:
    try:
        return int(text.replace("_", ""), 0)
    except ValueError:
        raise ValueError(f"RMP at: {text!r} is no address; try 0x40000000") from None


def _switch(name: str) -> w.Checkbox:
    return w.Checkbox(True, description=name, indent=False, layout=w.Layout(width="auto", margin="0 12px 0 0"))


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
