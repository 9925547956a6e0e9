"""Parameters, memory, operations and time of a run: arithmetic on settings and sample lengths, without torch."""
