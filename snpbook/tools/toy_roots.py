"""Makes `data/roots/toy` and its pins: the toy authorities of each product line for SNP, of each product for SEV.

A key that is there is kept, a missing one is drawn at random; certificates and pins follow from the keys, so a
second run changes nothing. Deleting a key makes new roots, and evidence made with the old ones stops verifying.
Run as `python -m snpbook.tools.toy_roots`.
"""

from hashlib import sha256
from pathlib import Path
from ssl import DER_cert_to_PEM_cert

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from snpbook.spec.certificates import PRODUCT_LINES, RSA_BITS, RSA_EXPONENT
from snpbook.spec.products import product_names
from snpbook.spec.resources import resource
from snpbook.spec.sev_certificates import CertUsage
from snpbook.vendor.certificates import ca_certificate
from snpbook.vendor.sev_ca import amd_certificate

_PINS_HEADER = """\
# The toy roots: AMD's names, keys that everybody knows. SHA-256 of each ARK's DER, by product line.
# Written by snpbook.tools.toy_roots.

"""

_SEV_PINS_HEADER = """\
# The toy roots of SEV and SEV-ES. SHA-256 of each ARK certificate in AMD's own format, by product.
# Written by snpbook.tools.toy_roots.

"""
SEV_RSA_BITS = {"naples": 2048}


def make(roots: Path) -> None:
    """Bring the folder `roots` (the one that holds `toy`) up to date with the keys in it."""
    (roots / "toy").mkdir(exist_ok=True)
    pins = []
    for product, line in PRODUCT_LINES.items():
        keys = {role: _key(roots / "toy" / f"toy_{product}_{role}.key.pem") for role in ("ark", "ask", "asvk")}
        for role, facts in (("ark", line.ark), ("ask", line.ask), ("asvk", line.asvk)):
            der = ca_certificate(line, facts, keys[role].public_key(), keys["ark"])
            (roots / "toy" / f"toy_{product}_{role}.pem").write_text(DER_cert_to_PEM_cert(der))
            if role == "ark":
                pins.append(f'{product} = "{sha256(der).hexdigest()}"\n')
    (roots / "toy.toml").write_text(_PINS_HEADER + "".join(pins))

    make_sev(roots)


def make_sev(roots: Path) -> None:
    """The same for SEV: from Milan on with the keys of SNP's authorities."""
    pins = []
    for product in product_names():
        bits = SEV_RSA_BITS.get(product, RSA_BITS)
        ark, ask = (_key(roots / "toy" / f"toy_{product}_{role}.key.pem", bits) for role in ("ark", "ask"))
        for role, usage, key in (("ark", CertUsage.ARK, ark), ("ask", CertUsage.ASK, ask)):
            cert = amd_certificate(usage, key.public_key(), ark)
            (roots / "toy" / f"toy_{product}_sev_{role}.cert").write_bytes(cert)
            if role == "ark":
                pins.append(f'{product} = "{sha256(cert).hexdigest()}"\n')
    (roots / "toy_sev.toml").write_text(_SEV_PINS_HEADER + "".join(pins))


def _key(path: Path, bits: int = RSA_BITS) -> rsa.RSAPrivateKey:
    if not path.exists():
        new = rsa.generate_private_key(RSA_EXPONENT, bits)
        path.write_bytes(new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError(f"{path} holds no RSA key: delete it to have one made")
    return key


if __name__ == "__main__":
    make(resource("data", "roots"))
