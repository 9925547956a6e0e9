"""Start the ranks of a job, supervise them, and report how the job ended."""
