"""Let the first rank act or decide for all; let ranks that work for long see each other."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import _get_default_store

from megatron_vlm.config import UserError

T = TypeVar("T")
R = TypeVar("R")
_FIRST_RANK_TIMEOUT = timedelta(hours=4)
_ROUND_SECONDS = 2.0
_MAX_SILENT_ROUNDS = 1800
"""Rounds in which no rank gets on, until those that are done wait in a collective, which has a time limit."""


def decide_on_main(look: Callable[[], T]) -> T:
    """Call `look` on rank 0, for example to inspect the file system, and return its answer on every rank.

    Raises:
        UserError: `look` raised it; every rank raises it.
    """
    answer: list = list(_outcome(look)) if torch.distributed.get_rank() == 0 else [None, None]
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def together(
    work: Callable[[], T], finish: Callable[[Sequence[T]], R], group: torch.distributed.ProcessGroup | None = None
) -> R:
    """Call `work` on every rank, then `finish` on rank 0 with what all ranks returned; return its answer on every rank.

    Args:
        work: of each rank.
        finish: is not called if the work of a rank failed.
        group: of all ranks; None: the default group.

    Raises:
        UserError: the work of a rank or `finish` raised it; every rank raises it, so that none waits for the others.
    """
    is_main = torch.distributed.get_rank() == 0
    gathered: list | None = [None] * torch.distributed.get_world_size() if is_main else None
    torch.distributed.gather_object(_outcome(work), gathered, dst=0, group=group)
    answer: list = [None, None]
    if gathered is not None:
        error = next((error for _, error in gathered if error is not None), None)
        answer = list(_outcome(lambda: finish([value for value, _ in gathered]))) if error is None else [None, error]
    torch.distributed.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def in_sight(
    work: Callable[[Callable[[], None]], T],
    show_life: Callable[[], object],
    group: torch.distributed.ProcessGroup | None = None,
) -> T:
    """Call `work` on every rank, for however long it takes, and return what it returned on this one.

    It runs in a thread. The calling thread gives signs of life while its own work gets on, and, once that is done,
    while that of another rank does: a rank that waits for one that hangs falls silent like it. No collective waits for
    more than a round.

    Args:
        work: of each rank; calls its argument, from any thread, whenever it gets on.
        show_life: gives a sign of life; called every few seconds at most.
        group: as in `together`.
    """
    progress = seen = num_silent = 0

    def get_on() -> None:
        nonlocal progress
        progress += 1  # threads may count two steps as one

    # Whether it is done, and its progress, of each rank.
    known: list[tuple[bool, int]] = [(False, 0)] * torch.distributed.get_world_size()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work, get_on)
        while num_silent < _MAX_SILENT_ROUNDS:
            wait([future], _ROUND_SECONDS)
            is_done, before, known = future.done(), known, list(known)
            if progress != seen:
                seen = progress
                show_life()
            torch.distributed.all_gather_object(known, (is_done, seen), group=group)
            if all(others_are_done for others_are_done, _ in known):
                break
            num_silent = num_silent + 1 if known == before else 0
            if is_done and known != before:
                show_life()
        return future.result()


def _outcome(call: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return call(), None
    except UserError as error:
        return None, error


@contextmanager
def main_rank_first() -> Iterator[None]:
    """Run the body on rank 0 before all others; every rank raises a UserError of rank 0.

    The others wait at the store through which the ranks met, not in a collective: the body may take longer than
    `parallel.distributed_timeout_minutes`, for example when it packs 30 million samples. They do not wait for a rank 0
    that dies, because the store dies with it.
    """
    rank, store = torch.distributed.get_rank(), _get_default_store()
    # Each rank counts its calls where the count lives as long as the job.
    key = f"main_rank_first/{store.add(f'main_rank_first/calls_of_{rank}', 1)}"
    if rank == 0:
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        store.set(key, pickle.dumps(error).hex())
    else:
        store.wait([key], _FIRST_RANK_TIMEOUT)
        error = pickle.loads(bytes.fromhex(store.get(key).decode()))
    if error is not None:
        raise error
    if rank:
        yield
