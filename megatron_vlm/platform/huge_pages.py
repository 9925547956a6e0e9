"""Memory for large tensors of the CPU in pages of 2 MiB."""

import os


def use_huge_pages() -> None:
    """Let torch ask the system for huge pages for tensors of 2 MiB and more, unless the environment decides it.

    A tensor that is written once and dropped, as in a conversion, otherwise costs more in page faults than in copying.
    Call it before the first large tensor is made: torch reads the variable then, once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
