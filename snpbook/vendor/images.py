"""AMD as the maker of firmware: images signed with the toy key, which a model's secure processor loads (MODEL)."""

from __future__ import annotations

from snpbook.firmware.keys import firmware_signing_key, sign
from snpbook.spec.firmware_image import IMAGE_HEADER, IMAGE_SIGNATURE, ImageType
from snpbook.spec.releases import Release


def firmware_image(
    product: str,
    release: Release,
    *,
    build: int,
    svn: int,
    size: int = 4096,
    kind: ImageType = ImageType.SEV,
    memory: int = 0,
    refuses_state: bool = False,
) -> bytes:
    """A signed image of `size` bytes: a release of the ABI for a product, with SNP's security version."""
    major, minor = release.revision
    header = IMAGE_HEADER.pack(
        type=kind,
        length=size,
        product=product.encode().ljust(IMAGE_HEADER.fields["product"].size, b"\0"),
        revision_major=major,
        revision_minor=minor,
        build=build,
        svn=svn,
        memory=memory,
        refuses_state=refuses_state,
    )
    signed = header.ljust(size - IMAGE_SIGNATURE.size, b"\0")
    r, s = sign(firmware_signing_key(), signed)
    return signed + IMAGE_SIGNATURE.pack(r=r, s=s)
