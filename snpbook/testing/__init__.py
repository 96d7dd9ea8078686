"""Fakes and fault injectors for teachers and for other people's test suites.

The package will hold a machine with planted faults and a secure processor that fails on demand, so that host logic can
be tried against both; it is empty so far.
"""
