"""Durable files, locks and the run folder."""
