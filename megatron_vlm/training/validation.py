"""The loss on fixed batches of held-out data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.gradients import run_micro_batches
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.totals import Totals, check_samples, losses_by_name, mean_loss, sum_over_ranks

VALIDATION_LOSS = "validation_loss"


def validation_losses(
    state: TrainState, blend: OpenBlend, *, device: torch.device, stop_requested: Callable[[], bool]
) -> dict[str, float] | None:
    """Compute the loss over the whole plan of a blend; all ranks call it together. The training state is unchanged.

    Args:
        state: the model as it is now.
        blend: the validation data.
        device: where the batches go.
        stop_requested: says whether this process was told to stop.

    Returns:
        `validation_loss`, the mean over all labels, and `validation_loss/<dataset>`, the mean of each name; those
        without labels are left out. None if a rank was told to stop meanwhile.

    Raises:
        DataError: a sample cannot be read, or more images cannot than `data.max_bad_fraction` allows.
        NumericError: the ranks consumed samples other than the planned ones.
    """
    names = blend.dataset_names
    beat(Phase.FIRST_STEP)
    losses, labels = [0.0] * len(names), [0.0] * len(names)
    loaders = blend.start_loaders(state, device, start_iteration=0)
    try:
        with torch.no_grad(), _evaluating(state):
            for index in range(blend.plan.num_iterations):
                totals = _forward(state, blend, loaders, index, device, stop_requested())
                beat(Phase.STEP)
                if totals.stop_requested:
                    return None
                losses = [a + b for a, b in zip(losses, totals.losses, strict=True)]
                labels = [a + b for a, b in zip(labels, totals.labels, strict=True)]
    finally:
        for loader in loaders:
            loader.close()
    mean = mean_loss(sum(losses), sum(labels))
    by_name = losses_by_name(names, losses, labels)
    named = {f"{VALIDATION_LOSS}/{name}": value for name, value in by_name.items()}
    return named if mean is None else {VALIDATION_LOSS: mean, **named}


def _forward(
    state: TrainState, blend: OpenBlend, loaders: Sequence, index: int, device: torch.device, stop_requested: bool
) -> Totals:
    sums, counts = run_micro_batches(
        state,
        loaders,
        seq_length=blend.plan.seq_length(index),
        num_datasets=len(blend.datasets),
        device=device,
        forward_only=True,
    )
    totals = sum_over_ranks(
        sums, counts, state.rank, num_datasets=len(blend.datasets), stop_requested=stop_requested, device=device
    )
    if totals.num_bad_images and state.bad_samples is not None:
        bad_images = [image for count in counts for image in count.bad_images]
        state.bad_samples.note(bad_images, blend.dataset_names, state.iteration)
    batch = f"batch {index + 1} of the validation at iteration {state.iteration}"
    check_samples(totals, blend.plan, index, state.rank, num_chunks=len(loaders), batch=batch)
    return totals


@contextmanager
def _evaluating(state: TrainState) -> Iterator[None]:
    """Put the model in evaluation mode with complete weights; restore it afterwards."""
    modes = [(module, module.training) for chunk in state.wrapped for module in chunk.modules()]
    hooked: list[DistributedDataParallel] = []
    if state.config.parallel.overlap_param_gather:
        hooked = list(state.wrapped)
    for chunk in state.wrapped:
        chunk.eval()
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        for module, mode in modes:
            module.training = mode
