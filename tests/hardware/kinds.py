"""Benches with a guest of each kind: plain, SEV, SEV-ES and SNP, entered at the same addresses."""

from __future__ import annotations

from typing import Any

from snpbook.hardware.save_area import seal
from snpbook.spec.vmcb import intercept_bits
from snpbook.spec.vmsa import SAVE_AREA, VMSA
from tests.hardware.guests import ASID, PAGE, VMCB_PAGE, VMSA_PAGE, Bench

ES_VMSA_PAGE = 0x12
"""A page of the hypervisor."""
RESET = {"cr0": 0x10, "efer": 0x1000, "rip": 0xFFF0, "rflags": 2}
ALWAYS = (0x78, 0x7F, 0x80)


class AnyBench(Bench):
    """A bench whose guest is of a kind: `snp`, `es`, `sev` or `plain`."""

    def __init__(self, kind: str = "snp", name: str = "genoa", *, features: int = 1, snp: bool = True) -> None:
        super().__init__(name, snp=snp)
        self.kind = kind
        self.vmcb |= {"sev": int(kind != "plain"), "sev_es": int(kind in ("snp", "es"))}
        if kind == "snp":
            self.set_vmsa(sev_features=features)
        elif kind == "es":
            self.vmcb["vmsa_pa"] = ES_VMSA_PAGE * PAGE
            page = VMSA.pack(**{**RESET, "sev_features": features & ~1})
            self.machine.encryption.write(ASID, ES_VMSA_PAGE * PAGE, page)
            seal(self.machine, ASID, ES_VMSA_PAGE)
        self.set_vmcb()
        if kind in ("sev", "plain"):
            self.set_save_area(**RESET)

    def set_vmcb(self, **fields: Any) -> None:
        """Write the control area, and keep the save area."""
        save = self.machine.dram.read(VMCB_PAGE * PAGE + 0x400, 0xC00)
        super().set_vmcb(**fields)
        self.machine.dram.write(VMCB_PAGE * PAGE + 0x400, save)

    def intercept(self, *codes: int) -> None:
        """Intercept these exit codes, and what every hypervisor intercepts."""
        self.vmcb["intercepts"] = intercept_bits(*codes, *ALWAYS)
        self.set_vmcb()

    def set_save_area(self, **registers: int) -> None:
        self.machine.dram.write(VMCB_PAGE * PAGE + 0x400, SAVE_AREA.pack(**registers))

    def read_save_area(self) -> Any:
        return SAVE_AREA.unpack(self.machine.dram.read(VMCB_PAGE * PAGE + 0x400, SAVE_AREA.size))

    def read_registers(self) -> Any:
        """The registers where this kind of guest has them, read with its key."""
        if self.kind in ("sev", "plain"):
            return self.read_save_area()
        page = VMSA_PAGE if self.kind == "snp" else ES_VMSA_PAGE
        return VMSA.unpack(self.machine.encryption.read(ASID, page * PAGE, PAGE))

    def memory(self, gfn: int, page: int) -> None:
        """A page of the guest's memory, as this kind of guest has it."""
        if self.kind == "snp":
            self.give(gfn, page)
        else:
            self.map(gfn, page)
