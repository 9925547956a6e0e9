"""Measures the validation loss at its interval and after the last iteration."""

import time
from collections.abc import Callable

import torch

from megatron_vlm.platform.files.events import VALIDATION
from megatron_vlm.training.blend import OpenBlend
from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import SIGNALLED, TrainState
from megatron_vlm.training.step import StepMetrics
from megatron_vlm.training.validation import validation_losses


class Hook:
    """Sets `state.validation_losses`; comes before the hooks that write them.

    Args:
        blend: the validation data; None: no validation.
        device: where the batches go.
        stop_requested: says whether this process was told to stop, in which case a validation ends without a result.
    """

    def __init__(
        self, blend: OpenBlend | None, *, device: torch.device, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.blend, self.device, self.stop_requested = blend, device, stop_requested

    def start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Validate if it is due; stop the run if a rank was told to stop meanwhile."""
        state.validation_losses = {}
        interval = state.config.training.validation_interval
        if self.blend is None or interval is None or metrics.stop_requested:
            return
        if state.iteration % interval and state.iteration != state.train_iters:
            return
        start = time.perf_counter()
        losses = validation_losses(state, self.blend, device=self.device, stop_requested=self.stop_requested)
        note_event(state, VALIDATION, "validated", seconds=time.perf_counter() - start)
        if losses is None:
            state.stop_reason = SIGNALLED
        else:
            state.validation_losses = losses

    def close(self, state: TrainState) -> None:
        """Nothing to release: a validation closes its own loaders."""
