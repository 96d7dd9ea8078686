"""`python -m snpbook`: the command line without the installed script, as `snpbook lab` and the tests start it."""

import sys

from snpbook.cli.main import main

sys.exit(main())
