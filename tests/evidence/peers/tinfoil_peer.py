"""Run by the Python that tinfoil is installed for: says of each directory of evidence whether tinfoil accepts it.

Arguments: "real" roots or "toy" ones (then the ARK and ASK of the first directory replace the built-in), directories.
"""

import base64
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tinfoil.attestation import attestation_sev, verify_sev
from tinfoil.attestation.validate_sev import ValidationOptions

roots, *directories = sys.argv[1:]
if roots == "toy":
    for name in ("ark", "ask"):
        der = Path(directories[0], "certs", f"{name}.der").read_bytes()
        setattr(verify_sev, f"{name.upper()}_CERT", x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
for directory in map(Path, directories):
    document = base64.b64encode((directory / "report.bin").read_bytes()).decode()
    vcek = (directory / "certs" / "vcek.der").read_bytes()
    try:
        attestation_sev.verify_sev_report(document, False, ValidationOptions(), vcek)
    except attestation_sev.SevAttestationError as error:
        sys.stderr.write(f"{directory.name} refused: {error}\n")
        sys.stdout.write(f"verdict {directory.name} refused\n")
    else:
        sys.stdout.write(f"verdict {directory.name} accepted\n")
