"""The workshop of the project: notebooks are built and checked here, data and pictures made, speed measured.

Each module is a program, run as `python -m snpbook.tools.NAME` from a clone; nothing else imports them.
"""
