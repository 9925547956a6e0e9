"""Export formats that are no folder of a whole model in transformers; `convert/export.py` lists what a module offers.

Those that are, are the families of whole models in `convert/families/`.
"""
