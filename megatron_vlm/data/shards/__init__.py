"""Indexed binary shards: written, read, verified, shown, exported."""
