"""The kernel's driver of the secure processor: mailbox, pages lent to the firmware, platform, and /dev/sev.

One driver, told in the order in which its parts stand on each other: `mailbox`, `pages`, `driver` (one command),
`guests` (what KVM asks), `initialisation`, `platform` (the whole, `Ccp`), `device` (the file). Sources: Linux 6.12
drivers/crypto/ccp/sev-dev.c, RFC v7 patches 24 to 32.
"""

from snpbook.host.ccp.mailbox import CommandRefused, Parameters
from snpbook.host.ccp.platform import Ccp

__all__ = ["Ccp", "CommandRefused", "Parameters"]
