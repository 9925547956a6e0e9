"""Which samples stand in which row of which global batch, from lengths alone."""
