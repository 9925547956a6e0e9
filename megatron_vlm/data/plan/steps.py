"""Read the datasets of a blend, step by step where it changes, and add their samples to the rows of a plan."""

from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import ConfigError
from megatron_vlm.config.blend import BlendStep, steps_of
from megatron_vlm.data.plan.blend import read_in_epochs, samples_per_pass
from megatron_vlm.data.plan.reading import SourceReader
from megatron_vlm.data.plan.rows import End, RowsSoFar
from megatron_vlm.data.plan.sample_pool import SamplePool
from megatron_vlm.data.plan.settings import PlanSettings


def add_steps(rows: RowsSoFar) -> tuple[int, ...]:
    """Add the rows of all steps of the blend, as far as the training goes.

    The first step reads complete passes of the blend, each shuffled as a whole. Where another step follows, what a
    dataset has left over of the pass that was cut comes first; from there on, no pass of the blend reaches beyond the
    end of a pass of one of its datasets.

    Returns:
        For each step after the first that begins, the iterations before it.

    Raises:
        ConfigError: a step cannot be made from the datasets, or a pass over it has too few samples.
    """
    first, *later = steps_of(rows.settings.blend)
    per_pass = [_per_pass(rows.settings, rows.pool, step) for step in (first, *later)]
    ends = [_begin_of(step) for step in later] + [End()]
    last_pass = _add_first(rows, per_pass[0], ends[0])
    readers: dict[int, SourceReader] = {}
    begins = []
    for number, step in enumerate(later, start=1):
        if rows.has_reached(End()):
            break
        if not readers:
            readers = _readers_after(rows, last_pass)
        begins.append(rows.num_iterations)
        _add_later(rows, readers, step, per_pass[number], number, ends[number])
    return tuple(begins)


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass of the first step: begin and end of the reading of each dataset, and what got into rows."""

    start: list[int]
    stop: list[int]
    consumed: np.ndarray


def _begin_of(step: BlendStep) -> End:
    return End(iteration=None if step.from_iteration is None else step.from_iteration - 1, tokens=step.from_tokens)


def _seed_of(settings: PlanSettings, dataset: int) -> tuple[int, ...]:
    return settings.seed, 0, dataset


def _per_pass(settings: PlanSettings, pool: SamplePool, step: BlendStep) -> np.ndarray:
    """Return the samples of each entry in a pass over the step."""
    sizes = [len(pool.usable[dataset]) for dataset in step.datasets]
    images = [int(pool.num_images[pool.usable[dataset]].sum(dtype=np.int64)) for dataset in step.datasets]
    per_pass = samples_per_pass(step.entries, sizes, images)
    _check_pass(settings, step, per_pass)
    return per_pass


def _check_pass(settings: PlanSettings, step: BlendStep, per_pass: np.ndarray) -> None:
    """Reject passes that are nearly empty, of which a training of train_iters would need millions.

    Raises:
        ConfigError: a pass has less than one sample, or reads only a fraction of every dataset and fills no batch.
    """
    samples = float(per_pass.sum())
    is_partial = settings.train_iters is not None and all((entry.epochs or 1.0) < 1 for entry in step.entries)
    least = settings.global_batch_size if is_partial else 1
    if samples < least:
        raise ConfigError(
            f"a pass over data.blend has {samples:.3g} samples, fewer than {least}",
            fix=f"multiply the epochs of the entries by {least / samples:.3g} or more",
        )


def _add_first(rows: RowsSoFar, per_pass: np.ndarray, end: End) -> _Pass:
    """Add passes of the first step until its end; return the last one."""
    settings, epochs = rows.settings, rows.settings.train_epochs
    last = _Pass([], [], np.empty(0, dtype=np.int64))
    while not rows.has_reached(end) and (epochs is None or rows.num_passes < epochs):
        number = rows.num_passes
        stop_at = number + 1.0 if epochs is None else min(number + 1.0, epochs)
        start, stop = ([round(float(value)) for value in factor * per_pass] for factor in (number, stop_at))
        rng = np.random.default_rng([settings.seed, 1, number])
        last = _Pass(start, stop, rows.add(_samples_of_pass(rows, start, stop), rng, end))
        rows.num_passes += 1
        if stop_at == rows.num_passes:
            rows.stable_rows = rows.num_rows
    return last


def _samples_of_pass(rows: RowsSoFar, start: list[int], stop: list[int]) -> np.ndarray:
    """Return the global ids of one pass; consecutive passes read every dataset in complete epochs."""
    samples = []
    for index, (first, last) in enumerate(zip(start, stop, strict=True)):
        ids = rows.pool.usable[index]
        samples.append(ids[read_in_epochs(len(ids), first, last, _seed_of(rows.settings, index))])
    return np.concatenate(samples)


def _readers_after(rows: RowsSoFar, last: _Pass) -> dict[int, SourceReader]:
    """Return the readers of the datasets of the first step, of which a pass may be cut."""
    consumed = np.bincount(last.consumed, minlength=len(rows.pool.lengths))
    return {
        index: SourceReader.after(rows.pool.usable[index], _seed_of(rows.settings, index), window, consumed)
        for index, window in enumerate(zip(last.start, last.stop, strict=True))
    }


def _add_later(
    rows: RowsSoFar, readers: dict[int, SourceReader], step: BlendStep, per_pass: np.ndarray, number: int, end: End
) -> None:
    """Add the rows of a step until its end, from where the readers stand."""
    for dataset in step.datasets:
        if dataset not in readers:
            readers[dataset] = SourceReader(rows.pool.usable[dataset], _seed_of(rows.settings, dataset))
    mine = [readers[dataset] for dataset in step.datasets]
    done, read, part = 0.0, np.zeros(len(mine), dtype=np.int64), 0
    while not rows.has_reached(end):
        left = np.array([reader.left() for reader in mine])
        # In passes of the step: where each dataset is through.
        through = (read + left) / per_pass
        stop = min(np.floor(done) + 1.0, float(through.min()))
        counts = np.clip(np.rint(stop * per_pass).astype(np.int64) - read, 0, left)
        counts = np.where(through <= stop, left, counts)
        taken = [reader.take(count) for reader, count in zip(mine, counts.tolist(), strict=True)]
        rng = np.random.default_rng([rows.settings.seed, 2, number, part])
        consumed = rows.add(np.concatenate(taken), rng, end)
        for reader, ids in zip(mine, taken, strict=True):
            reader.give_back(ids[~np.isin(ids, consumed)])
        done, read, part = stop, read + counts, part + 1
    rows.num_passes += int(np.ceil(done))
    rows.stable_rows = rows.num_rows
