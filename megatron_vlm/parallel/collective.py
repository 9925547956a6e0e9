"""Let the first rank act or decide for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from megatron_vlm.config import UserError

T = TypeVar("T")


def decide_on_main(look: Callable[[], T]) -> T:
    """Call `look` on rank 0, for example to inspect the file system, and return its answer on every rank.

    Raises:
        UserError: `look` raised it; every rank raises it.
    """
    answer: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = look()
        except UserError as error:
            answer[1] = error
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextmanager
def main_rank_first() -> Iterator[None]:
    """Run the body on rank 0 before all others; every rank raises a UserError of rank 0."""
    is_main = torch.distributed.get_rank() == 0
    error: UserError | None = None
    if is_main:
        try:
            yield
        except UserError as caught:
            error = caught
    box = [error]
    torch.distributed.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise box[0]
    if not is_main:
        yield
