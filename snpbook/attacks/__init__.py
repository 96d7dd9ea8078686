"""The malicious host: what it can try against a guest, and what the machine answers.

Attacks use the powers of host and hardware and nothing else: a probe at DRAM, and a hypervisor that tampers with what
its guest sees. The package will hold the published attacks and the comparison of SEV, SEV-ES and SEV-SNP with each cell
computed by an experiment.
"""
