"""Layers that the parts of the model share."""
