"""Threads of libraries that a worker process should not start."""

import os


def keep_tokenizers_in_one_thread() -> None:
    """Let the package `tokenizers` encode in the thread that calls it.

    It otherwise starts a thread per core. Every worker of `prepare` would do that, and a fork while they run can leave
    a lock locked in the child. The package reads this variable at every call.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
