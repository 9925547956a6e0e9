"""Decoders: `model: {language: {preset: NAME}}`."""
