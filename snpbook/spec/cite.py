"""Where a fact comes from: the documents that the model follows, by short key.

A `Cite` travels with every layout, refusal and failed check, so that a reader can lay the
document beside the model. This file alone knows the documents' full titles.
"""

from dataclasses import dataclass

DOCUMENTS = {
    "APM2": "AMD64 Architecture Programmer's Manual, volume 2 (AMD publication 24593)",
    "SNP": "SEV Secure Nested Paging Firmware ABI (AMD publication 56860)",
    "SEV": "Secure Encrypted Virtualization API (AMD publication 55766)",
    "GHCB": "SEV-ES Guest-Hypervisor Communication Block (AMD publication 56421)",
    "SVSM": "Secure VM Service Module for SEV-SNP Guests (AMD publication 58019)",
    "KDS": "VCEK Certificate and KDS Interface (AMD publication 57230)",
    "PPR": "Processor Programming Reference, family 19h (AMD publication 55898)",
    "FW": "AMD-ASPFW, the published Genoa SEV firmware 1.55.25 (behaviour only)",
    "LINUX": "Linux 6.12, the kernel's own headers and sources",
    "V7": "RFC v7 of the SEV-SNP hypervisor series (December 2022)",
    "UPM": "PATCH v10 of the fd-based approach for supporting KVM (December 2022)",
    "OVMF": "edk2 OvmfPkg, reset vector tables and SEV metadata",
    "QEMU": "QEMU 10.0, target/i386/sev.c",
    "IGVM": "Independent Guest Virtual Machine file format (Microsoft, crate igvm_defs)",
    "X509": "RFC 5280, RFC 4055 and RFC 8017 (certificates and RSASSA-PSS)",
    "MODEL": "a choice of this model where nothing is published (see LIMITATIONS.md)",
}


@dataclass(frozen=True, slots=True)
class Cite:
    """A document's short key and the place in it."""

    document: str
    section: str = ""

    def __post_init__(self) -> None:
        if self.document not in DOCUMENTS:
            raise ValueError(f"unknown document {self.document!r}: one of {', '.join(DOCUMENTS)}")

    @property
    def title(self) -> str:
        return DOCUMENTS[self.document]

    def __str__(self) -> str:
        return f"{self.document} {self.section}".rstrip()
