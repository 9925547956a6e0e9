"""Benchmarks, one file each; `evaluation/task.py` says which functions a file offers."""
