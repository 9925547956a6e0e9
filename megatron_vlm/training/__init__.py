"""Training: the loop and its step, objectives, hooks, optimizer and state."""
