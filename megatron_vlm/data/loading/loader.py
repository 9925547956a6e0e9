"""Load the micro-batches of one rank; the position of a run is one integer, the iteration."""

import traceback
import weakref
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from megatron_vlm.config import DataError, UserError
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.loading.collate import Collation, collate
from megatron_vlm.data.loading.reader import SampleReader
from megatron_vlm.data.loading.workers import LoaderWorkers, start_loading
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.parallel.slicing import RankSlice

_WHOLE_BATCH, _NO_WORKERS = RankSlice(), LoaderWorkers()


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
        DataError: the workers do not start.
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
        workers: LoaderWorkers = _NO_WORKERS,
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
        self._batches, end = start_loading(self._micro_batches, self._positions, workers)
        self._finalizer = weakref.finalize(self, end)

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
