"""The facts: layouts, numbers, names and tables, as the published documents give them.

Nothing here behaves: a fact is declared, decoded and cited, and no other package holds an offset or a magic number.
This package imports nothing of snpbook, and every other package may import it.
"""
