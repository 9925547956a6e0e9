"""Vision towers: `model: {vision: {preset: NAME}}`."""
