"""What ranks do in tests of the optimizer's state over several gradient buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlm.checkpoint.adam_state import inner_optimizers
from megatron_vlm.checkpoint.folder import checkpoint_path
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.sharded_state import describe_model
from megatron_vlm.config import TrainConfig
from megatron_vlm.training.optimizer import wrap_model
from megatron_vlm.training.state import TrainState
from tests.support.jobs import FixedPlan, batches_of, start, step
from tests.support.samples import make_samples

NUM_SAMPLES = 84


@dataclass(frozen=True)
class Going:
    """What a run did before and after a point at which it may have been saved."""

    losses: list[str]
    """After that point, in hex."""
    num_padded: int
    """Buckets before the last one of their buffer that end with padding, on this rank."""
    num_owned: int
    """Parameters of which this rank owns a part."""


def go(
    config: TrainConfig,
    rows: Sequence[Sequence[int]],
    *,
    before: int,
    after: int,
    learning: str = "",
) -> Going:
    """Start or resume; do `before` steps and save, if there are any, then go on.

    Only parameters whose name begins with `learning` learn.
    """
    state = _start(config, rows, learning)
    samples = make_samples(NUM_SAMPLES)
    loaders = [batches_of(config, state.rank, rows, samples, state.iteration) for _ in state.chunks]
    for _ in range(before):
        step(state, loaders)
    if before:
        state.gather_parameters()
        save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    owned = [part for inner in inner_optimizers(state.optimizer) for part in _owned_parts(inner)]
    return Going([step(state, loaders).loss.hex() for _ in range(after)], _num_padded(state), len(owned))


def differences(config: TrainConfig, rows: Sequence[Sequence[int]]) -> tuple[int, list[str]]:
    """Do two steps and save; return how many tensors were compared with what this rank holds, and which differ.

    What a rank holds is looked up by its place in the gradient buffers, in which the buckets lie with their padding.
    """
    state = _start(config, rows)
    loader = batches_of(config, state.rank, rows, make_samples(NUM_SAMPLES), 0)
    for _ in range(2):
        step(state, [loader])
    state.gather_parameters()
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    described = {value.data: value for value in describe_model(state.chunks)["model0"].values()}
    folder = str(checkpoint_path(config.run_dir, state.iteration))
    saved = dist_checkpointing.load_plain_tensors(folder)
    wrong, num_compared = [], 0
    for inner in inner_optimizers(state.optimizer):
        for parameter, begin, held in _owned_parts(inner):
            for name, values in held.items():
                place = described[parameter]
                layer = _layer_of(place)
                key = place.key if layer is None else place.key.replace(".layers.", f".layers.{layer}.")
                whole = saved[f"optimizer.state.{name}.{key}"].flatten()
                num_compared += 1
                if not torch.equal(whole[begin : begin + values.numel()], values):
                    wrong.append(f"{name} of {place.key}")
    return num_compared, wrong


def _start(config: TrainConfig, rows: Sequence[Sequence[int]], learning: str = "") -> TrainState:
    def wrap(config: TrainConfig, chunks: Sequence[torch.nn.Module]) -> Any:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name.startswith(learning))
        return wrap_model(config, chunks)

    with mock.patch("megatron_vlm.training.setup.wrap_model", wrap):
        return start(config, FixedPlan.of(config, rows))


def _num_padded(state: TrainState) -> int:
    buffers = [buffer for chunk in state.wrapped for buffer in chunk.buffers]
    return sum(b.grad_data.numel() != b.numel_unpadded for buffer in buffers for b in buffer.buckets[:-1])


def _owned_parts(inner: Any) -> Iterator[tuple[torch.Tensor, int, dict[str, torch.Tensor]]]:
    """Yield each parameter of which this rank owns a part, where the part begins in it, and what Adam has of it."""
    for buffer, ranges in zip(inner.buffers, inner.gbuf_ranges, strict=True):
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, places in bucket["param_map"].items():
                begin = places["gbuf_world"].start - buffer.param_index_map[parameter][0]
                group, order = inner.model_param_group_index_map[parameter]
                main = inner.optimizer.param_groups[group]["params"][order]
                state = inner.optimizer.state[main]
                yield parameter, begin, {"param": main.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}


def _layer_of(place: ShardedTensor | ShardedTensorFactory) -> int | None:
    """Return the layer of a parameter that the checkpoint stacks with those of other layers."""
    part = place.build()[0] if isinstance(place, ShardedTensorFactory) else place
    return part.global_offset[0] if part.prepend_axis_num else None
