"""Run many tasks in several processes, with a progress bar; a killed worker is noticed."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from megatron_vlm.config import StorageError
from megatron_vlm.platform.launch.parent import die_with_parent

_POLL_SECONDS = 0.5
_worker_counters: Any = None
"""In a worker process: numbers of things done and rejected, shared with the process that shows them."""


Report = Callable[[int, int], None]
"""Tells how many more things a task has done, and how many of them it has rejected."""


class Engine(Protocol):
    """Runs tasks: `run_tasks` with a number of workers, or a cluster."""

    def __call__(self, function: Callable, tasks: Sequence[tuple], *, unit: str, reports: bool = False) -> list[Any]:
        """Call `function(*task)` for each task and return the results in order; see `run_tasks`."""


def run_tasks(
    function: Callable, tasks: Sequence[tuple], *, num_workers: int, unit: str, reports: bool = False
) -> list[Any]:
    """Call `function(*task)` for each task and return the results in order.

    Args:
        function: importable by name. With `reports`, it gets a `Report` as its last argument.
        tasks: arguments; picklable.
        num_workers: processes; with 1, everything runs in this process.
        unit: unit of the progress bar.
        reports: whether `function` reports its progress; otherwise finished tasks are counted.

    Raises:
        StorageError: a worker was killed.
    """
    with tqdm(unit=f" {unit}", disable=None, mininterval=_POLL_SECONDS) as bar:
        if min(num_workers, len(tasks)) <= 1:
            return [_run_here(function, task, bar, reports) for task in tasks]
        return _run_in_pool(function, tasks, min(num_workers, len(tasks)), bar, reports)


def _run_here(function: Callable, task: tuple, bar: tqdm, reports: bool) -> Any:
    if not reports:
        result = function(*task)
        bar.update()
        return result
    rejected = 0

    def report(done: int, rejects: int) -> None:
        nonlocal rejected
        rejected += rejects
        bar.set_postfix(rejects=rejected, refresh=False)
        bar.update(done)

    return function(*task, report)


def _run_in_pool(function: Callable, tasks: Sequence[tuple], num_workers: int, bar: tqdm, reports: bool) -> list[Any]:
    # spawn, not fork: pyarrow and sentencepiece have threads, and a lock that is held during a fork stays locked.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    with (
        ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_start_worker, initargs=(counters, os.getpid())
        ) as pool,
        _ended_by_interrupt(pool),
    ):
        futures = [pool.submit(_call, function, task, reports) for task in tasks]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            if reports:
                bar.set_postfix(rejects=counters[1], refresh=False)
            bar.update((counters[0] if reports else len(tasks) - len(pending)) - bar.n)
            if error := next(filter(None, (future.exception() for future in finished)), None):
                pool.shutdown(wait=False, cancel_futures=True)
                raise _explain(error)
        return [future.result() for future in futures]


@contextmanager
def _ended_by_interrupt(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Terminate the workers on Ctrl-C; leaving the pool would wait for their current tasks."""
    others = set(multiprocessing.active_children())  # the pool starts its workers with the first task
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise


def _explain(error: BaseException) -> BaseException:
    if isinstance(error, BrokenProcessPool):
        return StorageError(
            "a worker process was killed, perhaps for lack of memory",
            fix="run the same command again, with fewer --workers if memory is short; finished input files are kept",
        )
    return error


def _start_worker(counters: Any, parent: int) -> None:
    global _worker_counters
    _worker_counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C for all
    die_with_parent(parent)


def _call(function: Callable, task: tuple, reports: bool) -> Any:
    return function(*task, _report) if reports else function(*task)


def _report(done: int, rejects: int) -> None:
    with _worker_counters.get_lock():
        _worker_counters[0] += done
        _worker_counters[1] += rejects
