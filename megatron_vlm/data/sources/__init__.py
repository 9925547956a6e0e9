"""Readers of raw corpora: each yields documents."""
