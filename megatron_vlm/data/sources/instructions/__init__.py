"""Instruction data, with and without images."""
