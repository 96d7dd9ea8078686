"""Secure TSC: the frequency that a guest's time-stamp counter is made to have, and MSG_TSC_INFO_REQ.

Source: SNP ABI (SNP_LAUNCH_START, MSG_TSC_INFO_REQ), firmware 1.55.25. Only Genoa's mean reference clock is known.
"""

from __future__ import annotations

from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.spec.payloads import TSC_INFO_REQUEST, TSC_INFO_RESPONSE, TSC_NOMINAL_KHZ, TSC_SCALE_FRACTION_BITS
from snpbook.spec.products import Product
from snpbook.spec.status import Status


def tsc_scale(product: Product, desired_khz: int) -> int:
    """GUEST_TSC_SCALE, 8.32 fixed point: the desired frequency by the mean of the reference clock, rounded up."""
    mean = TSC_NOMINAL_KHZ - product.tsc_factor
    return -(-(desired_khz << TSC_SCALE_FRACTION_BITS) // mean)


def tsc_info_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_TSC_INFO_REQ: scale, offset and factor of the guest's own time-stamp counter."""
    if any(message[: TSC_INFO_REQUEST.size]):
        return TSC_INFO_RESPONSE.pack(status=Status.INVALID_PARAM)
    product = psp.machine.product
    return TSC_INFO_RESPONSE.pack(
        status=Status.SUCCESS,
        tsc_scale=tsc_scale(product, sender.context.desired_tsc_khz),
        tsc_offset=sender.context.tsc_offset,
        tsc_factor=product.tsc_factor,
    )
