"""A small SVSM: the software at VMPL0 that validates pages, makes processors and attests for a guest at VMPL2.

It trusts neither side: its host may lie and not run it, its guest may ask for anything. `program` is what runs.
Sources: Secure VM Service Module for SEV-SNP Guests (58019); COCONUT-SVSM, whose checks these are.
"""
