"""What the ranks of these tests run: build, load, optimizer steps over drawn gradients, save."""

import zlib
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.sharded_state import describe_model
from megatron_vlm.config import TrainConfig
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.training.clipping import clipped_step
from megatron_vlm.training.state import TrainState
from tests.support.jobs import CPU, Steps, start, train_steps
from tests.transformer_engine import forwards, kernels

Place = tuple[str, tuple[int, ...]]


def sharded_tensors(chunk: VisionLanguageModel) -> dict[Place, list[ShardedTensor]]:
    """Return what a chunk saves of each parameter, by its place on disk: the same for every backend.

    Raises:
        TypeError: something is saved that is no tensor.
    """
    tensors = {}
    for value in nested_values(describe_model([chunk])):
        parts = list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
        if not all(isinstance(part, ShardedTensor) for part in parts):
            raise TypeError(f"{value.key} is saved as an object")
        tensors[parts[0].key, parts[0].global_offset] = parts
    return tensors


def parameters(chunk: VisionLanguageModel) -> dict[Place, torch.nn.Parameter]:
    """Return the parameters of a chunk by their places on disk."""
    found = {}
    for value in nested_values(describe_model([chunk])):
        part = next(iter(nested_values(value.build()))) if isinstance(value, ShardedTensorFactory) else value
        found[part.key, part.global_offset] = value.data
    return found


def run(config: TrainConfig, *, adam: str, num_steps: int) -> None:
    """Load what the config names, do steps over gradients that depend on parameter and iteration, and save.

    Args:
        config: of the run; a checkpoint in its folder is resumed.
        adam: optimizer of the machine, as in `kernels.use_adam`.
        num_steps: 0 saves what was loaded.
    """
    kernels.use_adam(adam)
    state = start(config)
    for _ in range(num_steps):
        _draw_gradients(state)
        clipped_step(state.optimizer, config.optimizer.clip_grad, CPU)
        state.iteration += 1
        state.consumed_samples += config.training.global_batch_size
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())


def _draw_gradients(state: TrainState) -> None:
    """Give every parameter that learns the gradient that all data-parallel ranks would have agreed on."""
    shard = parallel_state.get_tensor_model_parallel_rank()
    for chunk in state.chunks:
        for (key, offset), parameter in parameters(chunk).items():
            if not parameter.requires_grad:
                continue
            is_split = getattr(parameter, "tensor_model_parallel", False)
            name = f"{key} {offset[0] if '.layers.' in key else 0} {shard if is_split else 0} {state.iteration}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            # Too small to be clipped: torch's AdamW divides in its kernel, other optimizers before, which rounds.
            parameter.main_grad.copy_(1e-4 * torch.randn(parameter.shape, generator=generator))


def loaded_weights(config: TrainConfig, weights: str) -> dict[Place, Tensor]:
    """Return this rank's weights after a start from `weights`, on a machine with a GPU."""
    kernels.use_adam("FusedAdam")
    config = replace(config, checkpoint=replace(config.checkpoint, load_weights=weights))
    state = start(config)
    return {place: p.detach().clone() for chunk in state.chunks for place, p in parameters(chunk).items()}


def train(adam: str, config: TrainConfig, **settings: Any) -> Steps:
    """Do training steps through the forward passes of `forwards`; the settings are those of `train_steps`."""
    kernels.use_adam(adam)
    with forwards.on_the_cpu():
        return train_steps(config, **settings)
