"""The silicon: DRAM, the memory encryption engine, the reverse map table and the instructions that use them.

All state that the machine keeps in memory lives in simulated DRAM, as bytes; Python objects hold registers and fuses.
Hosts, guests and devices reach it through ports bound to one of them, never from the side.
"""
