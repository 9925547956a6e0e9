"""Load the micro-batches of one rank; the position of a run is one integer, the iteration."""

import functools
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_vlm.config import DataError, UserError
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.loading.collate import Collation, collate
from megatron_vlm.data.loading.reader import SampleReader
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.platform.launch.job_folder import keep_helpers_in, make_helpers_folder
from megatron_vlm.platform.launch.launch import STOP_SIGNALS
from megatron_vlm.platform.launch.parent import die_with_parent

_WHOLE_BATCH = RankSlice()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderWorkers:
    """Settings of the processes that load micro-batches."""

    num_workers: int = 0
    """Decoding processes; 0 decodes in this process."""
    prefetch_factor: int = 2
    """Micro-batches each worker keeps ready."""
    pin_memory: bool = False
    """Return page-locked tensors, for copies to a GPU."""


class BatchLoader:
    """Iterate over the micro-batches of one data-parallel rank, from an iteration until the plan ends.

    Which samples a global batch holds depends only on the plan; `RankSlice` says which of its rows this rank has.

    Args:
        datasets: those that the plan was built from.
        plan: rows of samples.
        collation: sizes and ids of the model.
        quarantine: ids of samples to leave out.
        start_iteration: global batches already consumed.
        rank_slice: rows, images and positions of this rank; by default all.
        workers: processes that decode ahead; by default none.
        by_sample: let `label_datasets` count the distinct samples of the global batch, ascending, instead of datasets:
            losses by dataset then are losses by sample.

    Raises:
        ValueError: the global batch does not divide over the ranks and micro-batches.
    """

    def __init__(
        self,
        datasets: Sequence[ShardedDataset],
        plan: Plan,
        *,
        collation: Collation,
        quarantine: Set[int] = frozenset(),
        start_iteration: int = 0,
        rank_slice: RankSlice = _WHOLE_BATCH,
        workers: LoaderWorkers = LoaderWorkers(),
        by_sample: bool = False,
    ) -> None:
        rows = plan.settings.global_batch_size
        rows_at_once = rank_slice.data_parallel_size * rank_slice.micro_batch_size
        if rows % rows_at_once:
            raise ValueError(
                f"global batch of {rows} rows is not a multiple of data_parallel_size * micro_batch_size = "
                f"{rank_slice.data_parallel_size} * {rank_slice.micro_batch_size}"
            )
        self.plan = plan
        self.num_micro_batches = rows // rows_at_once
        """Micro-batches of this rank in one iteration."""
        first = start_iteration * self.num_micro_batches
        last = plan.num_iterations * self.num_micro_batches
        self._positions = range(first, max(first, last))
        reader = SampleReader(
            datasets, plan, collation.image_tokens, quarantine, keeps_damaged_images=collation.replaces_bad_images
        )
        self._micro_batches = _MicroBatches(
            reader, plan, collation, rank_slice, self.num_micro_batches, by_sample=by_sample
        )
        self._next = 0
        self._batches = self._start(workers)

    @property
    def iteration(self) -> int:
        """Iteration that the next micro-batch belongs to."""
        return (self._positions.start + self._next) // self.num_micro_batches

    def __iter__(self) -> Iterator[VLMBatch]:
        return self

    def __next__(self) -> VLMBatch:
        """Return the next micro-batch.

        Raises:
            StopIteration: the plan has ended.
            DataError: a sample cannot be read, or a worker died; names dataset, shard and sample.
            RuntimeError: loading failed for a reason other than the data; contains the traceback.
        """
        if self._next == len(self._positions):
            raise StopIteration
        try:
            batch = next(self._batches)
        except UserError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # This is how torch reports a dead worker; a failed transfer of tensors raises OSError or EOFError.
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            sample = self._micro_batches.describe(self._positions[self._next])
            raise DataError(
                f"a data loader worker died: {first_line}",
                where=f"iteration {self.iteration}, at or after {sample}",
                fix="if memory ran out, lower data.num_workers or data.prefetch_factor; otherwise check that sample",
            ) from error
        if isinstance(batch, UserError):
            raise batch
        if isinstance(batch, _Crash):
            raise RuntimeError(f"data loading failed at {batch.where}\n{batch.traceback}")
        self._next += 1
        return batch

    def close(self) -> None:
        """End the workers; also done when the loader is collected and when the process exits."""
        self._finalizer()

    def _start(self, workers: LoaderWorkers) -> Iterator[Any]:
        # torch's SIGCHLD handler would raise anywhere in the main thread, even in the middle of a training step.
        # Without it, a dead worker is noticed when its batch is due.
        handler = signal.getsignal(signal.SIGCHLD)
        folder = make_helpers_folder() if workers.num_workers else None
        with warnings.catch_warnings():
            # The number of workers is the user's choice, even above the number of cores.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                self._micro_batches,
                batch_size=None,
                sampler=self._positions,
                collate_fn=lambda batch: batch,
                num_workers=workers.num_workers,
                prefetch_factor=workers.prefetch_factor if workers.num_workers else None,
                worker_init_fn=functools.partial(_prepare_worker, os.getpid(), folder),
                multiprocessing_context="fork" if workers.num_workers else None,
                pin_memory=workers.pin_memory,
                # Its own generator: a draw from the default one would make resumed runs differ.
                generator=torch.Generator(),
            )
            iterator = iter(loader)
        if workers.num_workers and signal.getsignal(signal.SIGCHLD) is not handler and handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        self._finalizer = weakref.finalize(self, _kill_workers, iterator, folder)
        return iterator


