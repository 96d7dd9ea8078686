"""Many reports at once: a NumPy column for each field, each flag and each component of a TCB.

For a look over a fleet, not for trust: `verify` judges one report at a time. Source: SNP ABI (ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snpbook.spec.policy import PLATFORM_INFO, POLICY, Tcb
from snpbook.spec.report import ATTESTATION_REPORT, CPUID_PRODUCTS, FIELDS_SINCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

TURIN = "turin"


def report_columns(reports: Sequence[bytes]) -> dict[str, NDArray[Any]]:
    """The fields of reports of 1184 bytes each, in order; `ValueError` names one of another length.

    Beside each field: the flags of `policy` and `platform_info` as `policy.debug` etc., the components of a TCB as
    `reported_tcb.snp` etc. (`fmc` 0 where there is none), and `product` (empty where a report names none). Integers
    keep their widths, bytes are one row of uint8 a report. A field that a report's version lacks is 0.
    """
    import numpy as np

    layout = ATTESTATION_REPORT
    odd = next((index for index, report in enumerate(reports) if len(report) != layout.size), None)
    if odd is not None:
        raise ValueError(f"report {odd} has {len(reports[odd])} bytes, not {layout.size}")
    records = np.frombuffer(b"".join(reports), dtype=layout.dtype)
    columns = layout.columns(records)
    for name, since in FIELDS_SINCE.items():
        columns[name] = np.where(columns["version"] >= since, columns[name], 0).astype(columns[name].dtype)
    for word, parts in (("policy", POLICY), ("platform_info", PLATFORM_INFO)):
        for field in parts.fields.values():
            columns[f"{word}.{field.name}"] = (columns[word] >> np.uint64(field.first_bit)) & np.uint64(field.limit)

    product = np.full(len(records), "", dtype="U8")
    for (family, models), name in CPUID_PRODUCTS.items():
        named = (columns["cpuid_family"] == family) & (columns["cpuid_model"] >= models.start)
        product[
            named & (columns["cpuid_model"] < models.stop) & (columns["version"] >= FIELDS_SINCE["cpuid_family"])
        ] = name
    columns["product"] = product
    for name in [name for name in layout.fields if name.endswith("_tcb")]:
        octets = np.ascontiguousarray(records[name]).view(np.uint8).reshape(-1, 8)
        for component in Tcb.__slots__:
            new, old = (_place(component, turin) for turin in (True, False))
            late = octets[:, new] if new is not None else np.zeros(len(records), np.uint8)
            early = octets[:, old] if old is not None else np.zeros(len(records), np.uint8)
            columns[f"{name}.{component}"] = np.where(product == TURIN, late, early)
    return columns


def _place(component: str, turin: bool) -> int | None:
    """The byte of a TCB_VERSION that holds a component."""
    for place in range(8):
        if getattr(Tcb.from_int(1 << 8 * place, turin), component):
            return place
    return None
