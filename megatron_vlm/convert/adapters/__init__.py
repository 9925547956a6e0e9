"""Adapters: each module merges the adapter of the same name in `config/adapters/` into the weights of its base.

`convert/adapter.py` lists the functions of a module. An adapter that no weights of a base can stand for has none.
"""
