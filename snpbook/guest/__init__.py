"""The guest: page acceptance, the #VC handler, the GHCB protocol and the attestation driver.

It trusts its own encrypted memory and the secure processor, and treats every answer of the host as an attack.
It reaches the machine only through its CPU.
"""
