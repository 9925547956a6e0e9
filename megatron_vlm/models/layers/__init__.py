"""Layers used by several parts of the model."""
