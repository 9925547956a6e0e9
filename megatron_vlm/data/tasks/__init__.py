"""Run many tasks in processes or on a Ray cluster."""
