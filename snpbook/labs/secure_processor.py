"""The chapter on the secure processor: a machine without host software, its mailbox, its states and its launches."""

from __future__ import annotations

import numpy as np

from snpbook.firmware.bench import Bench
from snpbook.firmware.growth import Page
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.pages import PAGE_SIZE, LaunchPage
from snpbook.spec.products import product as find_product
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmsa import BSP_RESET_EIP, INITIAL_VMSA_GPA, reset_vmsa
from snpbook.views.bits import layout_rows
from snpbook.views.mailbox import answers
from snpbook.views.static import Static
from snpbook.widgets.launch_desk import LaunchDesk
from snpbook.widgets.mailbox_console import MailboxConsole
from snpbook.widgets.state_machines import StateMachines
