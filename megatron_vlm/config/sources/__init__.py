"""Kinds of corpora that `prepare` reads, one file each, found by name; `data/sources/<kind>` reads them.

Each file has HELP (one line), EXAMPLE (a command), NOTES (more help, may be empty) and a frozen dataclass `Options`
with the names of `config.prepare.KindOptions`.
"""
