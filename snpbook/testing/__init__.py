"""Fakes and fault injectors for teachers and for other people's test suites.

`snpbook.testing.evidence` is a pytest plugin that makes reports, chains and revocation lists to order.
"""
