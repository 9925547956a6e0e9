"""Records where the blend of datasets changes."""

import logging

from megatron_vlm.platform.files.events import BLEND, read_events
from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)


class Hook:
    """Notes the event after the last iteration with the blend before, or at a resume that brings the change."""

    def start(self, state: TrainState) -> None:
        """Note a change with the first iteration of this attempt, unless the attempt before has done so."""
        if state.is_reporter and not any(
            event.kind == BLEND and event.iteration == state.iteration for event in read_events(state.config.run_dir)[0]
        ):
            self._note_change(state)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Note a change with the next iteration."""
        self._note_change(state)

    def _note_change(self, state: TrainState) -> None:
        if state.iteration in state.plan.summary.step_iterations:
            what = f"data.blend changes from iteration {state.iteration + 1:,} on"
            note_event(state, BLEND, what)
            if state.is_reporter:
                logger.info("%s", what)

    def close(self, state: TrainState) -> None:
        """Nothing to release."""
