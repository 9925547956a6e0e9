"""Checkpoints: save, verify, resume at any layout, retention."""
