"""Projections: each module converts the one of that name in `config/projectors/`.

`convert/projector.py` says what a module offers.
"""
