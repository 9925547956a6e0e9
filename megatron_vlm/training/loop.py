"""The training loop: steps until the run is done; everything else is a hook."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.plan.row_hash import chain_hash
from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.hook import Hook, running
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import train_step

logger = logging.getLogger(__name__)


def train(
    state: TrainState,
    loaders: Sequence[Iterator[VLMBatch]],
    hooks: Sequence[Hook],
    *,
    device: torch.device,
    stop_requested: Callable[[], bool],
    blend: OpenBlend | None = None,
) -> None:
    """Run optimizer steps until train_iters, or until a hook sets `state.stop_reason`.

    Args:
        state: the run; its position advances.
        loaders: micro-batches for each model chunk, from `state.iteration` on.
        hooks: called after each step, in order, on every rank.
        device: where the batches go.
        stop_requested: says whether this process was told to stop.
        blend: the data, as in `train_step`.
    """
    if state.iteration >= state.train_iters:
        logger.info("the run is complete: %d of %d iterations are done", state.iteration, state.train_iters)
    with running(hooks, state):
        beat(Phase.FIRST_STEP, iteration=state.iteration)
        while state.iteration < state.train_iters and state.stop_reason is None:
            metrics = train_step(state, loaders, device=device, stop_requested=stop_requested(), blend=blend)
            state.iteration += 1
            state.consumed_samples += state.config.training.global_batch_size
            state.consumed_hash = chain_hash(state.consumed_hash, int(metrics.sample_ids_sha, 16))
            if state.seen is not None:
                state.seen.add(state.dataset_names, metrics.dataset_samples, metrics.dataset_tokens)
            for hook in hooks:
                beat(Phase.STEP, iteration=state.iteration)
                hook.step(state, metrics)
            beat(Phase.STEP)
        beat(Phase.SAVE)
