"""What a run holds and costs: pure arithmetic on settings and lengths."""
