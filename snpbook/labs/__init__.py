"""What a notebook imports: machines, views and widgets put together for one chapter.

Thin composition without logic of its own; here seeds and clocks get their values, below they are parameters.
"""
