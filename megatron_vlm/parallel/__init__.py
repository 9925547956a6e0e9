"""The job: process groups, decisions of the first rank, and the slice of a batch that a rank computes."""
