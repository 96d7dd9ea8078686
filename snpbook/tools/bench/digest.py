"""Rows M: the expected measurement against sev-snp-measure, on Debian's firmware (package ovmf).

In process a side reads the file and computes the digest of a guest with four vCPUs; a command is a whole process,
from its start to its end, and both have their bytecode, as pip leaves an installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from snpbook.attest.measure import snp_digest, vmsa_pages
from snpbook.spec.image import Image
from snpbook.spec.vmsa import VCPU_TYPES
from snpbook.tools.bench.measure import Comparison, NotMeasurableError, Row, at_most

OVMF = "/usr/share/ovmf/OVMF.fd"
CODE_4M = "/usr/share/OVMF/OVMF_CODE_4M.fd"
VCPUS, VCPU_TYPE = 4, "EPYC-Milan"


def require(path: str) -> None:
    """Refuse to measure without the firmware or without the other tool."""
    if not Path(path).is_file():
        raise NotMeasurableError(f"there is no {path}: on Debian, apt install ovmf")
    try:
        import_module("sevsnpmeasure")
    except ImportError:
        raise NotMeasurableError("sev-snp-measure is not installed: make test installs it") from None


def digest(path: str) -> Comparison:
    """Both libraries on one file."""
    require(path)
    guest, mode = import_module("sevsnpmeasure.guest"), import_module("sevsnpmeasure.sev_mode").SevMode.SEV_SNP
    signature = int(VCPU_TYPES[VCPU_TYPE])

    def ours() -> bytes:
        image = Image.parse(Path(path).read_bytes())
        return snp_digest(image, vmsa_pages(image, VCPUS, signature))

    theirs = partial(guest.calc_launch_digest, mode, VCPUS, signature, path, "", "", "", 1)
    if ours() != theirs():
        raise NotMeasurableError(f"the two digests of {path} differ: a fault, and no question of speed")
    return Comparison(theirs, ours)


def command(path: str) -> Comparison:
    """Both commands on one file."""
    require(path)
    options = ["--mode", "snp", "--vcpus", str(VCPUS), "--vcpu-type", VCPU_TYPE, "--ovmf", path]
    scripts = [Path(sys.executable).with_name(name) for name in ("sev-snp-measure", "snpbook")]
    for script in scripts:
        if not script.is_file():
            raise NotMeasurableError(f"there is no command {script}: make test installs it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = partial(subprocess.run, stdout=subprocess.DEVNULL, check=True, env=environment)
    return Comparison(partial(run, [scripts[0], *options]), partial(run, [scripts[1], "measure", *options]))


ROWS = [
    Row("M1", "digest of OVMF.fd : sev-snp-measure", at_most(0.75), partial(digest, OVMF)),
    Row("M2", "digest of OVMF_CODE_4M.fd : sev-snp-measure", at_most(0.6), partial(digest, CODE_4M)),
    Row("M3", "command on OVMF.fd : sev-snp-measure", at_most(1.5), partial(command, OVMF)),
]
