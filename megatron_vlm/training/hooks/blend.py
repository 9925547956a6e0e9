"""Records where the blend of datasets changes."""

import logging

from megatron_vlm.platform.files.events import BLEND
from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)


class Hook:
    """Notes the event after the last iteration with the blend before."""

    def start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Note a change of the blend with the next iteration."""
        if state.iteration in state.plan.summary.step_iterations:
            what = f"data.blend changes from iteration {state.iteration + 1:,} on"
            note_event(state, BLEND, what)
            if state.is_reporter:
                logger.info("%s", what)

    def close(self, state: TrainState) -> None:
        """Nothing to release."""
