"""Planned rows to micro-batches of tensors."""
