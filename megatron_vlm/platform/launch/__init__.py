"""Start the ranks of a job, watch them, and say how it ended."""
