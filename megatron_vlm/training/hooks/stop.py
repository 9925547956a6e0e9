"""Decides, alike on every rank, whether the run ends after a step."""

from megatron_vlm.training.state import EXIT_ITERATION, SIGNALLED, TrainState
from megatron_vlm.training.step import StepMetrics


class Hook:
    """Sets `state.stop_reason`."""

    def start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """End the run if a rank was told to stop, or at `training.exit_iteration`."""
        if metrics.stop_requested:
            state.stop_reason = SIGNALLED
        elif state.iteration == state.config.training.exit_iteration and state.stop_reason is None:
            state.stop_reason = EXIT_ITERATION

    def close(self, state: TrainState) -> None:
        """Nothing to release."""
