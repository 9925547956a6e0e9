"""Weights, tokenizers and processors from Hugging Face checkpoints to those of a run, and back."""
