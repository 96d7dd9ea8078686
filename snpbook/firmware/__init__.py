"""The secure processor (AMD-SP): its mailbox, its keys, and the SEV-SNP commands with their checks in order.

It trusts neither the host that calls it nor the memory that it is pointed at: each command checks page states first.
A refused command leaves the machine as it was, except for what the specification says changes.
"""
