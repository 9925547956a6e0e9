"""Answers of a trained model: generation, and the scores of benchmarks."""
