"""Where AMD publishes the certificates of a report: addresses of the key distribution service, nothing fetched.

Source: KDS.
"""

from __future__ import annotations

from snpbook.spec.certificates import KDS_URL, ProductLine
from snpbook.spec.policy import Tcb
from snpbook.spec.report import SigningKey


def chain_url(line: ProductLine, key: SigningKey) -> str:
    """Both CA certificates above a VCEK or VLEK, intermediate first, as PEM."""
    return f"{KDS_URL}/{key.name.lower()}/v1/{line.name}/cert_chain"


def vcek_url(line: ProductLine, chip_id: bytes, tcb: Tcb) -> str:
    """The certificate of one chip's key for one TCB (the reported one), as DER."""
    levels = {"blSPL": tcb.bootloader, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.microcode}
    if tcb.fmc is not None:
        levels = {"fmcSPL": tcb.fmc, **levels}
    query = "&".join(f"{name}={level:02}" for name, level in levels.items())
    return f"{KDS_URL}/vcek/v1/{line.name}/{chip_id[: line.hwid_size].hex()}?{query}"
