"""`python -m snpbook.tools.bench`: is the model still as fast as it can be? Each answer is a ratio inside one run.

A row compares a candidate of ours with a reference on the same machine at the same time, so that its gate holds on
slow and fast machines alike. A part of the model has one module here with its `ROWS`; `__main__` lists the modules.
"""
