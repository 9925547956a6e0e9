"""Keep the best or a fixed number of records of raw corpora."""
