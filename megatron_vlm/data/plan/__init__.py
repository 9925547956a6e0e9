"""Which samples stand in which row of which global batch, decided from their lengths."""
