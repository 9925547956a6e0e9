"""Conversion of projections: each module converts the projection of the same name in `config/projectors/`.

`convert/projector.py` lists the functions of a module.
"""
