"""From planned rows to micro-batches of tensors."""
