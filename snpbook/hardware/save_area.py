"""Where a guest's registers are while it does not run: an encrypted page of its own, or the VMCB in the clear.

Only VMRUN and #VMEXIT load and store here. A SEV-ES guest's page has a checksum that software does not reach, an SNP
guest's the RMP; with VmsaRegProt equal registers do not look equal twice. Sources: APM2 15.34 to 15.36 and
appendix B, firmware 1.55.25 (checksum, tweak bitmap).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from snpbook.hardware.machine import Core, Machine
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import VMSA_TWEAK_BITMAP
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import SAVE_AREA_OFFSET
from snpbook.spec.vmsa import CHECKED_BYTES, DEBUG_REGISTERS, SAVE_AREA, UNSAVED_REGISTERS, VMSA

_TWEAKED = np.flatnonzero(np.unpackbits(np.frombuffer(VMSA_TWEAK_BITMAP, np.uint8), bitorder="little"))
_NONCE = VMSA.fields["reg_prot_nonce"]
_NOTHING = dict(VMSA.record())


@dataclass(slots=True)
class SaveArea:
    """The registers of one vCPU in memory: `image` are the bytes as read, with the nonce taken off again."""

    machine: Machine
    layout: Layout
    key_id: int
    spa: int
    image: bytes
    loaded: dict[str, Any]

    @classmethod
    def encrypted(cls, machine: Machine, vmcb: Record) -> SaveArea:
        """The VMSA page of a SEV-ES or SNP guest."""
        image = machine.memory.read(vmcb.asid, vmcb.vmsa_pa, VMSA.size)
        loaded = dict(VMSA.unpack(image))
        if loaded["sev_features"] & SevFeatures.VMSA_REG_PROT:
            image = tweak(image)
            loaded = dict(VMSA.unpack(image))
        return cls(machine, VMSA, vmcb.asid, vmcb.vmsa_pa, image, loaded)

    @classmethod
    def plain(cls, machine: Machine, vmcb_spa: int) -> SaveArea:
        """The save area in a VMCB, which its host reads and writes."""
        spa = vmcb_spa + SAVE_AREA_OFFSET
        image = machine.memory.read(KeyId.UNENCRYPTED, spa, SAVE_AREA.size)
        return cls(machine, SAVE_AREA, KeyId.UNENCRYPTED, spa, image, dict(SAVE_AREA.unpack(image)))

    @property
    def page(self) -> int:
        return self.spa >> PAGE_SHIFT

    @property
    def is_encrypted(self) -> bool:
        return self.layout is VMSA

    @property
    def checksum_matches(self) -> bool:
        """Whether the page of a SEV-ES guest is as the firmware or the last #VMEXIT left it."""
        return is_sealed(self.machine, self.key_id, self.page)

    @property
    def _unsaved(self) -> tuple[str, ...]:
        """The registers that stay in the core when the guest leaves."""
        if not self.is_encrypted:
            return UNSAVED_REGISTERS + DEBUG_REGISTERS
        return () if self.loaded["sev_features"] & SevFeatures.DEBUG_VIRTUALIZATION else DEBUG_REGISTERS

    def registers(self, core: Core) -> dict[str, Any]:
        """The registers at entry, by VMSA name: those of the area, and those that the core has kept."""
        return _NOTHING | self.loaded | {name: core.registers[name] for name in self._unsaved}

    def store(self, registers: dict[str, Any], core: Core) -> None:
        """Put the registers back at #VMEXIT: what changed into the area, the others into the core.

        With VmsaRegProt every #VMEXIT draws a new nonce (inferred: without a new one equal registers would look
        equal, which the feature is there to prevent).
        """
        unsaved, buffer = self._unsaved, bytearray(self.image)
        core.registers.update({name: registers[name] for name in unsaved})
        for name, field in self.layout.fields.items():
            value = registers[name]
            if name not in unsaved and value != self.loaded[name]:
                data = value.to_bytes(field.size, "little") if field.kind == "uint" else bytes(value)
                buffer[field.offset : field.offset + field.size] = data
        protected = self.is_encrypted and registers["sev_features"] & SevFeatures.VMSA_REG_PROT
        if protected:
            buffer[_NONCE.offset : _NONCE.offset + _NONCE.size] = self.machine.random(_NONCE.size)
        self.machine.memory.write(self.key_id, self.spa, tweak(bytes(buffer)) if protected else buffer)
        if self.is_encrypted and not registers["sev_features"] & SevFeatures.SNP_ACTIVE:
            seal(self.machine, self.key_id, self.page)


def seal(machine: Machine, asid: int, page: int) -> None:
    """Keep the checksum of a SEV-ES guest's VMSA page: the firmware at launch, hardware at every #VMEXIT."""
    machine.vmsa_checksums[page] = _checksum(machine, asid, page << PAGE_SHIFT)


def is_sealed(machine: Machine, asid: int, page: int) -> bool:
    """Whether a page is a SEV-ES guest's VMSA whose checksum is the one that is kept."""
    return machine.vmsa_checksums.get(page) == _checksum(machine, asid, page << PAGE_SHIFT)


def tweak(image: bytes) -> bytes:
    """A VMSA page with its registers XORed with its own REG_PROT_NONCE, or with that undone."""
    words = np.frombuffer(image, "<u8").copy()
    words[_TWEAKED] ^= words[_NONCE.offset // _NONCE.size]
    return words.tobytes()


def _checksum(machine: Machine, asid: int, spa: int) -> int:
    """CRC-32 of the plaintext (which CRC, and of what form of the page, is not published: MODEL)."""
    return crc32(machine.memory.read(asid, spa, CHECKED_BYTES))
