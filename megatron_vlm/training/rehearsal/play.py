"""Play one rank: the code of `train`, from its process groups to its last step, on the fake device."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.checkpoint.adam_state import adams
from megatron_vlm.checkpoint.parallel_files import bytes_per_rank
from megatron_vlm.checkpoint.sharded_state import describe
from megatron_vlm.config.blend import datasets_of
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.groups import RankLayout, build_groups, rank_layout, stop_distributed
from megatron_vlm.platform.fake_device.device import DEVICE, fake_device, on_host
from megatron_vlm.platform.fake_device.events import HostWait
from megatron_vlm.platform.fake_device.memory import storage_bytes
from megatron_vlm.platform.fake_device.watch import DeviceWatch
from megatron_vlm.training.blend import open_planned_blend
from megatron_vlm.training.rehearsal.facts import BUILD, STEP, UPDATE, RankFacts
from megatron_vlm.training.rehearsal.job import Rehearsal
from megatron_vlm.training.rehearsal.rows import MadeUpRows
from megatron_vlm.training.setup import build_random_state
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import update_weights

_HOST = torch.device("cpu")


def play(rehearsal: Rehearsal, rank: int) -> RankFacts:
    """Play one rank of the job in this process, where the fake device is installed."""
    world_size = rehearsal.layout.world_size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        build_groups(rehearsal.config.parallel)
        with fake_device() as watch:
            return _play(rehearsal, rank_layout(), watch)
    finally:
        stop_distributed()


def _play(rehearsal: Rehearsal, place: RankLayout, watch: DeviceWatch) -> RankFacts:
    source = _Source(rehearsal)
    with watch.memory.during(BUILD):
        state = build_random_state(rehearsal.config, place, source.plan, source.dataset_names)
    state.layout = replace(state.layout, num_micro_batches=rehearsal.num_micro_batches)
    _measure_update(state, watch)
    for _ in range(rehearsal.iterations):
        fed = _Fed(watch)
        feeders = [_Feeder(batches, fed) for batches in source.batches(state)]
        watch.start_recording()
        with watch.memory.during(STEP):
            update_weights(state, feeders, device=DEVICE, stop_requested=False)
        state.iteration += 1
    return _facts(rehearsal, state, watch, fed)


def _measure_update(state: TrainState, watch: DeviceWatch) -> None:
    """Count the memory of the optimizer's step apart."""
    update = state.optimizer.step

    def measured_update(*args: Any, **kwargs: Any) -> Any:
        with watch.memory.during(UPDATE):
            return update(*args, **kwargs)

    state.optimizer.step = measured_update


@dataclass(slots=True)
class _Fed:
    """Micro-batches that the model took in a step, over all chunks of this rank."""

    watch: DeviceWatch
    image_counts: list[int] = field(default_factory=list)
    label_counts: list[int] = field(default_factory=list)

    def note(self, batch: VLMBatch) -> None:
        self.image_counts.append(batch.num_images)
        self.label_counts.append(len(batch.label_index))
        self.watch.position = len(self.image_counts)


class _Feeder:
    """Loads micro-batches on the host, where their tensors are real, and notes what they contain."""

    def __init__(self, batches: Iterator[VLMBatch], fed: _Fed) -> None:
        self.batches, self.fed = batches, fed

    def __iter__(self) -> Iterator[VLMBatch]:
        return self

    def __next__(self) -> VLMBatch:
        with on_host():
            batch = next(self.batches)
        self.fed.note(batch)
        return batch


@dataclass(frozen=True, slots=True)
class _MadeUpPlan:
    """What a step asks of a plan, where the rows are made up."""

    row_length: int
    num_iterations: int
    hash: str = "made up"

    def seq_length(self, iteration: int) -> int:
        return self.row_length


class _Source:
    """The rows of the run: those of its plan, or made-up ones."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        config = rehearsal.config
        self.rehearsal, self.blend = rehearsal, None
        self.plan: Any = _MadeUpPlan(config.data.seq_length, rehearsal.iterations)
        self.dataset_names: Sequence[str] = [entry.path for entry in datasets_of(config.data.blend)]
        if rehearsal.has_data:
            with on_host():
                self.blend = open_planned_blend(config)
            self.plan, self.dataset_names = self.blend.plan, self.blend.dataset_names

    def batches(self, state: TrainState) -> list[Iterator[VLMBatch]]:
        """Return the micro-batches of the next step for each model chunk."""
        with on_host():
            if self.blend is not None:
                return list(self.blend.start_loaders(state, _HOST, state.iteration))
            config, count = self.rehearsal.config, self.rehearsal.num_micro_batches
            slices = [state.rank_slice(has_tower=chunk.pre_process) for chunk in state.chunks]
            return [MadeUpRows(config, rank_slice, count) for rank_slice in slices]


def _facts(rehearsal: Rehearsal, state: TrainState, watch: DeviceWatch, fed: _Fed) -> RankFacts:
    parameters = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in state.wrapped for buffer in chunk.buffers]
    weights = {id(parameter.untyped_storage()) for parameter in parameters}
    optimizer = [x for x in _optimizer_tensors(state) if id(x.untyped_storage()) not in weights]
    place = state.rank
    return RankFacts(
        rank=place.rank,
        pp_rank=place.pp_rank,
        tp_rank=place.tp_rank,
        cp_rank=place.cp_rank,
        dp_rank=place.dp_rank,
        parameters=sum(p.numel() for p in parameters),
        learning=sum(p.numel() for p in parameters if p.requires_grad),
        weights=storage_bytes(parameters),
        gradients=storage_bytes(buffer.grad_data for buffer in buffers),
        optimizer=storage_bytes(optimizer),
        peaks=dict(watch.memory.peaks),
        waits=_waits_of_a_step(rehearsal, watch, len(fed.image_counts)),
        collectives=tuple(watch.collectives.calls),
        image_counts=tuple(fed.image_counts),
        label_counts=tuple(fed.label_counts),
        checkpoint=bytes_per_rank(
            describe(state.chunks, state.optimizer, only_learning=state.config.model.adapter is not None)
        ),
    )


def _optimizer_tensors(state: TrainState) -> Iterator[torch.Tensor]:
    """Yield main weights and moments that are on the device."""
    for adam in adams(state.optimizer):
        for group in adam.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.is_cuda)
        for values in adam.state.values():
            yield from (value for value in values.values() if torch.is_tensor(value) and value.is_cuda)


def _waits_of_a_step(rehearsal: Rehearsal, watch: DeviceWatch, num_fed: int) -> Counter[HostWait]:
    """Return the waits of a step with all its micro-batches: those that are not played are like the last ones."""
    parallel = rehearsal.config.parallel
    virtual = parallel.num_model_chunks
    period = parallel.pipeline_model_parallel_size if virtual else 1
    repeats, window = rehearsal.layout.num_micro_batches - rehearsal.num_micro_batches, period * (virtual or 1)
    waits: Counter[HostWait] = Counter()
    for (wait, position), count in watch.waits.items():
        is_steady = num_fed - window <= position < num_fed
        waits[wait] += count + (count * repeats // period if is_steady else 0)
    return waits