@dataclass(frozen=True, slots=True)
class _Crash:
    """A bug in this package; its traceback passes from worker to trainer as text."""

    where: str
    traceback: str


class _MicroBatches(Dataset):
    """Random access to the micro-batches of one rank; runs in the workers."""

    def __init__(
        self,
        reader: SampleReader,
        plan: Plan,
        collation: Collation,
        rank_slice: RankSlice,
        num_micro_batches: int,
        *,
        by_sample: bool,
    ) -> None:
        self.reader, self.plan, self.collation = reader, plan, collation
        self.rank_slice, self.num_micro_batches, self.by_sample = rank_slice, num_micro_batches, by_sample

    def __getitem__(self, position: int) -> VLMBatch | UserError | _Crash:
        # Errors are returned: torch would wrap a raised one in its own message with a traceback.
        sample_id = None
        try:
            rows = []
            for row in self._rows(position):
                rows.append([self.reader.read(sample_id := int(value)) for value in self.plan.row(row)])
            iteration = position // self.num_micro_batches
            if self.by_sample:
                samples = np.unique(self.plan.sample_ids(iteration))
                rows = [[replace(one, dataset=int(np.searchsorted(samples, one.sample_id))) for one in r] for r in rows]
            seq_length = self.plan.seq_length(iteration)
            collation = replace(self.collation, seq_length=seq_length)
            return collate(rows, collation, self.rank_slice.image_share, self.rank_slice.context_share)
        except UserError as error:
            return error
        except OSError as error:
            return DataError(
                f"sample cannot be read: {error}", where=self._where(position, sample_id), fix="run data verify on it"
            )
        except Exception:
            return _Crash(self._where(position, sample_id), traceback.format_exc())

    def _where(self, position: int, sample_id: int | None) -> str:
        return self.reader.describe(sample_id) if sample_id is not None else f"micro-batch {position}"

    def describe(self, position: int) -> str:
        """Name the first sample of a micro-batch."""
        first = next((int(sample_id) for row in self._rows(position) for sample_id in self.plan.row(row)), None)
        return self._where(position, first)

    def _rows(self, position: int) -> list[int]:
        """Return the rows of this rank's micro-batch `position`, both counted over all iterations."""
        iteration, index = divmod(position, self.num_micro_batches)
        first = iteration * self.plan.settings.global_batch_size
        return [first + row for row in self.rank_slice.rows(index)]


def _prepare_worker(parent: int, folder: Path | None, worker: int) -> None:
    # They may reach every process of the job, but the trainer needs batches for one more step before it saves.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _note_error
    keep_helpers_in(folder)
    die_with_parent(parent)


def _note_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # multiprocessing's thread that hands tensors over tells only this hook that the trainer broke a connection off:
    # the trainer was killed, and so will be this process, or it lives and raises an error of its own.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main or not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _kill_workers(iterator: Any, folder: Path | None) -> None:
    # They ignore the SIGTERM that multiprocessing sends at exit before it waits for them without a time limit.
    workers = getattr(iterator, "_workers", [])
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=5)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # sockets, which a process that is killed leaves
    # torch sets this event next. Its own has a lock: if a worker was killed while it held that, torch would wait for
    # ever, because it counts on its handler of SIGCHLD to break that off.
    iterator._workers_done_event = threading.Event()
