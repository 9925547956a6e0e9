"""Training: loop, step, loss, optimizer, schedule, state, metrics."""
