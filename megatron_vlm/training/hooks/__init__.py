"""Hooks, one file each; a file offers the class `Hook` of the protocol in `training/hook.py`.

`training.hooks` in the settings may name those that have a file in `config/hooks/`; the others are always active.
"""
