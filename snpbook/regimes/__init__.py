"""Experiments with guests: each back end of private memory side by side, what hosts can do to it, what boots cost.

Each experiment builds a machine, runs it, and returns what it found as a value; nothing here is computed from a rule.
The back ends themselves are in `snpbook.host.kvm`, and which kind of guest has which in `snpbook.spec.private_memory`.
"""
