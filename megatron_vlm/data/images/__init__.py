"""Image files: what they hold, and whether they are sound."""
