"""The live forms of the views: ipywidgets and small anywidgets over the same pure renderers.

A widget can be driven by hand or from Python, and always carries its static twin for paper and for untrusted notebooks.
From this layer up, and only here, notebook libraries may be imported.
"""
