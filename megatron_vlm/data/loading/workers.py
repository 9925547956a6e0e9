"""The processes that load micro-batches: none is waited for that cannot start, and none is left."""

import functools
import logging
import mmap
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_vlm.config import DataError
from megatron_vlm.data.loading.handover import Parcel
from megatron_vlm.platform.launch.job_folder import keep_helpers_in, make_helpers_folder
from megatron_vlm.platform.launch.launch import STOP_SIGNALS
from megatron_vlm.platform.launch.parent import die_with_parent

logger = logging.getLogger(__name__)
_START_SECONDS = 10.0
"""For the workers to start; twice as long at each further attempt."""
_MAX_ATTEMPTS = 4
_LOOK_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderWorkers:
    """Settings of the processes that load micro-batches."""

    num_workers: int = 0
    """Decoding processes; 0 decodes in this process."""
    prefetch_factor: int = 2
    """Micro-batches each worker keeps ready."""
    pin_memory: bool = False
    """Return page-locked tensors, for copies to a GPU."""


def start_loading(
    dataset: Dataset, positions: Sequence[int], workers: LoaderWorkers
) -> tuple[Iterator[Any], Callable[[], None]]:
    """Start to load the items of a dataset, and return them and what ends the workers.

    A process that is forked while another thread holds a lock may wait for that lock for ever. One of these locks is
    Python's own, before 3.10.15, 3.11.10 and 3.12 (python/cpython#112275), and gloo's threads take it after a
    collective: of some thousand workers, one never starts. So each tells that it has; the others are forked again.

    Args:
        dataset: random access to micro-batches.
        positions: of those to load, in order.
        workers: who loads them.

    Raises:
        DataError: no attempt has started all workers.
    """
    if not workers.num_workers:
        return _iterate(dataset, positions, workers, None), lambda: None
    for attempt in range(_MAX_ATTEMPTS):
        seconds = _START_SECONDS * 2**attempt
        folder, started = make_helpers_folder(), mmap.mmap(-1, workers.num_workers)
        iterator = _iterate(dataset, positions, workers, functools.partial(_prepare, os.getpid(), folder, started))
        end = functools.partial(_end, iterator, folder)
        if _have_started(iterator, started, seconds):
            return iterator, end
        end()
        logger.warning("a data loader worker did not start in %.0f s; all are started again", seconds)
    raise DataError(
        f"data loader workers do not start, after {_MAX_ATTEMPTS} attempts",
        where=f"{workers.num_workers} workers, the last attempt took {seconds:.0f} s",
        fix="lower data.num_workers; with 0, each rank decodes its images itself",
    )


def _iterate(
    dataset: Dataset, positions: Sequence[int], workers: LoaderWorkers, prepare: Callable[[int], None] | None
) -> Any:
    # torch's SIGCHLD handler would raise anywhere in the main thread, even in the middle of a training step.
    # Without it, a dead worker is noticed when its batch is due.
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # The number of workers is the user's choice, even above the number of cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            collate_fn=_pack if workers.num_workers else lambda item: item,
            num_workers=workers.num_workers,
            prefetch_factor=workers.prefetch_factor if workers.num_workers else None,
            worker_init_fn=prepare,
            multiprocessing_context="fork" if workers.num_workers else None,
            pin_memory=workers.pin_memory,
            # Its own generator: a draw from the default one would make resumed runs differ.
            generator=torch.Generator(),
        )
        iterator = iter(loader)
    if workers.num_workers and signal.getsignal(signal.SIGCHLD) is not handler and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _prepare(parent: int, folder: Path, started: mmap.mmap, worker: int) -> None:
    started[worker] = 1
    # They may reach every process of the job, but the trainer needs batches for one more step before it saves.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _note_error
    keep_helpers_in(folder)
    die_with_parent(parent)


def _pack(item: Any) -> Parcel:
    try:
        return Parcel(item)
    except OSError as error:
        what = f"a micro-batch cannot be handed to the trainer: {error.strerror}"
        return Parcel(DataError(what, where="data loader worker", fix="lower data.num_workers or data.prefetch_factor"))


def _have_started(iterator: Any, started: mmap.mmap, seconds: float) -> bool:
    """Return whether all workers start in time; one that is dead already is noticed when its batch is due."""
    deadline = time.monotonic() + seconds
    while not all(flag or not worker.is_alive() for flag, worker in zip(started[:], iterator._workers, strict=True)):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _note_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # multiprocessing's thread that hands tensors over tells only this hook that the trainer broke a connection off:
    # the trainer was killed, and so will be this process, or it lives and raises an error of its own.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main or not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end(iterator: Any, folder: Path) -> None:
    # They ignore the SIGTERM that multiprocessing sends at exit before it waits for them without a time limit.
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join(timeout=5)
    shutil.rmtree(folder, ignore_errors=True)  # sockets, which a process that is killed leaves
    # torch sets this event next. Its own has a lock: if a worker was killed while it held that, torch would wait for
    # ever, because it counts on its handler of SIGCHLD to break that off.
    iterator._workers_done_event = threading.Event()
