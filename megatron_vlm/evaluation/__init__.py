"""Answering prompts with a trained model, and scoring the answers on benchmarks."""
