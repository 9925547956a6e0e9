"""How quantised weights lie in files, a module each; see `convert/quantize/layout.py` for what it offers."""
