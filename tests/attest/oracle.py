"""sev-snp-measure as an independent oracle: its own command line, run in this process."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from sevsnpmeasure import cli


def measure(arguments: Sequence[str]) -> str | None:
    """The standard output of `sev-snp-measure`; None where it refuses, in whatever way."""
    output = io.StringIO()
    with (
        patch.object(sys, "argv", ["sev-snp-measure", *arguments]),
        redirect_stdout(output),
        redirect_stderr(io.StringIO()),
    ):
        try:
            code = cli.main()
        except (Exception, SystemExit):  # noqa: BLE001  it refuses by traceback, assertion or exit
            return None
    return output.getvalue() if code == 0 else None
