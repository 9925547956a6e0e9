"""Whole models: `model: {preset: NAME}`."""
