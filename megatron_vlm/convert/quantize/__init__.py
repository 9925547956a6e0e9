"""Weights of the decoder in 4 bits: activation statistics of a text, searches for scales and bounds, and layouts."""
