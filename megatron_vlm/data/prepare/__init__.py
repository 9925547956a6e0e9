"""Raw corpora to shards."""
