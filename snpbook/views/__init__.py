"""Pure renderers: from the state of a machine to HTML, SVG and text.

A view reads state and returns a string, the same for the same state, so that notebooks can be compared byte by byte.
Nothing here knows of ipywidgets, plotly or IPython, and each picture has a twin in words.
"""
