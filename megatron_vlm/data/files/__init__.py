"""Files in the formats that corpora come in, on disk or at URLs."""
