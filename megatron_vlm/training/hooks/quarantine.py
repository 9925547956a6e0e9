"""Records how many samples of each iteration were left out because `data.quarantine` names them."""

import logging

from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)
QUARANTINE = "quarantine"


class Hook:
    """Notes the file at the start, and what was left out at the end."""

    def __init__(self) -> None:
        self._num_left_out = 0

    def start(self, state: TrainState) -> None:
        """Note how many samples the file names, and its checksum: it may change between two starts."""
        number = len(state.quarantine.ids)
        if number:
            what = f"{number} samples are in quarantine ({state.config.data.quarantine})"
            note_event(state, QUARANTINE, what, samples=number, sha256=state.quarantine.sha256)
            if state.is_reporter:
                logger.info("%s", what)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Count those of the iteration."""
        self._num_left_out += state.quarantine.count(state.plan, state.iteration - 1)

    def close(self, state: TrainState) -> None:
        """Say how many were left out since the start."""
        if self._num_left_out:
            what = f"{self._num_left_out} samples in quarantine were left out"
            note_event(state, QUARANTINE, what, left_out=self._num_left_out)
            if state.is_reporter:
                logger.info("%s", what)
